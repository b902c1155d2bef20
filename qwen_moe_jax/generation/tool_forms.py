"""Calls that a reply has to make, as forms in llguidance's Lark: one call of one of some functions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.replies import function_of, kinds_of

# JSON as `json.dumps` writes it: a model that may put spaces anywhere sometimes writes them for ever.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# Any text that does not end a parameter.
_TEXT = r"/(?s:([^<]|<[^\/])*)/"


def chosen_tools(tools: Any, choice: Any) -> tuple[Any, list[Mapping[str, Any]]]:
    """What a `tool_choice` leaves: (the tools that the template is given, those of which one must be called).

    Args:
        tools: as of `chat.template_options`, or None.
        choice: "auto" or None (the model decides), "none" (no call), "required" (some call), or {"type":
            "function", "function": {"name": ...}} (that call).

    Raises:
        InputError: another choice, or a function that is not among the tools.
    """
    if choice in (None, "auto"):
        return tools, []
    if choice == "none":
        return None, []
    if not tools:
        raise InputError(f"tool_choice is {choice!r} and there are no tools; give tools as well.")
    if choice == "required":
        return tools, list(tools)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in tools if function_of(tool).get("name") == name]
    if not isinstance(name, str) or not named:
        raise InputError(
            f"tool_choice is {choice!r}; expected 'auto', 'none', 'required' or {{'type': 'function', "
            "'function': {'name': ...}} with the name of a tool."
        )
    return tools, named


def call_grammar(tools: Sequence[Mapping[str, Any]], *, xml: bool) -> str:
    """The grammar of one call, as `replies.parse_call` reads it.

    Args:
        tools: in OpenAI's form, or bare functions.
        xml: in Qwen3.5's form, else in the JSON form of Qwen3.
    """
    rules = ['start: "<tool_call>\\n" call "\\n</tool_call>"']
    names = [f"call_{number}" for number in range(len(tools))]
    rules.append("call: " + " | ".join(names))
    for name, tool in zip(names, tools, strict=True):
        function = function_of(tool)
        schema = function.get("parameters") or _NO_PARAMETERS
        rules += (
            _xml_call(name, function["name"], schema) if xml else _json_call(name, function["name"], schema)
        )
    return "\n".join(rules)


def _json_call(rule: str, function: str, schema: Mapping[str, Any]) -> list[str]:
    begin = json.dumps(f'{{"name": {json.dumps(function)}, "arguments": ')
    return [f'{rule}: {begin} {rule}_arguments "}}"', f"{rule}_arguments: {_json(schema)}"]


def _xml_call(rule: str, function: str, schema: Mapping[str, Any]) -> list[str]:
    needed = set(schema.get("required") or ())
    rules, parts = [], []
    for number, (key, of_value) in enumerate((schema.get("properties") or {}).items()):
        part = f"{rule}_{number}"
        parts.append(part if key in needed else f"{part}?")
        begin, end = json.dumps(f"<parameter={key}>\n"), json.dumps("\n</parameter>\n")
        rules.append(f"{part}: {begin} {part}_value {end}")
        rules.append(f"{part}_value: {_value(of_value)}")
    body = " ".join([json.dumps(f"<function={function}>\n"), *parts, '"</function>"'])
    return [f"{rule}: {body}", *rules]


def _value(schema: Any) -> str:
    """A parameter as `replies` takes it: text stays text, all else is JSON."""
    schema = schema if isinstance(schema, Mapping) else {}
    kinds, choices = kinds_of(schema), schema.get("enum")
    if (kinds and "string" not in kinds) or "$ref" in schema:
        return _json(schema)
    if isinstance(choices, list) and choices:
        return " | ".join(json.dumps(str(choice)) for choice in choices)
    return _TEXT


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"

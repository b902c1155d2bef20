"""Replies as chat messages: thinking, content and tool calls, told apart while the text arrives.

Qwen models write

    <think>
    ...
    </think>

    content <tool_call>
    <function=NAME>
    <parameter=KEY>
    value
    </parameter>
    </function>
    </tool_call>

and Qwen3 `{"name": ..., "arguments": {...}}` between the tags of a call. A template may have opened
`<think>` in the prompt already. What only looks like a tag is text.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def opens_thinking(prompt: str) -> bool:
    """Whether the reply to a prompt begins inside of thinking."""
    return prompt.rstrip().endswith(OPEN_THINK)


def function_of(tool: Mapping[str, Any]) -> Any:
    """The function of a tool in OpenAI's form, or the bare function that it is."""
    return tool.get("function", tool)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that a reply asks for.

    Attributes:
        name: of the function.
        arguments: name -> value, of the type that the tool's schema gives it.
        id: made here, so that its result can name it.
    """

    name: str
    arguments: dict[str, Any]
    id: str

    def to_dict(self) -> dict[str, Any]:
        """As messages have it (OpenAI's form): arguments are JSON text."""
        text = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": text}}


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a piece of text decides; at most one of them is not empty.

    Attributes:
        content, reasoning: text.
        call: a whole call.
    """

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


@dataclasses.dataclass(frozen=True)
class ReplyForm:
    """How the reply to a chat begins, and what it may call.

    Attributes:
        thinking: the prompt has opened `<think>`.
        tools: as the chat template was given them.
    """

    thinking: bool
    tools: tuple[Mapping[str, Any], ...]

    @classmethod
    def behind(cls, prompt: str, tools: Sequence[Mapping[str, Any]]) -> "ReplyForm":
        """Of the reply behind a chat's text."""
        return cls(opens_thinking(prompt), tuple(tools))

    def parser(self) -> "ReplyParser":
        """Tells one reply apart."""
        return ReplyParser(thinking=self.thinking, tools=self.tools)

    def message_of(self, text: str) -> dict[str, Any]:
        """A whole reply as a message."""
        parser = self.parser()
        parser.push(text)
        parser.finish()
        return parser.message


class ReplyParser:
    """Tells the parts of one reply apart. The deltas of any division of a text into pieces add up "
    "to the same."""

    def __init__(self, *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()):
        """Begins a reply.

        Args:
            thinking: the prompt has opened `<think>`, so that the reply begins inside of it.
            tools: as the chat template is given them; their schemas say the types of arguments. Without tools
                a call is text.
        """
        self._schemas = _schemas_of(tools)
        self._calls: list[ToolCall] = []
        self._state = self._in_thinking if thinking else self._at_start
        self._held = ""  # of which it is not known yet what it is
        self._content = self._reasoning = ""

    @property
    def message(self) -> dict[str, Any]:
        """The reply so far as a message."""
        # a reply that only calls has no content, which templates and clients write as None
        found: dict[str, Any] = {
            "role": "assistant",
            "content": self._content or (None if self._calls else ""),
        }
        if self._reasoning:
            found["reasoning_content"] = self._reasoning
        if self._calls:
            found["tool_calls"] = [call.to_dict() for call in self._calls]
        return found

    def push(self, text: str) -> list[Delta]:
        """More of the reply; returns what it decides."""
        self._held += text
        return self._settle(final=False)

    def finish(self) -> list[Delta]:
        """The reply has ended; returns the rest. A call that was cut is text."""
        return self._settle(final=True)

    def _settle(self, *, final: bool) -> list[Delta]:
        found: list[Delta] = []
        while self._held:
            held, state = self._held, self._state
            found += self._state(final)
            if (self._held, self._state) == (held, state):
                break
        return found

    # States. Each takes what it can from the text that is held, and may name the next one.

    def _at_start(self, final: bool) -> list[Delta]:
        """Before the first word: thinking may begin here, and nowhere else."""
        rest = self._held.lstrip()
        if rest.startswith(OPEN_THINK):
            self._held, self._state = rest[len(OPEN_THINK) :], self._in_thinking
        elif final or not OPEN_THINK.startswith(rest):
            self._state = self._in_content
        return []

    def _in_thinking(self, final: bool) -> list[Delta]:
        if not self._reasoning:
            self._held = self._held.lstrip()
        end = self._held.find(CLOSE_THINK)
        if end < 0:
            return self._think(self._take(_undecided(self._held, CLOSE_THINK, final)))
        found = self._think(self._take(end).rstrip())
        self._take(len(CLOSE_THINK))
        self._state = self._behind_a_tag
        return found

    def _behind_a_tag(self, final: bool) -> list[Delta]:
        """White space there belongs to nothing."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._in_content
        return []

    def _in_content(self, final: bool) -> list[Delta]:
        begin = self._held.find(_OPEN_CALL) if self._schemas else -1
        if begin < 0:
            tag = _OPEN_CALL if self._schemas else ""
            return self._say(self._take(_undecided(self._held, tag, final)))
        if begin > 0:  # what is before it, without the white space between
            before = self._held[:begin]
            if before.strip():
                kept = before.rstrip()
                self._held = self._held[len(kept) :]
                return self._say(kept)
        end = self._held.find(_CLOSE_CALL)
        if end < 0:
            return self._say(self._take(len(self._held))) if final else []
        call = parse_call(self._held[begin + len(_OPEN_CALL) : end], self._schemas)
        whole = self._take(end + len(_CLOSE_CALL))
        if call is None:
            return self._say(whole)
        self._calls.append(call)
        self._state = self._behind_a_tag
        return [Delta(call=call)]

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _say(self, text: str) -> list[Delta]:
        self._content += text
        return [Delta(content=text)] if text else []

    def _think(self, text: str) -> list[Delta]:
        self._reasoning += text
        return [Delta(reasoning=text)] if text else []


def parse_call(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """What stands between the tags of a call, in either form; None if it is no call.

    Args:
        body: the text.
        schemas: function -> JSON schema of each of its parameters.
    """
    found = _FUNCTION.fullmatch(body)
    if found:
        name = found[1].strip()
        known = schemas.get(name, {})
        arguments = {
            key.strip(): _typed(_value(text), known.get(key.strip()))
            for key, text in _PARAMETER.findall(found[2])
        }
        return ToolCall(name, arguments, _new_id())
    try:
        raw = json.loads(body)
    except ValueError:
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        return None
    arguments = raw.get("arguments", {})
    return ToolCall(raw["name"], arguments, _new_id()) if isinstance(arguments, dict) else None


def _value(text: str) -> str:
    """A parameter's text; the line breaks beside the tags are not part of it."""
    return text.removeprefix("\n").removesuffix("\n")


def kinds_of(schema: Any) -> list[Any]:
    """The types that a schema allows; none if it does not say."""
    if not isinstance(schema, Mapping):
        return []
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return kinds or [each.get("type") for each in choices if isinstance(each, Mapping)]


def _typed(text: str, schema: Any) -> Any:
    """A parameter's value by its schema: text stays text, all else is JSON. What is none stays text, too."""
    kinds = kinds_of(schema)
    if kinds == ["string"] or not kinds:
        return text
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text.strip(), text))
    except ValueError:
        return text
    fits = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
        "string": False,
    }
    return value if any(fits.get(str(kind), False) for kind in kinds) else text


def _schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Function -> schema of each parameter, of tools in OpenAI's form or as bare functions."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = function_of(tool)
        parameters = function.get("parameters") or {}
        found[str(function.get("name"))] = dict(parameters.get("properties") or {})
    return found


def _undecided(text: str, tag: str, final: bool) -> int:
    """How much of a text no later one changes: not a beginning of the tag at its end, nor the white space
    before that, which would belong to nothing."""
    if final or not tag:
        return len(text)
    longest = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
    return len(text[: len(text) - longest].rstrip())


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"

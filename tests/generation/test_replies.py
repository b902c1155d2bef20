"""Replies are told apart the same way wherever their text is cut into pieces."""

import json
from typing import Any

import pytest

from qwen_moe_jax.generation.replies import ReplyParser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "where": {"type": "object"},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
            },
        },
    },
    {"name": "stop", "parameters": {}},
]


def xml(name: str, **arguments: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


# text, prompt has opened <think>, content, reasoning, calls
CASES: list[tuple[str, bool, str | None, str, list[tuple[str, dict[str, Any]]]]] = [
    ("Hello there.", False, "Hello there.", "", []),
    ("", False, "", "", []),
    ("<think>\nlong\nthought\n</think>\n\nHi", False, "Hi", "long\nthought", []),
    ("thought\n</think>\n\nHi", True, "Hi", "thought", []),
    ("still think", True, "", "still think", []),  # cut by max_new_tokens
    ("<think>\n\n</think>\n\nHi", False, "Hi", "", []),
    ("a <think> b </think> c", False, "a <think> b </think> c", "", []),  # not at the beginning
    ("1 < 2 and <tool> is <tool_calls", False, "1 < 2 and <tool> is <tool_calls", "", []),
    (xml("weather", city="Ulm", days="3"), False, None, "", [("weather", {"city": "Ulm", "days": 3})]),
    (
        f"I look.\n\n{xml('weather', city='7', exact='True')}\n{xml('stop')}",
        False,
        "I look.",
        "",
        [("weather", {"city": "7", "exact": True}), ("stop", {})],
    ),
    (
        "why\n</think>\n\n" + xml("weather", where='{"a": [1, {"b": "</x>"}]}', limit="null"),
        True,
        None,
        "why",
        [("weather", {"where": {"a": [1, {"b": "</x>"}]}, "limit": None})],
    ),
    (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "<b>", "where": {"x": {"y": '
        "1}}}}\n</tool_call>",
        False,
        None,
        "",
        [("weather", {"city": "<b>", "where": {"x": {"y": 1}}})],
    ),
    (xml("weather", days="many"), False, None, "", [("weather", {"days": "many"})]),
    (xml("weather", city="two\nlines"), False, None, "", [("weather", {"city": "two\nlines"})]),
    ("<tool_call>\n<function=wea", False, "<tool_call>\n<function=wea", "", []),  # cut
    ("<tool_call>nothing</tool_call> so", False, "<tool_call>nothing</tool_call> so", "", []),
    ("ends with <tool", False, "ends with <tool", "", []),
    ("two  spaces \n stay", False, "two  spaces \n stay", "", []),
]


def parsed(pieces: list[str], thinking: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the message; the same from what was said piece by piece)."""
    parser = ReplyParser(thinking=thinking, tools=TOOLS)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    for delta in deltas:
        assert sum(map(bool, (delta.content, delta.reasoning, delta.call))) == 1
    said = {
        "content": "".join(delta.content for delta in deltas),
        "reasoning": "".join(delta.reasoning for delta in deltas),
        "calls": [delta.call for delta in deltas if delta.call],
    }
    return parser.message, said


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_wherever_a_reply_is_cut_it_has_the_same_parts(case) -> None:
    text, thinking, content, reasoning, calls = case
    divisions = [[text], list(text)] + [[text[:at], text[at:]] for at in range(1, len(text))]
    divisions += [[text[:a], text[a : a + 7], text[a + 7 :]] for a in range(0, len(text), 3)]
    for pieces in divisions:
        message, said = parsed(pieces, thinking)
        assert message["role"] == "assistant"
        assert message["content"] == content, pieces
        assert message.get("reasoning_content", "") == reasoning, pieces
        found = [
            (each["function"]["name"], json.loads(each["function"]["arguments"]))
            for each in message.get("tool_calls", ())
        ]
        assert found == calls, pieces
        assert said["content"] == (content or "")
        assert said["reasoning"] == reasoning
        assert [(call.name, call.arguments) for call in said["calls"]] == calls
        assert len({call.id for call in said["calls"]}) == len(calls)


def test_half_a_tag_is_never_shown() -> None:
    text = "<think>\nhm\n</think>\n\nSee: " + xml("weather", city="Ulm") + " done"
    for at in range(1, len(text)):
        parser = ReplyParser(tools=TOOLS)
        shown = "".join(delta.content + delta.reasoning for delta in parser.push(text[:at]))
        assert "<" not in shown
        assert not shown.endswith("tool_call")


def test_without_tools_a_call_is_text() -> None:
    parser = ReplyParser()
    parser.push(xml("weather", city="Ulm"))
    parser.finish()
    assert parser.message == {"role": "assistant", "content": xml("weather", city="Ulm")}

"""A chat in the terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.generator import Generator

_HELP = (
    "/new begins another chat, /undo takes the last turn back, /quit (or Ctrl-D) ends; Ctrl-C stops a reply"
)
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(model: Generator, *, system: str | None, options: Mapping[str, Any]) -> None:
    """Reads lines from standard input and writes replies, until the end of input.

    Thinking is shown dimmed and, as templates want it, not repeated to the model unless they ask for it.

    Args:
        model: with a chat template.
        system: system message.
        options: of generation.

    Raises:
        InputError: the checkpoint has no chat template or tokenizer, or an option is none.
    """
    if model.chat_template is None or model.tokenizer is None:
        raise InputError("chat needs a checkpoint with a chat template and a tokenizer; use generate.")
    options = {"max_new_tokens": None, **options}
    messages: list[dict[str, Any]] = []
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP, file=sys.stderr)
    with model.engine(max_rows=1) as engine:
        while True:
            line = _read(interactive)
            if line is None or line == "/quit":
                return
            if line in ("/new", "/undo"):
                messages = [] if line == "/new" else messages[:-2]
                continue
            if line.startswith("/"):
                print(_HELP, file=sys.stderr)
                continue
            if not line.strip():
                continue
            opening = [{"role": "system", "content": system}] if system else []
            asked = {"role": "user", "content": line}
            try:
                request = engine.submit([*opening, *messages, asked], **options)
            except InputError as error:
                print(f"qwen-moe-jax: {error}", file=sys.stderr)
                continue
            try:
                _show(request, sys.stdout)
            except KeyboardInterrupt:
                request.cancel()
            out = request.result()
            print(flush=True)
            reply = (out.messages or [{"role": "assistant", "content": (out.texts or [""])[0]}])[0]
            messages += [asked, reply]


def _read(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _show(request: Any, out: TextIO) -> None:
    """Writes a reply as it comes."""
    parser, thinking = request.reply.parser(), False
    dim = out.isatty()

    def write(deltas: list[Any]) -> None:
        nonlocal thinking
        for delta in deltas:
            if dim and bool(delta.reasoning) != thinking:
                thinking = bool(delta.reasoning)
                out.write(_DIM if thinking else f"{_PLAIN}\n")
            text = delta.reasoning or delta.content
            out.write(text if delta.call is None else f"{delta.call.name}({delta.call.arguments})")
        out.flush()

    try:
        for piece in request:
            write(parser.push(piece.text))
        write(parser.finish())
    finally:
        if thinking:
            out.write(_PLAIN)

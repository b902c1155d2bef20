"""The commands that write text: generate, chat and serve."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qwen_moe_jax.command_line import load_model, say
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.serving import command as server

_OPTIONS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "thinking_budget": int,
    "preset": str,
}


def add_commands(commands: Any, running: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the commands.

    Args:
        commands: of the command line.
        running: parsers of the options of a model and its mesh.
    """
    command = commands.add_parser("generate", parents=running, help="continue a prompt, or a file of them")
    command.add_argument("prompt", nargs="?")
    command.add_argument(
        "--input", metavar="FILE", help="JSON lines with prompt or messages, and id and options if wanted"
    )
    command.add_argument(
        "--output", metavar="FILE", help="JSON lines of replies; started again, the missing ones follow"
    )
    command.add_argument(
        "--raw", action="store_true", help="continue the text itself, without a chat template"
    )
    command.add_argument("--system", help="system message of the chat")
    _add_options(command)
    _add_engine(command)
    command.set_defaults(run=_generate)

    command = commands.add_parser("chat", parents=running, help="talk to a model in the terminal")
    command.add_argument("--system", help="system message of the chat")
    _add_options(command)
    command.set_defaults(run=_chat)

    command = commands.add_parser("serve", parents=running, help="serve OpenAI's HTTP API (extra `serve`)")
    command.add_argument("--model", required=True, help="checkpoint folder or hub id")
    _add_engine(command)
    server.add_options(command)
    command.set_defaults(run=_serve)


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-rows", type=int, default=64, help="sequences computed together (default 64)")
    command.add_argument("--memory", type=int, metavar="BYTES", help="of a device, for pages and states")
    command.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its start")


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="checkpoint folder or hub id")
    command.add_argument("--no-thinking", action="store_true", help="tell the chat template so")
    command.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens at random (default: as the checkpoint says)",
    )
    command.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    for name, kind in _OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind)


def _options_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of generation that were given, as of `QwenMoe.generate`.

    Raises:
        InputError: one of them can never be.
    """
    from qwen_moe_jax.generation.options import GenerationConfig

    names = [*_OPTIONS, "do_sample"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.stop:
        given["stop_strings"] = options.stop
    GenerationConfig().override(**{**given, "do_sample": True})  # before a model is loaded
    if options.no_thinking:
        given["enable_thinking"] = False
    return given


def _generate(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.input is None):
        raise InputError("generate takes a prompt, or --input with a file of them; give one of the two.")
    if (options.input is None) != (options.output is None):
        raise InputError("--input and --output go together: prompts from one file, replies to the other.")
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("the prompt is empty; give the text to answer or continue.")
    given = _options_of(options)
    model = load_model(options.model, options)
    chat = not options.raw and model.chat_template is not None
    if not chat and (options.system or options.no_thinking):
        raise InputError(
            "--system and --no-thinking need a chat template, and the prompt is taken as plain text."
        )

    def as_prompt(text: Any) -> Any:
        if not chat or not isinstance(text, str):
            return text
        system = [{"role": "system", "content": options.system}] if options.system else []
        return [*system, {"role": "user", "content": text}]

    if options.input is None:
        for piece in model.stream(as_prompt(options.prompt), **given):
            say(piece.text, end="", flush=True)
        return say()
    from qwen_moe_jax.generation.json_lines import run_file

    cache = not options.no_prefix_cache
    with model.engine(options.max_rows, options.memory, prefix_cache=cache) as engine:
        written, there = run_file(
            engine,
            options.input,
            options.output,
            options=given,
            as_prompt=as_prompt,
            progress=sys.stderr.isatty(),
        )
    kept = f" ({there} were there)" if there else ""
    say(f"wrote {written} replies to {options.output}{kept}")


def _chat(options: argparse.Namespace) -> None:
    from qwen_moe_jax.generation.terminal import chat

    given = _options_of(options)
    model = load_model(options.model, options)
    chat(model, system=options.system, options=given)


def _serve(options: argparse.Namespace) -> None:
    server.check(options)
    server.serve(load_model(options.model, options), options)

"""Many prompts from a file and their replies into one, a JSON object a line; after any end it can go on.

A reply is written as one line when it is there, in the order of ending. What a process that was killed has
written counts: a last line without its end is cut off, and prompts whose replies are there are not run again.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.engine import Engine
from qwen_moe_jax.generation.results import GenerationOutput
from qwen_moe_jax.parallel.processes import of_the_first

_KEYS = ("id", "prompt", "messages", "options")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A line of the input.

    Attributes:
        number: of the line, from 1.
        id: its own, or the line's number.
        prompt: a text, chat messages, or token ids.
        options: of its generation.
    """

    number: int
    id: str | int
    prompt: Any
    options: Mapping[str, Any]


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The lines of a file, empty ones left out.

    Raises:
        InputError: a line that is no JSON object, holds other keys than "id", "prompt" or "messages", and
            "options", or both prompt and messages; or an id that two lines have.
    """
    found: list[PromptLine] = []
    seen: dict[str | int, int] = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            line = _parsed(text, f"line {number} of {path}", number)
            if line.id in seen:
                raise InputError(
                    f"line {number} of {path} has the id {line.id!r}, as line {seen[line.id]} has; give each "
                    "its own, or none."
                )
            seen[line.id] = number
            found.append(line)
    if not found:
        raise InputError(f"{path} holds no prompts; expected a JSON object a line.")
    return found


def _parsed(text: str, where: str, number: int) -> PromptLine:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is no JSON ({error}).") from None
    if not isinstance(given, dict):
        raise InputError(f"{where} is a {type(given).__name__}; expected an object with prompt or messages.")
    unknown = sorted(set(given) - set(_KEYS))
    if unknown:
        raise InputError(f"{where} has the key {unknown[0]!r}; expected {', '.join(_KEYS)}.")
    if ("prompt" in given) == ("messages" in given):
        raise InputError(f"{where} has {'both' if 'prompt' in given else 'neither'} prompt and messages.")
    identity = given.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise InputError(f"{where} has the id {identity!r}; expected a text or an integer.")
    options = given.get("options", {})
    if not isinstance(options, dict):
        raise InputError(f"{where} has options of type {type(options).__name__}; expected an object.")
    bias = options.get("logit_bias")
    if isinstance(bias, dict):  # JSON has texts as keys
        numbers = {int(key) if key.isdecimal() else key: value for key, value in bias.items()}
        options = {**options, "logit_bias": numbers}
    return PromptLine(number, identity, given.get("prompt", given.get("messages")), options)


class Replies:
    """The file of replies, open for one process; use it with `with`.

    Attributes:
        done: ids whose replies it holds.
    """

    def __init__(self, path: str | Path, prompts: list[PromptLine]):
        """Opens the file, or makes it, and cuts off a line that was not finished.

        Raises:
            InputError: another process writes to it, or it holds replies to other prompts.
        """
        self._path = path
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"another process writes to {path}; wait for it, or give another output."
            ) from None
        self.done = self._read({prompt.id for prompt in prompts})

    def __enter__(self) -> "Replies":
        """For `with`, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self._file.close()

    def _read(self, wanted: set[str | int]) -> set[str | int]:
        self._file.seek(0)
        done: set[str | int] = set()
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                identity = json.loads(line)["id"]
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"line {number} of {self._path} is no reply of this command; give another output."
                ) from None
            if identity not in wanted:
                raise InputError(
                    f"{self._path} holds a reply to {identity!r}, which is not in the input; give another "
                    "output, or the input that it belongs to."
                )
            done.add(identity)
            whole += len(line)
        self._file.truncate(whole)
        return done

    def add(self, prompt: PromptLine, out: GenerationOutput) -> None:
        """Writes a reply, in one piece."""
        reply: dict[str, Any] = {"id": prompt.id}
        several = len(out.sequences) > 1
        if out.texts is not None:
            reply |= {"texts": out.texts} if several else {"text": out.texts[0]}
        else:
            reply |= {"sequences": out.sequences} if several else {"sequence": out.sequences[0]}
        reply |= (
            {"finish_reasons": out.finish_reasons} if several else {"finish_reason": out.finish_reasons[0]}
        )
        if out.messages is not None and any(set(m) > {"role", "content"} for m in out.messages):
            reply |= {"messages": out.messages} if several else {"message": out.messages[0]}
        if out.logprobs is not None:
            reply["logprobs"] = out.logprobs if several else out.logprobs[0]
        reply["usage"] = {
            name: getattr(out.usage, name)
            for name in ("prompt_tokens", "cached_prompt_tokens", "generated_tokens")
        }
        os.write(self._file.fileno(), (json.dumps(reply, ensure_ascii=False) + "\n").encode())


def run_file(
    engine: Engine,
    source: str | Path,
    destination: str | Path,
    *,
    options: Mapping[str, Any],
    as_prompt: Callable[[Any], Any],
    progress: bool = False,
) -> tuple[int, int]:
    """Replies to all prompts of a file that have none yet. Of several processes the first one writes.

    Args:
        engine: that runs them.
        source: JSON lines, as of `read_prompts`.
        destination: where the replies go; gone on with if it is there.
        options: of lines that say nothing else.
        as_prompt: what a line's prompt becomes.
        progress: shows a bar on stderr.

    Returns:
        (replies written now, replies that were there).

    Raises:
        InputError: as of `read_prompts`, `Replies` and `Engine.run`.
    """
    prompts, first = read_prompts(source), jax.process_index() == 0
    with Replies(destination, prompts) if first else contextlib.nullcontext() as replies:
        done = np.asarray([replies is not None and p.id in replies.done for p in prompts], np.int32)
        done = of_the_first(done)
        open_ones = [prompt for prompt, there in zip(prompts, done, strict=True) if not there]
        found = engine.run(
            [as_prompt(prompt.prompt) for prompt in open_ones],
            [{**options, **prompt.options} for prompt in open_ones],
            names=[f"line {prompt.number} of {source}" for prompt in open_ones],
            progress=progress,
        )
        for index, out in found:
            if replies is not None:
                replies.add(open_ones[index], out)
        return len(open_ones), len(prompts) - len(open_ones)

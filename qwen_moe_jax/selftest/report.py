"""Parts of a selftest, run one after the other, and what they found."""

import dataclasses
import datetime
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_moe_jax.errors import QwenMoeError

OK, FAILED, SKIPPED, UNFINISHED = "ok", "failed", "skipped", "unfinished"
# Of the report's JSON; another number means that fields changed their meaning.
FORMAT = 1


class Skip(Exception):
    """Raised by a part that does not apply here; its message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a part found.

    Attributes:
        summary: in a line.
        details: what JSON can hold, and numbers of NumPy.
        ok: whether it is as it has to be.
    """

    summary: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ok: bool = True


# Its name, and what runs it.
Part = tuple[str, Callable[[], Outcome]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartReport:
    """How a part went.

    Attributes:
        name: of the part.
        status: "ok", "failed", "skipped", or "unfinished" for the one that runs, or never came back.
        seconds: it took, compilation included.
        summary: in a line; of a skipped part the reason, of one that raised what the exception says.
        details: all numbers, as JSON has them; of one that raised its traceback.
    """

    name: str
    status: str
    seconds: float
    summary: str
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestReport:
    """What a selftest found; `str()` is a table of its parts.

    Attributes:
        started: when, in UTC.
        checkpoint: name of the checkpoint's folder.
        parts: in the order they ran.
    """

    started: str
    checkpoint: str
    parts: tuple[PartReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every part is ok or skipped for a reason."""
        return all(part.status in (OK, SKIPPED) for part in self.parts)

    def part(self, name: str) -> PartReport:
        """The part of that name.

        Raises:
            KeyError: there is none.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"format": FORMAT, "ok": self.ok, **dataclasses.asdict(self), "parts": self._parts()}

    def _parts(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(part) for part in self.parts]

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "SelftestReport":
        """What `to_json` gave.

        Raises:
            ValueError: it did not, or of another format.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"this is no selftest report of format {FORMAT}.")
        parts = tuple(PartReport(**part) for part in found["parts"])
        return cls(started=found["started"], checkpoint=found["checkpoint"], parts=parts)

    def __str__(self) -> str:
        width = max((len(part.name) for part in self.parts), default=0)
        lines = [
            f"{part.name:<{width}}  {part.status:<10} {part.seconds:5.1f} s  {part.summary}"
            for part in self.parts
        ]
        counts = [
            f"{count} {status}"
            for status in (OK, SKIPPED, FAILED, UNFINISHED)
            if (count := sum(part.status == status for part in self.parts))
        ]
        verdict = "passed" if self.ok else "FAILED"
        return "\n".join([f"selftest on {self.checkpoint}", *lines, f"{verdict}: {', '.join(counts)}"])


def run_parts(
    parts: Sequence[Part],
    *,
    checkpoint: str,
    skip: Sequence[str] = (),
    output: Path | None = None,
    progress: bool = False,
) -> SelftestReport:
    """Runs parts, each caught by itself.

    Args:
        parts: in order.
        checkpoint: name of the checkpoint's folder.
        skip: names of parts that are not to run.
        output: a file that has the report as JSON. It is written before each part, too, with that part as
            "unfinished": a driver or compiler that takes the process with it leaves its name behind.
        progress: show a bar on standard error.

    Raises:
        OSError: `output` cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    done: list[PartReport] = []

    def report(*more: PartReport) -> SelftestReport:
        found = SelftestReport(started=now, checkpoint=checkpoint, parts=(*done, *more))
        if output is not None:
            _write(output, found.to_json() + "\n")
        return found

    bar = tqdm(parts, disable=not progress, bar_format="{n_fmt}/{total_fmt} [{elapsed}] {desc}")
    for name, function in bar:
        bar.set_description_str(name)
        report(PartReport(name=name, status=UNFINISHED, seconds=0, summary="it did not end", details={}))
        if name in skip:
            done.append(PartReport(name=name, status=SKIPPED, seconds=0, summary="asked for", details={}))
        else:
            done.append(_run(name, function))
    return report()


def _run(name: str, function: Callable[[], Outcome]) -> PartReport:
    started = time.perf_counter()
    details: Mapping[str, Any] = {}
    try:
        outcome = function()
        status, summary, details = OK if outcome.ok else FAILED, outcome.summary, outcome.details
    except Skip as reason:
        status, summary = SKIPPED, str(reason)
    except Exception as error:  # whatever it is, the other parts have something to say
        status, summary = FAILED, sentence(error)
        details = {"traceback": traceback.format_exc()}
    seconds = time.perf_counter() - started
    return PartReport(
        name=name, status=status, seconds=round(seconds, 3), summary=summary, details=as_json(dict(details))
    )


def sentence(error: Exception) -> str:
    """An exception in a line; compilers' messages have pages."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return first if isinstance(error, QwenMoeError) else f"{type(error).__name__}: {first}"


def as_json(value: Any) -> Any:
    """Dictionaries, lists, strings and numbers; what JSON has no number for is "nan", "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [as_json(each) for each in value]
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _write(file: Path, text: str) -> None:
    """All of it or nothing."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)

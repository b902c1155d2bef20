"""The model on this device against plain XLA, and against what is stored of its checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.selftest.models import PLAIN, TABLE, Models
from qwen_moe_jax.selftest.report import Outcome, Skip

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """For logits that are computed in two ways.

    Differences are relative, root mean square over root mean square. That over all positions notices a few
    that are wrong, and a token that goes to another expert because two tie weighs little in it. The median
    notices what is a little wrong everywhere, and does not see such ties at all.

    Attributes:
        median: of the difference of a position.
        overall: of all positions together.
    """

    median: float
    overall: float


# Seen on abacus, on CPU, median and overall, between forms of one operation: float32 2e-7 and 2e-7, bfloat16
# 3e-3 and 4e-3 (bfloat16 against float32 2e-3 and 9e-3). Of mistakes, in float32: the shared expert 1 % too
# large 9e-4 and 5e-3, one expert of one layer silent 7e-4 and 9e-3, the shared expert counted twice 8e-2 and
# 1e-1. The tolerances lie between, nearer to the mistakes: deeper models round more often.
TOLERANCES = {
    "float32": Tolerance(median=1e-5, overall=2e-3),
    "bfloat16": Tolerance(median=2e-2, overall=4e-2),
}
# A token may be another one where the two are that close in plain XLA, over the root mean square of the
# logits: twice four times the median's tolerance, for two logits each far out in their distribution.
TIE = {dtype: 8 * tolerance.median for dtype, tolerance in TOLERANCES.items()}


def against_plain(models: Models, dtype: str) -> Outcome:
    """Greedy continuations and logits of what the table picks, against plain XLA on the same device."""
    plain = models.load(dtype, PLAIN)
    wanted_tokens = plain.generate(models.prompts, max_new_tokens=models.new_tokens).sequences
    rows = [[*prompt, *tokens] for prompt, tokens in zip(models.prompts, wanted_tokens, strict=True)]
    wanted = np.asarray(plain.logits(rows))
    del plain
    model = models.load(dtype, TABLE)
    found_tokens = model.generate(models.prompts, max_new_tokens=models.new_tokens).sequences
    found = np.asarray(model.logits(rows))

    mask = np.arange(wanted.shape[1]) < np.array([len(row) for row in rows])[:, None]
    median, overall = difference(found[mask], wanted[mask])
    tolerance = TOLERANCES[dtype]
    same, ties, wrong = 0, 0, []
    for number, prompt in enumerate(models.prompts):
        ours, theirs = found_tokens[number], wanted_tokens[number]
        step = first_difference(ours, theirs)
        if step is None:
            same += 1
            continue
        margin = _margin(wanted[number, len(prompt) - 1 + step], ours, theirs, step)
        if margin <= TIE[dtype]:
            ties += 1
        else:
            wrong.append({"row": number, "step": step, "margin": margin})
    # where the table has plain XLA only, its form that computes every expert
    said = "plain XLA" if models.plain == "xla" else "every expert on every token"
    tied = f" and {ties} up to a tie" if ties else ""
    return Outcome(
        ok=median <= tolerance.median and overall <= tolerance.overall and not wrong,
        summary=f"{same} of {len(rows)} continuations equal{tied}; logits differ by {median:.1e} (median), "
        f"{overall:.1e} (overall) from {said}",
        details={
            "plain": models.plain,
            "rows": len(rows),
            "same": same,
            "ties": ties,
            "wrong": wrong,
            "tie": TIE[dtype],
            **_differences(median, overall, tolerance),
        },
    )


def against_stored(models: Models, dtype: str) -> Outcome:
    """What the table picks, against the stored continuations and logits, which are float32 of a CPU."""
    stored = models.expectations
    if stored is None:
        raise Skip(models.why_none)
    model = models.load(dtype, TABLE)
    found_tokens = model.generate(models.prompts, max_new_tokens=models.new_tokens).sequences
    rows = [[*row.prompt, *row.tokens] for row in stored.rows]
    logits = np.asarray(model.logits(rows))
    tolerance = TOLERANCES[dtype]
    same = [found == list(row.tokens) for found, row in zip(found_tokens, stored.rows, strict=True)]
    found, wanted = [], []
    for number, row in enumerate(stored.rows):
        for position in row.positions:
            found.append(logits[number, position.index, list(position.ids)])
            wanted.append(np.array(position.logits))
    median, overall = difference(np.stack(found), np.stack(wanted))
    return Outcome(
        ok=all(same) and median <= tolerance.median and overall <= tolerance.overall,
        summary=f"{sum(same)} of {len(rows)} continuations equal; logits differ by {median:.1e} (median), "
        f"{overall:.1e} (overall) from float32 of a CPU",
        details={
            "weights_sha256": stored.weights_sha256,
            "margin": stored.margin,
            "same": same,
            **_differences(median, overall, tolerance),
        },
    )


def difference(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """(median over positions, overall) of the relative difference of logits [positions, ids]."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    squares, sizes = ((found - wanted) ** 2).mean(axis=1), (wanted**2).mean(axis=1)
    return float(np.median(np.sqrt(squares / sizes))), float(np.sqrt(squares.mean() / sizes.mean()))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two sequences differ, or None; one may go on where the other ends."""
    for place, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))


def _margin(logits: np.ndarray, ours: Sequence[int], theirs: Sequence[int], step: int) -> float:
    """By how much the token that plain XLA took is ahead of ours, in root mean squares of the logits."""
    if step >= min(len(ours), len(theirs)):  # the same tokens, but one did not end
        return float("inf")
    gap = logits[theirs[step]] - logits[ours[step]]
    return float(gap / np.sqrt((logits.astype(np.float64) ** 2).mean()))


def _differences(median: float, overall: float, tolerance: Tolerance) -> dict[str, Any]:
    return {
        "median_difference": median,
        "overall_difference": overall,
        "tolerance": dataclasses.asdict(tolerance),
    }

"""Drafts of multi-token prediction: what the device knows of them, and when a row makes any.

A step that verifies k drafts of a row costs more than one that decodes a token, and gives up to k + 1 tokens.
So each row keeps a running mean of what its verified steps gave. Where that falls below what such a step has
to give, the row *rests*: it decodes token by token, and tries again later, each time after twice as long.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels

# Tokens that a step with drafts has to give on average, for what it costs beside a step without; by target.
# Measured on a CPU (`benchmarks/README.md`, "Drafts"); reasoned from bytes elsewhere.
_WORTH = {"cpu": 1.6}
_WORTH_ELSEWHERE = 1.25
# Drafts a step, where nobody says how many. A CPU drafts only when it is told to: the programs take twice as
# long to compile, which a short job would wait for (measured, there).
_DRAFTS = {"cpu": 0}
_DRAFTS_ELSEWHERE = 3
MOST_DRAFTS = 8
# Weight of the latest step in the mean.
_LATEST = 0.2
# What a row's mean begins with, above what it has to reach: two steps without a draft that holds end it.
_CREDIT = 0.4
# Tokens of the first rest, and of the longest.
_FIRST_REST, _LONGEST_REST = 32, 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """What is known of rows' drafts, one entry a row (in a step) or a slot (between steps)."""

    tokens: jax.Array  # [rows, k] int32, to be verified next
    count: jax.Array  # [rows] int32, how many of them there are
    mean: jax.Array  # [rows] float32, running mean of the tokens that a step with drafts gave
    rest: jax.Array  # [rows] int32, tokens to decode without drafts
    next_rest: jax.Array  # [rows] int32


def check_drafts(asked: Any) -> None:
    """Raises InputError unless it is a number of drafts a step."""
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked <= MOST_DRAFTS:
        raise InputError(f"draft_tokens is {asked!r}; expected 0 to {MOST_DRAFTS}.")


def default_drafts(kernels: Kernels) -> int:
    """Drafts a step where nobody says how many."""
    return _DRAFTS.get(kernels.target, _DRAFTS_ELSEWHERE)


def worth_of(kernels: Kernels) -> float:
    """Tokens that a step with drafts has to give on average."""
    return _WORTH.get(kernels.target, _WORTH_ELSEWHERE)


def no_drafts(rows: int, most: int, worth: float) -> Drafts:
    """Of rows that begin; arrays of the host.

    Args:
        rows: how many.
        most: k.
        worth: tokens that a step with drafts has to give on average.
    """
    arrays: Any = (
        np.zeros((rows, most), np.int32),
        np.zeros(rows, np.int32),
        np.full(rows, worth + _CREDIT, np.float32),
        np.zeros(rows, np.int32),
        np.full(rows, _FIRST_REST, np.int32),
    )
    return Drafts(*arrays)


def after_step(drafts: Drafts, used: jax.Array, emitted: jax.Array, worth: float) -> Drafts:
    """Whether a row goes on drafting: the rule.

    Args:
        drafts: before the step.
        used: int32 [rows], drafts that were verified.
        emitted: int32 [rows], tokens that the step gave.
        worth: tokens that a step with drafts has to give on average.

    Returns:
        the same drafts, with mean and rests after the step; unchanged where nothing was verified.
    """
    # A row that had fewer drafts than it makes could not give more: that says nothing against it.
    short = (used < drafts.tokens.shape[1]) & (emitted > used)
    counts = (used > 0) & (emitted > 0) & ~short
    mean = jnp.where(counts, drafts.mean + _LATEST * (emitted - drafts.mean), drafts.mean)
    stops = counts & (mean < worth)
    goes_well = mean > worth + _CREDIT
    longer = jnp.minimum(2 * drafts.next_rest, _LONGEST_REST)
    return dataclasses.replace(
        drafts,
        mean=jnp.where(stops, worth + _CREDIT, mean),
        rest=jnp.where(stops, drafts.next_rest, drafts.rest),
        next_rest=jnp.where(stops, longer, jnp.where(goes_well, _FIRST_REST, drafts.next_rest)),
    )


def after_token(drafts: Drafts, running: jax.Array) -> Drafts:
    """After a token that was decoded without drafts; what was drafted before it is of no use."""
    return dataclasses.replace(
        drafts, rest=jnp.maximum(drafts.rest - running, 0), count=jnp.where(running > 0, 0, drafts.count)
    )

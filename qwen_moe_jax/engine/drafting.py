"""Drafts of multi-token prediction: what the device knows of them, and when a row makes any.

A step that verifies k drafts of a row costs more than one that decodes a token, and gives up to k + 1 tokens.
So each row keeps a running mean of its *gain*: the tokens of a step with drafts, less what the step costs.
Where that falls below zero, the row *rests*: it decodes token by token, and tries again later, each time
after twice as long.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels

# What a draft adds to a step's cost, its making included, over a step without; by target. Measured on a CPU
# (`benchmarks/README.md`, "Drafts"); reasoned from bytes elsewhere (`plan --draft-tokens`).
_DRAFT_COST = {"cpu": 0.45}
_DRAFT_COST_ELSEWHERE = 0.15
# Drafts a step, where nobody says how many. A CPU drafts only when it is told to: the programs take twice as
# long to compile, which a short job would wait for (measured, there).
_DRAFTS = {"cpu": 0}
_DRAFTS_ELSEWHERE = 3
MOST_DRAFTS = 8
# Weight of the latest step in the mean.
_LATEST = 0.12
# What a row's mean begins with, for each draft: three steps without a draft that holds end it. After a rest
# one does.
_CREDIT, _CREDIT_AFTER_REST = 0.2, 0.1
# Tokens of the first rest, and of the longest.
_FIRST_REST, _LONGEST_REST = 128, 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """What is known of rows' drafts, one entry a row (in a step) or a slot (between steps)."""

    tokens: jax.Array  # [rows, k] int32, to be verified next
    count: jax.Array  # [rows] int32, how many of them there are
    gain: jax.Array  # [rows] float32, running mean of a step's tokens less its cost in steps without drafts
    rest: jax.Array  # [rows] int32, tokens to decode without drafts
    next_rest: jax.Array  # [rows] int32


def check_drafts(asked: Any) -> None:
    """Raises InputError unless it is a number of drafts a step."""
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked <= MOST_DRAFTS:
        raise InputError(f"draft_tokens is {asked!r}; expected 0 to {MOST_DRAFTS}.")


def default_drafts(kernels: Kernels) -> int:
    """Drafts a step where nobody says how many."""
    return _DRAFTS.get(kernels.target, _DRAFTS_ELSEWHERE)


def draft_cost(kernels: Kernels) -> float:
    """What a draft adds to a step's cost, in steps without drafts."""
    return _DRAFT_COST.get(kernels.target, _DRAFT_COST_ELSEWHERE)


def no_drafts(rows: int, most: int) -> Drafts:
    """Of rows that begin; arrays of the host.

    Args:
        rows: how many.
        most: k.
    """
    arrays: Any = (
        np.zeros((rows, most), np.int32),
        np.zeros(rows, np.int32),
        np.full(rows, _CREDIT * most, np.float32),
        np.zeros(rows, np.int32),
        np.full(rows, _FIRST_REST, np.int32),
    )
    return Drafts(*arrays)


def after_step(drafts: Drafts, used: jax.Array, emitted: jax.Array, cost: float) -> Drafts:
    """Whether a row goes on drafting: the rule.

    Args:
        drafts: before the step.
        used: int32 [rows], drafts that were verified.
        emitted: int32 [rows], tokens that the step gave.
        cost: of a draft, in steps without.

    Returns:
        the same drafts, with gain and rests after the step; unchanged where nothing was verified.
    """
    counts = (used > 0) & (emitted > 0)
    gained = emitted - (1 + cost * used)
    gain = jnp.where(counts, drafts.gain + _LATEST * (gained - drafts.gain), drafts.gain)
    stops = counts & (gain < 0)
    goes_well = gain > _CREDIT * drafts.tokens.shape[1]
    longer = jnp.minimum(2 * drafts.next_rest, _LONGEST_REST)
    return dataclasses.replace(
        drafts,
        gain=jnp.where(stops, _CREDIT_AFTER_REST, gain),
        rest=jnp.where(stops, drafts.next_rest, drafts.rest),
        next_rest=jnp.where(stops, longer, jnp.where(goes_well, _FIRST_REST, drafts.next_rest)),
    )


def after_token(drafts: Drafts, running: jax.Array) -> Drafts:
    """After a token that was decoded without drafts; what was drafted before it is of no use."""
    return dataclasses.replace(
        drafts, rest=jnp.maximum(drafts.rest - running, 0), count=jnp.where(running > 0, 0, drafts.count)
    )

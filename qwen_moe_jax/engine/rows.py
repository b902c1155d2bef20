"""What the device is told of the rows of a decode step, what it keeps of them, and what it says."""

import dataclasses
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.engine.drafting import Drafts, no_drafts
from qwen_moe_jax.engine.sampling import SamplingParams
from qwen_moe_jax.formats.cache import DeltaNetCache, LayerCache

Layers = tuple[LayerCache, ...]
States = tuple[DeltaNetCache, ...]

BLOCK_STEPS = 16  # most forward passes in one device call
MOVES = 8  # states that one call moves on a data rank, at most
NO_PLACE = 1 << 30  # of a snapshot
LIKELIEST = 20  # tokens whose log-probabilities a guided step says, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowStates:
    """What the device knows of rows: in a step those of the step, between steps one entry for each slot. Both
    are of each data rank, one behind the other, and lie on that rank."""

    token: jax.Array  # [rows] int32: chosen, or the last one of the prompt, and not yet in the caches
    length: jax.Array  # [rows] int32, tokens in the caches
    emitted: jax.Array  # [rows] int32, tokens chosen so far
    finished: jax.Array  # [rows] bool
    drafts: Drafts | None  # None where nothing is drafted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """Rows that begin to decode with this step: what the host says of them, for all rows of the step.

    Where `begins` is false, the rest means nothing.
    """

    begins: jax.Array  # [rows] bool
    token: jax.Array  # [rows] int32
    length: jax.Array  # [rows] int32
    emitted: jax.Array  # [rows] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Roster:
    """The rows of a decode step: as many of each data rank, one rank behind the other."""

    slots: jax.Array  # [rows] int32, on the row's data rank; their number there for none
    limit: jax.Array  # [rows] int32, most tokens to emit
    end_ids: jax.Array  # [rows, MOST_ENDS] int32, -1 where there are fewer
    draft_limit: jax.Array  # [rows] int32, most drafts a step
    places: jax.Array  # [rows, BORDERS] int32, for snapshots at page borders, in turns; NO_PLACE for none
    sampling: SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRows:
    """What the host says of a decode step."""

    roster: Roster  # its rows
    entries: Entries  # of those that begin
    tables: jax.Array  # [slots, width] int32, the pages of every row
    capacity: jax.Array  # [slots] int32, tokens that every row has pages for; a row without room waits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """What one call emitted: row b's first `count[b]` entries."""

    tokens: jax.Array  # [rows, passes * (drafts + 1)] int32
    logprobs: jax.Array  # [rows, passes * (drafts + 1)] float32
    count: jax.Array  # [rows] int32
    drafted: jax.Array  # [rows] int32, drafts that were verified
    accepted: jax.Array  # [rows] int32, of these, those that hold
    drafts: jax.Array | None  # [rows, drafts] int32, that the next pass verifies
    # of guided steps, where somebody asks for them: the likeliest tokens behind each, best first
    likeliest: jax.Array | None = None  # [rows, drafts + 1, LIKELIEST] int32
    likeliest_logprobs: jax.Array | None = None  # [rows, drafts + 1, LIKELIEST] float32


def empty_states(slots: int, draft_tokens: int = 0) -> RowStates:
    """No row has begun; arrays of the host, equal in all processes.

    Args:
        slots: of all data ranks.
        draft_tokens: most drafts a step; 0 for a model without drafter.
    """
    token, length, emitted = (np.zeros(slots, np.int32) for _ in range(3))
    drafts = no_drafts(slots, draft_tokens) if draft_tokens else None
    arrays: Any = token, length, emitted, np.ones(slots, bool), drafts
    return RowStates(*arrays)

"""The steps that run on the device: chunks of prompts into the pools, decoding, and moves of states.

Every step takes the pools (and is donated them) and returns the next ones. A step names the rows it is about;
all other rows' pages and slots stay as they are. Nothing here knows text, or why a row is where it is.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.sampling import SamplingParams, choose_tokens, log_probabilities, most_likely
from qwen_moe_jax.formats.cache import DeltaNetCache, HybridCache, LayerCache, Placement

BLOCK_STEPS = 16  # most decode steps in one device call
END_IDS = 8  # end tokens that the device looks for in a row; the host looks for all of them
MOVES = 8  # states that one call moves on a data rank, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowStates:
    """What the device knows of the rows, an entry for each slot of all data ranks; equal on every device."""

    token: jax.Array  # [slots] int32: chosen, or the last one of the prompt, and not yet in the caches
    length: jax.Array  # [slots] int32, tokens in the caches
    emitted: jax.Array  # [slots] int32, tokens chosen so far
    finished: jax.Array  # [slots] bool


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

    rows: jax.Array  # [rows] int32, places in `RowStates`; their number for none
    slots: jax.Array  # [rows] int32, on the row's data rank; their number there for none
    limit: jax.Array  # [rows] int32, most tokens to emit
    end_ids: jax.Array  # [rows, END_IDS] int32, -1 where there are fewer
    sampling: SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """What one call emitted: row b's first `count[b]` entries."""

    tokens: jax.Array  # [rows, BLOCK_STEPS] int32
    logprobs: jax.Array  # [rows, BLOCK_STEPS] float32
    count: jax.Array  # [rows] int32


Layers = tuple[LayerCache, ...]
States = tuple[DeltaNetCache, ...]


class Steps:
    """The compiled steps of one model.

    Attributes:
        forward: the model.
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        jit = partial(jax.jit, compiler_options=forward.kernels.compiler_options)
        self._prefill = jit(partial(_prefill, forward), donate_argnames="layers")
        self._decode = jit(partial(_decode, forward), donate_argnames=("layers", "states", "seen"))
        self._move = jit(forward.move_states, donate_argnums=0)
        self._remember = jit(partial(_remember, forward), donate_argnames="seen")

    @property
    def compiled_programs(self) -> int:
        """How many there are so far."""
        functions: tuple[Any, ...] = (self._prefill, self._decode, self._move, self._remember)
        return sum(function._cache_size() for function in functions)

    def prefill(
        self, layers: Layers, tokens: np.ndarray, counts: np.ndarray, placed: Placement
    ) -> tuple[Layers, jax.Array]:
        """Prompt tokens into the pools.

        Args:
            layers: the pools.
            tokens: int32 [rows, chunk]: rows of each data rank, one rank behind the other.
            counts: int32 [rows], tokens of a row; the rest of it are pads.
            placed: where they lie.

        Returns:
            (the pools, how many tokens there were: something to wait for).
        """
        return self._prefill(
            self.forward.parameters, layers=layers, tokens=tokens, counts=counts, placed=placed
        )

    def decode(
        self,
        layers: Layers,
        states: RowStates,
        seen: jax.Array | None,
        *,
        roster: Roster,
        entries: Entries,
        tables: Any,
        steps: int,
    ) -> tuple[Layers, RowStates, jax.Array | None, Block]:
        """Up to `steps` (at most BLOCK_STEPS) tokens of each row; fewer when all rows have finished.

        Args:
            layers: the pools.
            states: of all rows.
            seen: int32 [slots, vocab], the `sampling.history` of every row that penalties count for; None if
                every row of the step takes the most likely token without penalties: then nothing else is
                compiled.
            roster: the rows of this step.
            entries: what the host says of those that begin.
            tables: int32 [slots, width], the pages of every row.
            steps: at least one.

        Returns:
            (pools, states, seen, what was emitted).
        """
        return self._decode(
            self.forward.parameters,
            layers=layers,
            states=states,
            seen=seen,
            roster=roster,
            entries=entries,
            tables=tables,
            steps=np.int32(steps),
        )

    def move(self, to: States, given: States, places: np.ndarray, sources: np.ndarray) -> States:
        """Recurrent states from one pool to another, as of `formats.cache.move_states`; `to` is donated.

        Args:
            to, given: pools of states, a layer each.
            places, sources: int32 [ranks * MOVES], a list of each data rank.
        """
        return self._move(to, given, places, sources)

    def remember(self, seen: jax.Array, row: int, history: np.ndarray) -> jax.Array:
        """What penalties count, with a row's history [vocab]."""
        return self._remember(seen=seen, row=np.int32(row), history=history)

    def lower_prefill(
        self, layers: Layers, tokens: Any, counts: Any, placed: Placement
    ) -> jax.stages.Lowered:
        """The program of `prefill`, of arguments without values."""
        return self._prefill.lower(
            self.forward.parameters, layers=layers, tokens=tokens, counts=counts, placed=placed
        )

    def lower_decode(
        self, layers: Layers, states: RowStates, roster: Roster, entries: Entries, tables: Any
    ) -> jax.stages.Lowered:
        """The program of `decode` for greedy rows, of arguments without values."""
        return self._decode.lower(
            self.forward.parameters,
            layers=layers,
            states=states,
            seen=None,
            roster=roster,
            entries=entries,
            tables=tables,
            steps=jax.ShapeDtypeStruct((), jnp.int32),
        )


def empty_states(slots: int) -> RowStates:
    """No row has begun; arrays of the host, equal in all processes."""
    token, length, emitted = (np.zeros(slots, np.int32) for _ in range(3))
    arrays: Any = token, length, emitted, np.ones(slots, bool)
    return RowStates(*arrays)


def _prefill(model: Forward, params, *, layers: Layers, tokens, counts, placed: Placement):
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32) < counts[:, None]
    # The hidden states are not looked at, so that the compiler drops what only they need: the last layer's
    # experts and the final norm.
    _, cache = model.hidden(params, tokens, valid, HybridCache(layers, placed))
    return cache.layers, model.everywhere(counts.sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a decode step, while it runs."""

    layers: Layers
    token: jax.Array
    length: jax.Array
    emitted: jax.Array
    finished: jax.Array
    seen: jax.Array | None


def _decode(
    model: Forward,
    params,
    *,
    layers: Layers,
    states: RowStates,
    seen: jax.Array | None,
    roster: Roster,
    entries: Entries,
    tables,
    steps,
):
    slots = states.token.shape[0]
    index = roster.rows
    held = index < slots
    begins = entries.begins

    def of_row(kept, given):
        return jnp.where(begins, given, kept.at[index].get(mode="clip"))

    start = _Rows(
        layers=layers,
        token=of_row(states.token, entries.token),
        length=jnp.where(held, of_row(states.length, entries.length), 0),
        emitted=of_row(states.emitted, entries.emitted),
        finished=of_row(states.finished, jnp.zeros_like(held)) | ~held,
        seen=seen,
    )
    table = tables.at[index].get(mode="clip")

    def one_step(carry):
        step, rows, tokens, logprobs = carry
        running = ~rows.finished
        placed = Placement(tables=table, slots=roster.slots, length=rows.length)
        # a finished row feeds a pad: its caches stand still
        hidden, cache = model.hidden(
            params, rows.token[:, None], running[:, None], HybridCache(rows.layers, placed)
        )
        logits = model.logits(params, hidden[:, 0])
        with jax.named_scope("sampling"):
            seen = rows.seen
            if seen is None:
                chosen = most_likely(logits)
            else:
                own = seen.at[index].get(mode="clip")
                chosen = choose_tokens(logits, roster.sampling, rows.emitted, own)
            logprob = log_probabilities(logits, chosen)
            # Rows are divided among data ranks up to here. Everything else that is known of them is the same
            # on every device, so that a step has this one exchange more, and no two that could overtake each
            # other.
            both = jnp.stack([chosen, lax.bitcast_convert_type(logprob, jnp.int32)])
            chosen, logprob = model.everywhere(both)
            logprob = lax.bitcast_convert_type(logprob, jnp.float32)
            if seen is not None:
                seen = seen.at[index, chosen].add(running.astype(jnp.int32), mode="drop")
        emitted = rows.emitted + running.astype(jnp.int32)
        ends = (chosen[:, None] == roster.end_ids).any(axis=1) | (emitted >= roster.limit)
        rows = _Rows(
            layers=cache.layers,
            token=jnp.where(running, chosen, rows.token),
            length=rows.length + running.astype(jnp.int32),
            emitted=emitted,
            finished=rows.finished | ends,
            seen=seen,
        )
        tokens = lax.dynamic_update_index_in_dim(tokens, rows.token, step, axis=1)
        logprobs = lax.dynamic_update_index_in_dim(logprobs, logprob, step, axis=1)
        return step + 1, rows, tokens, logprobs

    def unfinished(carry):
        step, rows, _, _ = carry
        return (step < steps) & ~rows.finished.all()

    batch = index.shape[0]
    nothing = (
        jnp.int32(0),
        start,
        jnp.zeros((batch, BLOCK_STEPS), jnp.int32),
        jnp.zeros((batch, BLOCK_STEPS), jnp.float32),
    )
    _, rows, tokens, logprobs = lax.while_loop(unfinished, one_step, nothing)

    def to_row(kept, value):
        return kept.at[index].set(value, mode="drop")

    after = RowStates(
        token=to_row(states.token, rows.token),
        length=to_row(states.length, rows.length),
        emitted=to_row(states.emitted, rows.emitted),
        finished=to_row(states.finished, rows.finished),
    )
    block = Block(tokens=tokens, logprobs=logprobs, count=rows.emitted - start.emitted)
    seen = None if rows.seen is None else model.everywhere(rows.seen)
    return rows.layers, model.everywhere(after), seen, model.everywhere(block)


def _remember(model: Forward, *, seen, row, history) -> jax.Array:
    return model.everywhere(seen.at[row].set(history))

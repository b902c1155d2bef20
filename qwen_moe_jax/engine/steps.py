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
    """What the device knows of rows: in a step those of the step, between steps one entry for each slot. Both
    are of each data rank, one behind the other, and lie on that rank."""

    token: jax.Array  # [rows] int32: chosen, or the last one of the prompt, and not yet in the caches
    length: jax.Array  # [rows] int32, tokens in the caches
    emitted: jax.Array  # [rows] int32, tokens chosen so far
    finished: jax.Array  # [rows] bool


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
            (the pools, something to wait for).
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

    def remember(self, seen: jax.Array, slots: np.ndarray, histories: np.ndarray) -> jax.Array:
        """What penalties count, with other histories.

        Args:
            seen: as of `decode`.
            slots: int32 [ranks], one of each data rank, or their number for none.
            histories: int32 [ranks, vocab].
        """
        return self._remember(seen=seen, slots=slots, histories=histories)

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
    return cache.layers, jnp.zeros((), jnp.int32)


# What is known of rows is computed on the data rank that they lie on, inside of `Forward.by_row`: only tokens
# and log-probabilities are exchanged, all at once at the end. The arguments of these functions are one
# rank's.


def _enter(
    states: RowStates, roster: Roster, entries: Entries, tables: jax.Array
) -> tuple[RowStates, jax.Array]:
    """The rows of a step out of their slots, or as the host says; and their tables."""
    held = roster.slots < states.token.shape[0]

    def of_row(kept: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.where(entries.begins, given, kept.at[roster.slots].get(mode="clip"))

    rows = RowStates(
        token=of_row(states.token, entries.token),
        length=jnp.where(held, of_row(states.length, entries.length), 0),
        emitted=of_row(states.emitted, entries.emitted),
        finished=of_row(states.finished, jnp.zeros_like(held)) | ~held,
    )
    return rows, tables.at[roster.slots].get(mode="clip")


def _choose(
    step: jax.Array,
    logits: jax.Array,
    rows: RowStates,
    roster: Roster,
    seen: jax.Array | None,
    found: jax.Array,
) -> tuple[RowStates, jax.Array | None, jax.Array]:
    """The next token of every row that runs; it is written to `found`, with its log-probability's bits."""
    running = (~rows.finished).astype(jnp.int32)
    if seen is None:
        chosen = most_likely(logits)
    else:
        own = seen.at[roster.slots].get(mode="clip")
        chosen = choose_tokens(logits, roster.sampling, rows.emitted, own)
        seen = seen.at[roster.slots, chosen].add(running, mode="drop")
    bits = lax.bitcast_convert_type(log_probabilities(logits, chosen), jnp.int32)
    found = lax.dynamic_update_index_in_dim(found, jnp.stack([chosen, bits], axis=1), step, axis=1)
    emitted = rows.emitted + running
    ends = (chosen[:, None] == roster.end_ids).any(axis=1) | (emitted >= roster.limit)
    rows = RowStates(
        token=jnp.where(rows.finished, rows.token, chosen),
        length=rows.length + running,
        emitted=emitted,
        finished=rows.finished | ends,
    )
    return rows, seen, found


def _leave(states: RowStates, rows: RowStates, roster: Roster) -> RowStates:
    """The rows of a step back into their slots."""
    return jax.tree.map(lambda kept, value: kept.at[roster.slots].set(value, mode="drop"), states, rows)


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
    start, table = model.by_row(_enter, states, roster, entries, tables)

    def one_step(carry):
        step, layers, rows, seen, found = carry
        placed = Placement(tables=table, slots=roster.slots, length=rows.length)
        # a finished row feeds a pad: its caches stand still
        tokens, running = rows.token[:, None], ~rows.finished[:, None]
        hidden, cache = model.hidden(params, tokens, running, HybridCache(layers, placed))
        logits = model.logits(params, hidden[:, 0])
        with jax.named_scope("sampling"):
            rows, seen, found = model.by_row(_choose, step, logits, rows, roster, seen, found)
        return step + 1, cache.layers, rows, seen, found

    def unfinished(carry):
        step, _, rows, _, _ = carry
        return (step < steps) & ~rows.finished.all()

    nothing = jnp.zeros((roster.slots.shape[0], BLOCK_STEPS, 2), jnp.int32)
    carry = jnp.int32(0), layers, start, seen, model.by_row(lambda found: found, nothing)
    _, layers, rows, seen, found = lax.while_loop(unfinished, one_step, carry)

    def together(found, rows, start):
        count = rows.emitted - start.emitted
        return jnp.concatenate([found.reshape(len(count), -1), count[:, None]], axis=1)

    whole = model.everywhere(model.by_row(together, found, rows, start))
    found = whole[:, :-1].reshape(-1, BLOCK_STEPS, 2)
    block = Block(
        tokens=found[..., 0],
        logprobs=lax.bitcast_convert_type(found[..., 1], jnp.float32),
        count=whole[:, -1],
    )
    return layers, model.by_row(_leave, states, rows, roster), seen, block


def _remember(model: Forward, *, seen, slots, histories) -> jax.Array:
    def write(seen, slots, histories):
        return seen.at[slots].set(histories, mode="drop")

    return model.by_row(write, seen, slots, histories)

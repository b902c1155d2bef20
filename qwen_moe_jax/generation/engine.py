"""Prefill and decode as compiled functions over explicit state.

Nothing here knows text. Every step takes the cache (and is donated it) and returns the next one; the
decode loop runs on the device, several steps a call.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_moe_jax.formats.cache import HybridCache
from qwen_moe_jax.generation.batching import right_pad
from qwen_moe_jax.generation.forward import Forward
from qwen_moe_jax.generation.sampling import (
    SamplingParams,
    SamplingPlan,
    choose_tokens,
    row_keys,
    step_keys,
)
from qwen_moe_jax.generation.shapes import cache_capacity, chunk_length, chunk_spans

BLOCK_STEPS = 16  # most decode steps in one device call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """What choosing tokens needs, one entry a row; constant during a generation."""

    params: SamplingParams
    seeds: jax.Array  # [batch] uint32, of each row's prompt
    sequence_index: jax.Array  # [batch] uint32, each row's number among its prompt's sequences
    eos_ids: jax.Array  # [n] int32, shared by all rows
    prompt_mask: jax.Array | None  # [batch, vocab] bool: token occurs in the prompt (penalties only)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a batch stands: `token` is chosen and emitted, but not yet in the cache."""

    cache: HybridCache
    token: jax.Array  # [batch] int32
    finished: jax.Array  # [batch] bool
    emitted: jax.Array  # [batch] int32, tokens chosen so far
    counts: jax.Array | None  # [batch, vocab] int32, how often each was chosen (penalties only)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """What one device call emitted: row b's first `count[b]` entries."""

    tokens: jax.Array  # [batch, BLOCK_STEPS] int32
    logprobs: jax.Array  # [batch, BLOCK_STEPS] float32
    count: jax.Array  # [batch] int32


class Engine:
    """The compiled functions of one model, and the host loops that feed them.

    Batches are padded with rows without tokens to what the forward's devices divide evenly; the padding
    stays in every result that is an array, behind the rows asked for.
    """

    def __init__(self, forward: Forward):
        self.config = forward.decoder.config
        self._params = forward.parameters
        self._hidden_dtype = forward.decoder.dtypes.compute
        self._model = forward
        jit = partial(jax.jit, compiler_options=forward.kernels.compiler_options)
        self._prefill = jit(partial(_prefill, forward), donate_argnames=("cache", "last_hidden"))
        self._forward = jit(partial(_forward, forward), donate_argnames=("cache",))
        self._first = jit(partial(_first, forward), static_argnames="plan", donate_argnames=("cache",))
        self._decode = jit(partial(_decode, forward), static_argnames="plan", donate_argnames=("state",))
        self._repeat = jax.jit(_repeat, static_argnames="copies")

    def padded(self, rows: int) -> int:
        """The number of rows that a batch of `rows` is computed with."""
        return -(-rows // self._model.batch_multiple) * self._model.batch_multiple

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        return self._model.new_cache(batch, capacity)

    def forward(
        self, tokens: jax.Array | np.ndarray, valid: jax.Array | np.ndarray, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """All logits of some new tokens, after what the cache holds (the cache is donated).

        Args:
            tokens: int32 [batch, seq].
            valid: bool [batch, seq], a prefix of each row.
            cache: with room for them.

        Returns:
            (float32 [batch, seq, vocab], the cache after them).
        """
        return self._forward(self._params, cache=cache, tokens=tokens, valid=valid)

    def logits(self, rows: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of whole sequences, chunk by chunk.

        Args:
            rows: one int32 array of token ids a row, without padding.

        Yields:
            (start, float32 [batch, length, vocab]): the logits of positions start .. start + length - 1;
            those behind a row's end, and rows behind the last, mean nothing.
        """
        longest = max(map(len, rows))
        rows = self._pad(rows)
        cache = self.new_cache(len(rows), cache_capacity(longest))
        for start, tokens, valid in self._chunks(rows):
            chunk, cache = self.forward(tokens, valid, cache)
            yield start, np.asarray(chunk[:, : longest - start])

    def prefill(self, rows: list[np.ndarray], room: int) -> tuple[HybridCache, jax.Array]:
        """Reads prompts into a new cache.

        Args:
            rows: one int32 array of token ids a row, without padding.
            room: tokens to leave room for behind the longest prompt.

        Returns:
            (cache, the hidden state of each row's last token [batch, hidden]).
        """
        rows = self._pad(rows)
        cache = self.new_cache(len(rows), cache_capacity(max(map(len, rows)) + room))
        last: Any = np.zeros((len(rows), self.config.hidden_size), self._hidden_dtype)
        for _, tokens, valid in self._chunks(rows):
            cache, last = self._prefill(
                self._params, cache=cache, last_hidden=last, tokens=tokens, valid=valid
            )
        return cache, last

    def repeat(
        self, cache: HybridCache, last_hidden: jax.Array, copies: int
    ) -> tuple[HybridCache, jax.Array]:
        """Every row `copies` times, the copies of a row next to each other."""
        return self._repeat((cache, last_hidden), copies=copies)

    def lower_prefill(self, cache: HybridCache, tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """The program that `prefill` runs on a chunk, of arguments without values.

        Args:
            cache: shapes and shardings, before the chunk.
            tokens: int32 [batch, chunk].
        """
        batch = tokens.shape[0]
        return self._prefill.lower(
            self._params,
            cache=cache,
            last_hidden=jax.ShapeDtypeStruct((batch, self.config.hidden_size), self._hidden_dtype),
            tokens=tokens,
            valid=jax.ShapeDtypeStruct(tokens.shape, jnp.bool_, sharding=tokens.sharding),
        )

    def lower_decode(self, state: DecodeState, sampler: Sampler, plan: SamplingPlan) -> jax.stages.Lowered:
        """The program that `decode` runs, of arguments without values."""
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        return self._decode.lower(self._params, state=state, sampler=sampler, steps=steps, plan=plan)

    def _chunks(self, rows: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(start, tokens [batch, bucket], valid [batch, bucket]) of each prefill chunk."""
        chunk = chunk_length(len(rows), self._model.kernels)
        for start, length in chunk_spans(max(map(len, rows)), chunk):
            yield start, *right_pad([row[start : start + length] for row in rows], length)

    def _pad(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return rows + [np.zeros(0, np.int32)] * (self.padded(len(rows)) - len(rows))

    def first(
        self, cache: HybridCache, last_hidden: jax.Array, sampler: Sampler, plan: SamplingPlan
    ) -> tuple[DecodeState, Block]:
        """Chooses the first token after the prompts; a block of one step."""
        return self._first(self._params, cache=cache, last_hidden=last_hidden, sampler=sampler, plan=plan)

    def decode(
        self, state: DecodeState, sampler: Sampler, plan: SamplingPlan, steps: int
    ) -> tuple[DecodeState, Block]:
        """Runs up to `steps` (at most BLOCK_STEPS) steps, stopping early when all rows have finished."""
        return self._decode(
            self._params, state=state, sampler=sampler, steps=np.int32(min(steps, BLOCK_STEPS)), plan=plan
        )


def _repeat(tree, *, copies: int):
    return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), tree)


def _prefill(model: Forward, params, *, cache, last_hidden, tokens, valid):
    hidden, cache = model.hidden(params, tokens, valid, cache)
    count = valid.sum(axis=1)
    index = jnp.maximum(count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    # a row that ended in an earlier chunk keeps what it had
    return cache, jnp.where(count[:, None] > 0, last, last_hidden)


def _forward(model: Forward, params, *, cache, tokens, valid):
    hidden, cache = model.hidden(params, tokens, valid, cache)
    return model.everywhere(model.logits(params, hidden)), cache


def _choose(logits, state: DecodeState, sampler: Sampler, plan: SamplingPlan):
    """The next token of every row that has not finished; (state, log-probabilities)."""
    with jax.named_scope("sampling"):
        tokens, logprobs = choose_tokens(
            logits,
            sampler.params,
            plan,
            step_keys(row_keys(sampler.seeds, sampler.sequence_index), state.emitted),
            sampler.prompt_mask,
            state.counts,
        )
    running = ~state.finished
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(tokens.shape[0]), tokens].add(running.astype(counts.dtype))
    ends = (tokens[:, None] == sampler.eos_ids[None]).any(axis=1)
    state = dataclasses.replace(
        state,
        token=jnp.where(running, tokens, state.token),
        finished=state.finished | ends,
        emitted=state.emitted + running.astype(jnp.int32),
        counts=counts,
    )
    return state, logprobs


def _first(model: Forward, params, *, cache, last_hidden, sampler: Sampler, plan: SamplingPlan):
    batch = last_hidden.shape[0]
    counts = None
    if sampler.prompt_mask is not None:
        counts = jnp.zeros(sampler.prompt_mask.shape, jnp.int32)
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        emitted=jnp.zeros(batch, jnp.int32),
        counts=counts,
    )
    logits = model.logits(params, last_hidden)
    state, logprobs = _choose(logits, state, sampler, plan)
    block = Block(tokens=state.token[:, None], logprobs=logprobs[:, None], count=state.emitted)
    return state, model.everywhere(block)


def _decode(model: Forward, params, *, state: DecodeState, sampler: Sampler, steps, plan: SamplingPlan):
    batch = state.token.shape[0]
    before = state.emitted

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~state.finished.all()

    def one_step(carry):
        step, state, tokens, logprobs = carry
        # a finished row feeds a pad: its cache stands still
        hidden, cache = model.hidden(params, state.token[:, None], ~state.finished[:, None], state.cache)
        state = dataclasses.replace(state, cache=cache)
        state, logprob = _choose(model.logits(params, hidden[:, 0]), state, sampler, plan)
        tokens = lax.dynamic_update_index_in_dim(tokens, state.token, step, axis=1)
        logprobs = lax.dynamic_update_index_in_dim(logprobs, logprob, step, axis=1)
        return step + 1, state, tokens, logprobs

    start = (
        jnp.int32(0),
        state,
        jnp.zeros((batch, BLOCK_STEPS), jnp.int32),
        jnp.zeros((batch, BLOCK_STEPS), jnp.float32),
    )
    _, state, tokens, logprobs = lax.while_loop(unfinished, one_step, start)
    return state, model.everywhere(Block(tokens=tokens, logprobs=logprobs, count=state.emitted - before))

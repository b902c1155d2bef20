"""Prefill and decode as compiled functions over explicit state.

Nothing here knows text. Every step takes the cache (and is donated it) and returns the next one; the
decode loop runs on the device, several steps a call.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen_moe_jax.generation.batching import right_pad
from qwen_moe_jax.generation.sampling import SamplingParams, SamplingPlan, choose_tokens, step_keys
from qwen_moe_jax.generation.shapes import cache_capacity, chunk_length, chunk_spans
from qwen_moe_jax.model.cache import HybridCache, empty_cache
from qwen_moe_jax.model.decoder import Decoder
from qwen_moe_jax.model.linear import held_dtype

BLOCK_STEPS = 16  # most decode steps in one device call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """What choosing tokens needs, one entry a row; constant during a generation."""

    params: SamplingParams
    keys: jax.Array  # [batch] PRNG keys
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
    """The compiled functions of one decoder, and the host loops that feed them."""

    def __init__(self, decoder: Decoder, backend: str):
        self.config = decoder.config
        self._graph, self._params = nnx.split(decoder)
        self._conv_dtype = decoder.dtypes.compute
        # Keys and values follow the weights: XLA:CPU multiplies float32 at memory speed only.
        self._kv_dtype = held_dtype(decoder.dtypes.compute, backend)
        graph = self._graph
        self._prefill = jax.jit(partial(_prefill, graph), donate_argnames=("cache", "last_hidden"))
        self._forward = jax.jit(partial(_forward, graph), donate_argnames=("cache",))
        self._first = jax.jit(partial(_first, graph), static_argnames="plan", donate_argnames=("cache",))
        self._decode = jax.jit(partial(_decode, graph), static_argnames="plan", donate_argnames=("state",))

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        return empty_cache(self.config, batch, capacity, self._kv_dtype, self._conv_dtype)

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
            those behind a row's end mean nothing.
        """
        longest = max(map(len, rows))
        cache = self.new_cache(len(rows), cache_capacity(longest))
        for start, tokens, valid in _chunks(rows):
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
        cache = self.new_cache(len(rows), cache_capacity(max(map(len, rows)) + room))
        last = jnp.zeros((len(rows), self.config.hidden_size), self._conv_dtype)
        for _, tokens, valid in _chunks(rows):
            cache, last = self._prefill(
                self._params, cache=cache, last_hidden=last, tokens=tokens, valid=valid
            )
        return cache, last

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


def _chunks(rows: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(start, tokens [batch, bucket], valid [batch, bucket]) of each prefill chunk."""
    for start, length in chunk_spans(max(map(len, rows)), chunk_length(len(rows))):
        yield start, *right_pad([row[start : start + length] for row in rows], length)


def _prefill(graph, params, *, cache, last_hidden, tokens, valid):
    hidden, cache = nnx.merge(graph, params)(tokens, valid, cache)
    count = valid.sum(axis=1)
    index = jnp.maximum(count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    # a row that ended in an earlier chunk keeps what it had
    return cache, jnp.where(count[:, None] > 0, last, last_hidden)


def _forward(graph, params, *, cache, tokens, valid):
    decoder = nnx.merge(graph, params)
    hidden, cache = decoder(tokens, valid, cache)
    return decoder.logits(hidden), cache


def _choose(logits, state: DecodeState, sampler: Sampler, plan: SamplingPlan):
    """The next token of every row that has not finished; (state, log-probabilities)."""
    tokens, logprobs = choose_tokens(
        logits,
        sampler.params,
        plan,
        step_keys(sampler.keys, state.emitted),
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


def _first(graph, params, *, cache, last_hidden, sampler: Sampler, plan: SamplingPlan):
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
    logits = nnx.merge(graph, params).logits(last_hidden)
    state, logprobs = _choose(logits, state, sampler, plan)
    block = Block(tokens=state.token[:, None], logprobs=logprobs[:, None], count=state.emitted)
    return state, block


def _decode(graph, params, *, state: DecodeState, sampler: Sampler, steps, plan: SamplingPlan):
    decoder = nnx.merge(graph, params)
    batch = state.token.shape[0]
    before = state.emitted

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~state.finished.all()

    def one_step(carry):
        step, state, tokens, logprobs = carry
        # a finished row feeds a pad: its cache stands still
        hidden, cache = decoder(state.token[:, None], ~state.finished[:, None], state.cache)
        state = dataclasses.replace(state, cache=cache)
        state, logprob = _choose(decoder.logits(hidden[:, 0]), state, sampler, plan)
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
    return state, Block(tokens=tokens, logprobs=logprobs, count=state.emitted - before)

"""Log-probabilities of given texts. A context that several continuations follow is computed once.

A round takes one context of each data rank. All but its last token is prefilled into slot 0. Then each of its
continuations gets a slot of its own: it reads the context's whole pages where they are, and a copy of the
last page, if that is not full, and of the recurrent state. What is written lies behind the copies.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.rows import Layers
from qwen_moe_jax.engine.shapes import cache_capacity, chunk_length, chunk_spans, tail_bucket
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.formats.cache import PAGE, HybridCache, KVCache, Placement, pages_for

# Tokens of a step over continuations, and of those whose logits are in memory at once.
_STEP_TOKENS, _LOGIT_TOKENS = 512, 256


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the model says of a continuation, an entry a token.

    Attributes:
        logprobs: float32 [tokens], natural log.
        greedy: int32 [tokens], the most likely token there.
        top_ids, top_logprobs: [tokens, k], the k most likely ones, best first.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def likeliest(self) -> list[dict[int, float]]:
        """In each place, the k likeliest tokens -> log-probability, best first."""
        return [
            dict(zip(ids.tolist(), values.tolist(), strict=True))
            for ids, values in zip(self.top_ids, self.top_logprobs, strict=True)
        ]


@dataclasses.dataclass
class _Group:
    """A context and the numbers of the continuations behind it."""

    context: tuple[int, ...]
    numbers: list[int]


@dataclasses.dataclass
class _Pools:
    """Those of the round before: most rounds need pools of the same sizes, and making them may compile."""

    sizes: tuple[int, int] | None = None
    layers: Layers = ()


class Scorer:
    """The compiled steps of scoring with one model."""

    def __init__(self, forward: Forward):
        self._forward = forward
        self._steps = Steps(forward)
        jit = partial(jax.jit, compiler_options=forward.kernels.compiler_options)
        self._clear = jit(partial(_clear, forward), donate_argnames="layers")
        self._fork = jit(partial(_fork, forward), donate_argnames="layers")
        self._score = jit(partial(_score, forward), donate_argnames="layers", static_argnames="top")

    def __call__(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, top: int = 0
    ) -> list[Scored]:
        """Scores pairs.

        Args:
            contexts: token ids, at least one each; equal ones are computed once.
            continuations: token ids behind each of them; none give empty results.
            top: how many of the most likely tokens to name.
        """
        groups: dict[tuple[int, ...], _Group] = {}
        for number, context in enumerate(contexts):
            key = tuple(context)
            groups.setdefault(key, _Group(key, [])).numbers.append(number)
        ordered = sorted(groups.values(), key=lambda group: -len(group.context))
        found: dict[int, Scored] = {}
        ranks = self._forward.batch_multiple
        pools = _Pools()
        for first in range(0, len(ordered), ranks):
            found |= dict(self._round(ordered[first : first + ranks], continuations, top, pools))
        return [found[number] for number in range(len(contexts))]

    def _round(
        self, groups: Sequence[_Group], continuations: Sequence[Sequence[int]], top: int, pools: _Pools
    ) -> Iterator[tuple[int, Scored]]:
        """One context of each data rank, with all its continuations."""
        ranks = self._forward.batch_multiple
        texts = [[(number, continuations[number]) for number in group.numbers] for group in groups]
        longest = max(max((len(text) for _, text in one), default=1) for one in texts)
        before = max(len(group.context) for group in groups) - 1
        chunk = tail_bucket(longest, chunk_length(1, self._forward.kernels))
        rows = _rows_of(max(map(len, texts)), chunk)
        # pages of the context, and of what is behind it in each row
        shared, own = pages_for(cache_capacity(before + 1)), pages_for(cache_capacity(longest) + PAGE)
        pages = shared + rows * own
        sizes = pages * ranks, (1 + rows) * ranks
        if pools.sizes != sizes:
            pools.sizes, pools.layers = sizes, self._forward.new_layers(*sizes)
        layers = self._clear(layers=pools.layers)
        layers = self._prefill(layers, groups, shared, own, pages, 1 + rows)
        for first in range(0, max(map(len, texts)), rows):
            some = [one[first : first + rows] for one in texts]
            layers, found = self._continued(
                layers, groups, some, rows=rows, shared=shared, own=own, pages=pages, top=top
            )
            yield from found
        pools.layers = layers

    def _prefill(
        self, layers: Layers, groups: Sequence[_Group], shared: int, own: int, pages: int, slots: int
    ) -> Layers:
        """All but the last token of each context, into the first slot of its data rank."""
        ranks = self._forward.batch_multiple
        counts = np.zeros(ranks, np.int32)
        counts[: len(groups)] = [len(group.context) - 1 for group in groups]
        tables: Any = np.full((ranks, shared + own), pages, np.int32)
        tables[:, :shared] = np.arange(shared)
        place: Any = np.where(counts > 0, 0, slots).astype(np.int32)
        for start, length in chunk_spans(int(counts.max()), chunk_length(1, self._forward.kernels)):
            tokens = np.zeros((ranks, length), np.int32)
            some = np.clip(counts - start, 0, length).astype(np.int32)
            for rank, group in enumerate(groups):
                tokens[rank, : some[rank]] = group.context[start : start + some[rank]]
            behind: Any = np.minimum(counts, start)
            placed = Placement(tables=tables, slots=place, length=behind)
            layers, _ = self._steps.prefill(layers, tokens, None, some, placed)
        return layers

    def _continued(
        self,
        layers: Layers,
        groups: Sequence[_Group],
        texts: list[list[tuple[int, Sequence[int]]]],
        *,
        rows: int,
        shared: int,
        own: int,
        pages: int,
        top: int,
    ) -> tuple[Layers, list[tuple[int, Scored]]]:
        """Some continuations of each context, a row each."""
        ranks = self._forward.batch_multiple
        total = ranks * rows
        tables: Any = np.full((total, shared + own), pages, np.int32)
        slots: Any = np.full(total, 1 + rows, np.int32)
        lengths: Any = np.zeros(total, np.int32)
        given: list[list[int]] = [[] for _ in range(total)]  # what is fed, and what is to be found behind it
        wanted: list[Sequence[int]] = [[] for _ in range(total)]
        for rank, (group, some) in enumerate(zip(groups, texts, strict=True)):
            whole = (len(group.context) - 1) // PAGE
            for index, (_, text) in enumerate(some):
                row, first = rank * rows + index, shared + index * own
                tables[row, :whole] = np.arange(whole)
                tables[row, whole : whole + own] = np.arange(first, first + own)
                slots[row], lengths[row] = 1 + index, len(group.context) - 1
                given[row], wanted[row] = [group.context[-1], *text[:-1]], text
        partial_page = np.array([length // PAGE for length in lengths], np.int32)
        sources = np.where(lengths % PAGE > 0, partial_page, pages).astype(np.int32)
        targets = np.take_along_axis(tables, partial_page[:, None], axis=1)[:, 0]
        layers = self._fork(layers=layers, pages=(sources, targets), slots=slots)
        longest = max(map(len, wanted))
        parts: list[Any] = []
        for start, length in chunk_spans(longest, tail_bucket(longest, max(16, _STEP_TOKENS // rows))):
            tokens, after = np.zeros((2, total, length), np.int32)
            counts = np.zeros(total, np.int32)
            for row in range(total):
                piece = given[row][start : start + length]
                counts[row] = len(piece)
                tokens[row, : len(piece)] = piece
                after[row, : len(piece)] = wanted[row][start : start + length]
            placed = Placement(tables=tables, slots=slots, length=lengths)
            layers, found = self._score(
                self._forward.parameters,
                layers=layers,
                tokens=tokens,
                wanted=after,
                counts=counts,
                placed=placed,
                top=top,
            )
            lengths = lengths + counts
            parts.append(found)
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *map(jax.device_get, parts))
        logprobs, ids, values = joined
        results = []
        for rank, some in enumerate(texts):
            for index, (number, text) in enumerate(some):
                row, count = rank * rows + index, len(text)
                results.append(
                    (
                        number,
                        Scored(
                            logprobs=logprobs[row, :count],
                            greedy=ids[row, :count, 0],
                            top_ids=ids[row, :count, :top],
                            top_logprobs=values[row, :count, :top],
                        ),
                    )
                )
        return layers, results


def _rows_of(continuations: int, chunk: int) -> int:
    """Rows of a step: a power of two, enough for all continuations or for a full step."""
    most = max(1, _STEP_TOKENS // chunk)
    rows = 1
    while rows < min(continuations, most):
        rows *= 2
    return rows


def _clear(model: Forward, *, layers: Layers) -> Layers:
    """The first slot of each data rank as before any token."""

    def of_rank(layers: Layers) -> Layers:
        return tuple(
            layer if isinstance(layer, KVCache) else jax.tree.map(lambda x: x.at[0].set(0), layer)
            for layer in layers
        )

    return model.by_pool(of_rank, layers)


def _fork(model: Forward, *, layers: Layers, pages: tuple[Any, Any], slots: Any) -> Layers:
    """Copies of pages, and of the first slot of each data rank; behind the pools' ends nothing is copied."""

    def of_rank(layers: Layers, sources: jax.Array, targets: jax.Array, slots: jax.Array) -> Layers:
        copied: list[Any] = []
        for layer in layers:
            if isinstance(layer, KVCache):
                count = layer.k.shape[0]
                to = jnp.where(sources < count, targets, count)
                copied.append(
                    jax.tree.map(
                        lambda x, to=to: x.at[to].set(x.at[sources].get(mode="clip"), mode="drop"), layer
                    )
                )
            else:
                copied.append(jax.tree.map(lambda x: x.at[slots].set(x[:1], mode="drop"), layer))
        return tuple(copied)

    return model.by_pool(of_rank, layers, *pages, slots)


def _score(
    model: Forward,
    params: Any,
    *,
    layers: Layers,
    tokens: Any,
    wanted: Any,
    counts: Any,
    placed: Any,
    top: int,
) -> tuple[Layers, tuple[jax.Array, jax.Array, jax.Array]]:
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32) < counts[:, None]
    hidden, cache = model.hidden(params, tokens, valid, HybridCache(layers, placed))
    rows, length, width = hidden.shape
    block = length
    while rows * block > _LOGIT_TOKENS and block % 2 == 0:
        block //= 2

    def one_block(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, wanted = given
        return model.by_row(partial(_said, top=max(1, top)), model.logits(params, hidden), wanted)

    blocks = (
        jnp.moveaxis(hidden.reshape(rows, -1, block, width), 1, 0),
        jnp.moveaxis(jnp.asarray(wanted).reshape(rows, -1, block), 1, 0),
    )
    found = (
        lax.map(one_block, blocks)
        if length > block
        else jax.tree.map(lambda x: x[None], one_block(jax.tree.map(lambda x: x[0], blocks)))
    )
    together = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, length, *x.shape[3:]), found)
    return cache.layers, model.everywhere(together)


def _said(logits: jax.Array, wanted: jax.Array, *, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of logits [rows, tokens, vocab]: log-probabilities of the tokens wanted; ids and log-probabilities of
    the likeliest."""
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    taken = jnp.take_along_axis(logits, wanted[..., None], axis=-1) - whole
    if top == 1:
        ids = jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
        values = jnp.take_along_axis(logits, ids, axis=-1)
    else:
        values, ids = lax.top_k(logits, top)
    return taken[..., 0], ids, values - whole

"""The forward pass over whole sequences with the values of some points, over caches of its own."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.shapes import cache_capacity, sequence_chunks
from qwen_moe_jax.formats.cache import PAGE, HybridCache, pages_for
from qwen_moe_jax.model.points import points_of


class Observer:
    """A model's compiled forward pass with the values of some points.

    Attributes:
        wanted: the points.
    """

    def __init__(self, forward: Forward, wanted: frozenset[str]):
        self.wanted = wanted
        self._forward = forward
        self._points = points_of(forward.decoder.config)
        self._run = jax.jit(
            partial(_run, forward, wanted),
            donate_argnames="cache",
            compiler_options=forward.kernels.compiler_options,
        )

    def lowered_text(self, batch: int, length: int) -> str:
        """The compiled program for a batch of sequences, as XLA says it: what a point costs stands there."""
        batch = -(-batch // self._forward.batch_multiple) * self._forward.batch_multiple
        cache = self._forward.new_cache(batch, cache_capacity(length))
        tokens, valid = np.zeros((batch, length), np.int32), np.ones((batch, length), bool)
        at = np.zeros((batch, 1), np.int32)
        lowered = self._run.lower(self._forward.parameters, cache=cache, tokens=tokens, valid=valid, at=at)
        return lowered.compile().as_text() or ""

    def __call__(
        self, rows: Sequence[np.ndarray], states_at: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Runs whole sequences.

        Args:
            rows: int32 [tokens] each.
            states_at: int32 [batch, n], positions behind which recurrent states are captured.

        Returns:
            (float32 logits [batch, longest, vocab]; point -> value, arrays of the host with the axes that
            `model/points.py` names). What stands behind a row's end means nothing.
        """
        batch, longest = len(rows), max(map(len, rows))
        multiple = self._forward.batch_multiple
        padded = -(-batch // multiple) * multiple
        rows = [*rows, *[np.zeros(0, np.int32)] * (padded - batch)]
        at = np.zeros((padded, states_at.shape[1]), np.int32)
        at[:batch] = states_at
        cache = self._forward.new_cache(padded, cache_capacity(longest))
        logits: list[np.ndarray] = []
        chunks: list[tuple[int, int, dict[str, Any]]] = []
        for start, tokens, valid in sequence_chunks(rows, self._forward.kernels):
            some, found, cache = self._run(
                self._forward.parameters, cache=cache, tokens=tokens, valid=valid, at=at - start
            )
            width = min(tokens.shape[1], longest - start)
            logits.append(np.asarray(some[:batch, :width]))
            chunks.append((start, width, jax.tree.map(np.asarray, found)))
        return np.concatenate(logits, axis=1), {
            name: self._together(name, batch, longest, at, chunks) for name in sorted(self.wanted)
        }

    def _together(
        self,
        name: str,
        batch: int,
        longest: int,
        at: np.ndarray,
        chunks: list[tuple[int, int, dict[str, Any]]],
    ) -> Any:
        """A point's values of all chunks."""
        axes = self._points[name].axes
        if "at" in axes:
            states = chunks[0][2][name][:batch].copy()
            for start, _, found in chunks[1:]:
                later = at[:batch] >= start
                states[later] = found[name][:batch][later]
            return states
        place = axes.index("position")
        parts = []
        for _, width, found in chunks:
            cut = (slice(batch), *[slice(None)] * (place - 1), slice(width))
            parts.append(jax.tree.map(lambda x, cut=cut: x[cut], found[name]))
        joined = parts[0]  # views of what the device gave: nothing is copied that need not be
        if len(parts) > 1:
            joined = jax.tree.map(lambda *values: np.concatenate(values, axis=place), *parts)
        if "key" in axes:
            joined = joined[..., :longest]
        return joined


def attention_elements(rows: int, heads: int, longest: int) -> int:
    """Elements of one layer's attention weights."""
    return rows * heads * longest * pages_for(longest) * PAGE


def _run(
    model: Forward,
    wanted: frozenset[str],
    params: Any,
    *,
    cache: HybridCache,
    tokens: Any,
    valid: Any,
    at: Any,
) -> tuple[jax.Array, dict[str, Any], HybridCache]:
    hidden, cache, found = model.observe(params, tokens, valid, cache, at, wanted)
    logits = model.everywhere(model.logits(params, hidden)).astype(jnp.float32)
    found = jax.tree.map(lambda x: x if x.dtype == jnp.int32 else x.astype(jnp.float32), found)
    return logits, model.everywhere(found), cache

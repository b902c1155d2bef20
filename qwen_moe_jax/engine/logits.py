"""Logits of every position of whole sequences, which generation has no use for."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.shapes import cache_capacity, sequence_chunks
from qwen_moe_jax.formats.cache import HybridCache


class SequenceLogits:
    """The compiled forward of one model with all its logits, over caches of its own.

    Batches are padded with rows without tokens to what the forward's devices divide evenly; the padding
    stays in every result that is an array, behind the rows asked for.

    Attributes:
        forward: the model.
    """

    def __init__(self, forward: Forward):
        self.forward = forward
        self._run = jax.jit(
            partial(_run, forward),
            donate_argnames="cache",
            compiler_options=forward.kernels.compiler_options,
        )

    def padded(self, rows: int) -> int:
        """The number of rows that a batch of `rows` is computed with."""
        return -(-rows // self.forward.batch_multiple) * self.forward.batch_multiple

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        return self.forward.new_cache(batch, capacity)

    def __call__(
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
        return self._run(self.forward.parameters, cache=cache, tokens=tokens, valid=valid)

    def chunks(self, rows: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Logits of whole sequences, chunk by chunk.

        Args:
            rows: one int32 array of token ids a row, without padding.

        Yields:
            (start, float32 [batch, length, vocab]): the logits of positions start .. start + length - 1;
            those behind a row's end, and rows behind the last, mean nothing.
        """
        longest = max(map(len, rows))
        rows = rows + [np.zeros(0, np.int32)] * (self.padded(len(rows)) - len(rows))
        cache = self.new_cache(len(rows), cache_capacity(longest))
        for start, tokens, valid in sequence_chunks(rows, self.forward.kernels):
            chunk, cache = self(tokens, valid, cache)
            yield start, np.asarray(chunk[:, : longest - start])


def _run(model: Forward, params, *, cache: HybridCache, tokens, valid) -> tuple[jax.Array, HybridCache]:
    hidden, cache = model.hidden(params, tokens, valid, cache)
    return model.everywhere(model.logits(params, hidden)).astype(jnp.float32), cache

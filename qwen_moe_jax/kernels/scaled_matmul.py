"""One matrix of codes and block scales times a few rows: `grouped_matmul.py` with a single group."""

from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.kernels.experts import tile_sizes
from qwen_moe_jax.kernels.grouped_matmul import grouped_matmul
from qwen_moe_jax.kernels.tiles import Tiles


def scaled_matmul(
    x: jax.Array, weight: BlockScaled, dtype: DTypeLike, *, widening: str, interpret: bool
) -> jax.Array:
    """x @ weight^T, the matrix widened as it is read, accumulated in float32 and rounded once.

    Args:
        x: [..., in].
        weight: [out, in].
        dtype: of the result.
        widening: inside the kernel, `Kernels.kernel_widening`.
        interpret: as of `launch`.

    Returns:
        [..., out].
    """
    leading = x.shape[:-1]
    tokens = prod(leading)
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    stacked = jax.tree.map(lambda array: array[None], weight)
    outputs = grouped_matmul(
        x.reshape(tokens, -1),
        stacked,
        _one_group(tokens, rows),
        gated=False,
        slots_per_row=1,
        sizes=tile_sizes(rows, codes=True),
        expected_groups=1,
        widening=widening,
        name="scaled_matmul",
        interpret=interpret,
        dtype=dtype,
    )
    return outputs.reshape(*leading, weight.shape[0])


def _one_group(slots: int, rows: int) -> Tiles:
    """All slots in order, in tiles of the same group."""
    start = jnp.arange(0, slots, rows, dtype=jnp.int32)
    return Tiles(
        slots=jnp.arange(slots + rows, dtype=jnp.int32),
        group=jnp.zeros(start.shape, jnp.int32),
        start=start,
        stop=jnp.minimum(start + rows, slots),
        rows=rows,
        expected_slots=slots,
    )

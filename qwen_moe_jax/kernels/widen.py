"""Tiles of a stack of matrices as a kernel's products take them, also out of float8 with block scales.

Ways to widen float8_e4m3fn:

    "native"   the hardware's conversion, where its float8 is this one (gfx950, NVIDIA from sm_89 on)
    "bits"     through the bits of a float16 of 1/256 of the value, exact for every finite code: for any
               hardware, gfx942 among it, whose own float8 is e4m3fnuz, worth half at the same bits
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

WIDENINGS = ("native", "bits")


def tile_of(
    ref: Any,
    scale_ref: Any,
    group: jax.Array,
    row: jax.Array,
    column: jax.Array,
    shape: tuple[int, int],
    mask: jax.Array | None,
    block: tuple[int, int] | None,
    dtype: jnp.dtype,
    widening: str,
) -> jax.Array:
    """A tile of one matrix, in `dtype`; zero where the mask is false.

    Args:
        ref: [groups, rows, columns]; of float8 its bits, uint8.
        scale_ref: of the scales, or None.
        group, row, column: of the tile's first element.
        shape: of the tile; a tile that is narrower than a block lies within one.
        mask: bool, like the tile.
        block: rows and columns of a scale, or None.
        dtype: that the product takes.
        widening: as above.
    """
    values = plt.load(
        ref.at[group, pl.ds(row, shape[0]), pl.ds(column, shape[1])],
        mask=mask,
        other=None if mask is None else 0,
    )
    if block is None:
        return values.astype(dtype)
    rows = jnp.minimum((row + jnp.arange(shape[0])) // block[0], scale_ref.shape[1] - 1)
    rows = rows[:, None]
    columns = jnp.full((1, 1), column // block[1])
    if shape[1] > block[1]:
        columns = jnp.minimum((column + jnp.arange(shape[1])) // block[1], scale_ref.shape[2] - 1)[None, :]
    # array indices only: an interpreted kernel has no mixed ones
    scales = plt.load(scale_ref.at[*jnp.broadcast_arrays(group, rows, columns)])
    return (widened(values, widening) * scales).astype(dtype)


def widened(values: jax.Array, widening: str) -> jax.Array:
    """The bits of finite float8_e4m3fn, uint8 -> their numbers, float32."""
    if widening == "native":
        return lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
    bits = values.astype(jnp.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256

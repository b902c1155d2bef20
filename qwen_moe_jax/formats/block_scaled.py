"""Matrices in float8 with a scale for each block, multiplied out as they are used.

The values stay float8 in memory; a product reads them and multiplies the scales in on the way, which XLA
fuses with what follows. So the arithmetic is that of a model that holds the multiplied-out matrices
(DeepSeek-V3, arXiv:2412.19437, 3.3, has the format).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix, or a stack of them.

    Attributes:
        values: float8_e4m3fn [..., out, in], finite.
        scales: float32 [..., ceil(out / block[0]), ceil(in / block[1])].
        block: rows and columns that a scale is for; the last ones may be fewer.
        dtype: what the products are to hold it in, float32 or bfloat16 (see `linear.held_dtype`).
        widening: how XLA widens its values here, see `widened`.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    widening: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix or stack."""
        return self.values.shape

    def multiplied_out(self, compute: DTypeLike) -> jax.Array:
        """values * scales, rounded to `compute` and held in `self.dtype`.

        Args:
            compute: float32, in which the product with a bfloat16 scale is exact, or bfloat16.

        Returns:
            [..., out, in].
        """
        *stack, down, across = self.scales.shape
        rows, columns = self.block
        shape = (*stack, down, rows, across, columns)
        scales = jnp.broadcast_to(self.scales[..., :, None, :, None], shape)
        scales = scales.reshape(*stack, down * rows, across * columns)
        matrix = widened(self.values, self.widening) * scales[..., : self.shape[-2], : self.shape[-1]]
        if jnp.dtype(compute).itemsize < 4:
            info = jnp.finfo(compute)
            matrix = lax.reduce_precision(matrix, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        return matrix.astype(self.dtype)


# What a product takes.
Matrix = jax.Array | BlockScaled


def widened(values: jax.Array, widening: str) -> jax.Array:
    """Finite float8_e4m3fn -> the same numbers in float32.

    Args:
        values: any shape.
        widening: by "native" conversion; as "fnuz", the float8 of gfx942, whose numbers at the same bits are
            half of these, but for the bits of -0, which are its NaN (a -0 becomes 0); or through
            "bits": those behind the sign, one place further up, are the bits of a float16 of 1/256 of the
            value, subnormal ones included. (XLA:CPU's own conversion takes three times as long as that.)
    """
    if widening == "native":
        return values.astype(jnp.float32)
    bits = lax.bitcast_convert_type(values, jnp.uint8)
    if widening == "fnuz":
        bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
        return lax.bitcast_convert_type(bits, jnp.float8_e4m3fnuz).astype(jnp.float32) * 2
    wide = bits.astype(jnp.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256

"""Matrices of few bits with a scale for each block, multiplied out as they are used.

The codes stay packed in memory; a product reads them and multiplies the scales in on the way, which XLA
fuses with what follows. So the arithmetic is that of a model that holds the multiplied-out matrices, and
activations are not quantised. (Blocks of 128 x 128: DeepSeek-V3, arXiv:2412.19437, 3.3. Groups along a row:
GPTQ, arXiv:2210.17323; OCP Microscaling Formats (MX) 1.0.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_moe_jax.formats.codes import CODES, widened_codes, widened_scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix, or a stack of them: (code - zero point) * scale.

    Attributes:
        values: codes [..., out, in / packed], as `codes.py` says of each number format; floats are finite.
        scales: [..., ceil(out / block[0]), ceil(in / block[1])], in one of the dtypes of `MatrixFormat`.
        block: rows and columns that a scale is for; the last ones may be fewer.
        dtype: what the products are to hold it in, float32 or bfloat16 (see `linear.held_dtype`).
        widening: how XLA widens e4m3 here, see `codes.widened`.
        codes: name of the number format.
        zeros: uint8, like scales; None for floats, and where the format's own zero point holds everywhere.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    widening: str = dataclasses.field(metadata={"static": True})
    codes: str = dataclasses.field(default="e4m3", metadata={"static": True})
    zeros: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix or stack."""
        *leading, columns = self.values.shape
        return (*leading, columns * CODES[self.codes].packed)

    def multiplied_out(self, compute: DTypeLike) -> jax.Array:
        """(codes - zeros) * scales, rounded to `compute` and held in `self.dtype`.

        Args:
            compute: float32, in which the product with a scale of 16 bits or fewer is exact, or bfloat16.

        Returns:
            [..., out, in].
        """
        matrix = widened_codes(self.values, self.codes, self.widening)
        zero = CODES[self.codes].zero
        if self.zeros is not None:
            matrix = matrix - self._spread(self.zeros.astype(jnp.float32))
        elif zero is not None:
            matrix = matrix - zero
        matrix = matrix * self._spread(widened_scales(self.scales))
        if jnp.dtype(compute).itemsize < 4:
            info = jnp.finfo(compute)
            matrix = lax.reduce_precision(matrix, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        return matrix.astype(self.dtype)

    def _spread(self, blocks: jax.Array) -> jax.Array:
        """A number a block -> a number an element."""
        *stack, down, across = blocks.shape
        rows, columns = self.block
        spread = jnp.broadcast_to(blocks[..., :, None, :, None], (*stack, down, rows, across, columns))
        spread = spread.reshape(*stack, down * rows, across * columns)
        return spread[..., : self.shape[-2], : self.shape[-1]]


# What a product takes.
Matrix = jax.Array | BlockScaled

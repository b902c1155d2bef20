"""How parameters are declared: shapes as in the checkpoint, dtypes by a policy."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix

_FLOAT32 = jnp.dtype(jnp.float32)
_FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """Which dtype each kind of array has.

    Attributes:
        compute: activations, and every rounding of the model.
        matrix: the large matrices as held in memory (values are always compute-dtype values).
        vector: norm weights, A_log, dt_bias and the convolution: small, so kept in float32, which no
            checkpoint dtype exceeds.
    """

    compute: jnp.dtype
    matrix: jnp.dtype
    vector: jnp.dtype = _FLOAT32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # jnp.bfloat16 is a scalar type, which has no itemsize
            object.__setattr__(self, field.name, jnp.dtype(getattr(self, field.name)))


def declare(shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter to be filled from a checkpoint; zeros until then (abstract under `nnx.eval_shape`)."""
    return nnx.Param(jnp.zeros(shape, dtype))


class MatrixHolder(nnx.Module):
    """Holds matrices, each as one array or, in float8, as values and the scales of their blocks.

    The scales are called as in a checkpoint, `_scale_inv` behind the name of the values.
    """

    def scale_in_blocks(self, name: str, block: tuple[int, int], dtype: jnp.dtype, widening: str) -> None:
        """Redeclares a matrix as float8 with block scales, to be multiplied out in `dtype`.

        Args:
            name: of the attribute.
            block: rows and columns of a scale.
            dtype: what products hold the matrix in.
            widening: how XLA widens float8 here, as of `BlockScaled`.
        """
        *stack, rows, columns = getattr(self, name)[...].shape
        scales = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        setattr(self, name, declare(tuple(getattr(self, name)[...].shape), _FLOAT8))
        setattr(self, f"{name}_scale_inv", declare(scales, _FLOAT32))
        setattr(self, f"{name}_block", (*block, dtype.name, widening))

    def matrix(self, name: str = "weight") -> Matrix:
        """What a product takes."""
        values: Any = getattr(self, name)[...]
        scales: Any = getattr(self, f"{name}_scale_inv", None)
        if scales is None:
            return values
        rows, columns, dtype, widening = getattr(self, f"{name}_block")
        return BlockScaled(values, scales[...], (rows, columns), jnp.dtype(dtype), widening)


class Weight(MatrixHolder):
    """Holds one array called `weight`, as `Linear`, norms and embeddings do in a checkpoint."""

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype):
        self.weight = declare(shape, dtype)

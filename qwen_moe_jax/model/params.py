"""How parameters are declared: shapes as in the checkpoint, dtypes by a policy."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.codes import MatrixFormat

_FLOAT32 = jnp.dtype(jnp.float32)


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
    """Holds matrices, each as one array or as codes with the scales, and zero points, of their blocks.

    Behind the name of the codes, scales are called `_scale_inv`, as in FP8 checkpoints, and zero points
    `_zero_point`.
    """

    def scale_in_blocks(self, name: str, form: MatrixFormat, dtype: jnp.dtype, widening: str) -> None:
        """Redeclares a matrix as codes with block scales, to be multiplied out in `dtype`.

        Args:
            name: of the attribute.
            form: of the codes, scales and zero points.
            dtype: what products hold the matrix in.
            widening: how XLA widens float8 here, as of `BlockScaled`.
        """
        shape = tuple(getattr(self, name)[...].shape)
        scales = form.scales_shape(shape)
        setattr(self, name, declare(form.values_shape(shape), form.of_codes.dtype))
        setattr(self, f"{name}_scale_inv", declare(scales, jnp.dtype(form.scale_dtype)))
        if form.zeros:
            setattr(self, f"{name}_zero_point", declare(scales, jnp.dtype(jnp.uint8)))
        setattr(self, f"{name}_form", (form, dtype.name, widening))

    def matrix(self, name: str = "weight") -> Matrix:
        """What a product takes."""
        values: Any = getattr(self, name)[...]
        held = getattr(self, f"{name}_form", None)
        if held is None:
            return values
        form, dtype, widening = held
        scales: Any = getattr(self, f"{name}_scale_inv")[...]
        zeros: Any = getattr(self, f"{name}_zero_point")[...] if form.zeros else None
        return BlockScaled(values, scales, form.block, jnp.dtype(dtype), widening, form.codes, zeros)


class Weight(MatrixHolder):
    """Holds one array called `weight`, as `Linear`, norms and embeddings do in a checkpoint."""

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype):
        self.weight = declare(shape, dtype)

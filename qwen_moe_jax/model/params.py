"""How parameters are declared: shapes as in the checkpoint, dtypes by a policy."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

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


def declare(shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter to be filled from a checkpoint; zeros until then (abstract under `nnx.eval_shape`)."""
    return nnx.Param(jnp.zeros(shape, dtype))


class Weight(nnx.Module):
    """Holds one array called `weight`, as `Linear`, norms and embeddings do in a checkpoint."""

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype):
        self.weight = declare(shape, dtype)

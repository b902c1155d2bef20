"""Matrix products, and the dtype that large matrices are held in.

A bfloat16 product with float32 accumulation, rounded once, gives the same number whether the weight
sits in memory as bfloat16 or as the float32 of equal value. On XLA:CPU one way of writing the product is
fast for float32 matrices at every number of tokens; for bfloat16 ones none is, and loops over experts
widen all of them first (`benchmarks/README.md`, "Held dtype on CPU"). So on CPU matrices are held in
float32, at twice the memory; elsewhere in the compute dtype.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_moe_jax.kernels.float8_matmul import float8_matmul
from qwen_moe_jax.model.block_scaled import BlockScaled, Matrix


def held_dtype(compute: DTypeLike, target: str) -> jnp.dtype:
    """The dtype large matrices (and the key/value cache) have in memory.

    Args:
        compute: the model's compute dtype.
        target: what programs are compiled for, see `kernels/table.py`.
    """
    return jnp.dtype(jnp.float32) if target == "cpu" else jnp.dtype(compute)


def linear(x: jax.Array, weight: Matrix, out_dtype: DTypeLike | None = None) -> jax.Array:
    """x @ weight^T, accumulated in float32 (or wider) and rounded once.

    Args:
        x: [..., in], the compute dtype.
        weight: [out, in], the held dtype. Where the two differ, the narrower one is widened, never x rounded.
            Float8 with block scales is multiplied out in x.dtype.
        out_dtype: what the product is rounded to; None means x.dtype.

    Returns:
        [..., out] in out_dtype.
    """
    if isinstance(weight, BlockScaled):
        tokens = x.size // x.shape[-1]
        if weight.kernels.pick("float8", x.dtype.name, tokens) == "pallas_tiles":
            return float8_matmul(x, weight, out_dtype or x.dtype)
        weight = weight.multiplied_out(x.dtype)
    common = jnp.promote_types(x.dtype, weight.dtype)
    # Written as a product with a transposed matrix, which XLA:CPU fuses into a matrix-vector product that
    # reads the matrix in place: 2.6 times as fast for a decoded token's experts as contracting the last axes.
    product = jnp.matmul(
        x.astype(common),
        weight.T.astype(common),
        precision=lax.Precision.HIGHEST,  # float32 means float32, also on matrix units
        preferred_element_type=jnp.promote_types(common, jnp.float32),
    )
    return product.astype(out_dtype or x.dtype)

"""Matrix products, and the dtype that large matrices are held in.

A bfloat16 product with float32 accumulation, rounded once, gives the same number whether the weight
sits in memory as bfloat16 or as the float32 of equal value. Matrices are held in the compute dtype, but for a
CPU without the C++ kernels: on XLA:CPU one way of writing the product is fast for float32 matrices at every
number of tokens; for bfloat16 ones none is, and loops over experts widen all of them first
(`benchmarks/README.md`, "Held dtype on CPU"). There they are held in float32, at twice the memory.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.kernels.cpu.calls import native_linears
from qwen_moe_jax.kernels.float8x8_matmul import float8x8_matmul, takes_float8x8
from qwen_moe_jax.kernels.scaled_matmul import scaled_matmul
from qwen_moe_jax.kernels.table import Kernels


def held_dtype(compute: DTypeLike, kernels: Kernels) -> jnp.dtype:
    """The dtype large matrices (and the key/value cache) have in memory.

    Args:
        compute: the model's compute dtype.
        kernels: what programs are compiled for, and which implementations run.
    """
    compute = jnp.dtype(compute)
    plain = kernels.target == "cpu" and kernels.pick("linear", compute.name, 1) != "native"
    return jnp.dtype(jnp.float32) if plain else compute


def linear(
    x: jax.Array, weight: Matrix, out_dtype: DTypeLike | None = None, *, kernels: Kernels | None = None
) -> jax.Array:
    """x @ weight^T, accumulated in float32 (or wider) and rounded once.

    Args:
        x: [..., in], the compute dtype.
        weight: [out, in], the held dtype. Where the two differ, the narrower one is widened, never x rounded.
            Codes with block scales are multiplied out in x.dtype, or widened by a kernel.
        out_dtype: what the product is rounded to; None means x.dtype.
        kernels: which implementation multiplies; None means plain XLA.

    Returns:
        [..., out] in out_dtype.
    """
    return linears(x, [weight], [out_dtype], kernels=kernels)[0]


def linears(
    x: jax.Array,
    weights: Sequence[Matrix],
    out_dtypes: Sequence[DTypeLike | None] | None = None,
    *,
    kernels: Kernels | None = None,
) -> list[jax.Array]:
    """Products of one x with several matrices, as of `linear`, which a C++ kernel takes together."""
    dtypes = [dtype or x.dtype for dtype in out_dtypes or [None] * len(weights)]
    chosen = [_chosen(x, weight, kernels) for weight in weights]
    if kernels is not None and set(chosen) == {"native"}:
        return native_linears(x, weights, dtypes, kernels.variant)
    if len(weights) > 1:
        pairs = zip(weights, dtypes, strict=True)
        return [linear(x, weight, dtype, kernels=kernels) for weight, dtype in pairs]
    weight, dtype = weights[0], dtypes[0]
    if isinstance(weight, BlockScaled) and kernels is not None and chosen[0].startswith("pallas_"):
        interpret = kernels.interpret
        if chosen == ["pallas_float8x8"] and takes_float8x8(weight):
            return [float8x8_matmul(x, weight, dtype, float8=kernels.float8, interpret=interpret)]
        return [scaled_matmul(x, weight, dtype, widening=kernels.kernel_widening, interpret=interpret)]
    return [_product(x, weight, dtype)]


def _chosen(x: jax.Array, weight: Matrix, kernels: Kernels | None) -> str:
    """The implementation that multiplies."""
    operation = "scaled" if isinstance(weight, BlockScaled) else "linear"
    return kernels.pick(operation, x.dtype.name, x.size // x.shape[-1]) if kernels else "products"


def _product(x: jax.Array, weight: Matrix, out_dtype: DTypeLike) -> jax.Array:
    """The plain XLA form."""
    if isinstance(weight, BlockScaled):
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
    return product.astype(out_dtype)

"""Random matrices of codes and block scales."""

import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import MatrixFormat


def random_codes(
    rng: np.random.Generator, shape: tuple[int, ...], form: MatrixFormat, dtype: str = "float32"
) -> BlockScaled:
    """A matrix or stack [..., out, in] whose rows have products of order one. Every finite code may occur."""
    values = rng.integers(0, 256, form.values_shape(shape)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, form.scales_shape(shape)) * shape[-1] ** -0.5
    if form.codes == "e4m3":
        values = np.where(values & 0x7F == 0x7F, 0x80, values).astype(np.uint8).view(form.of_codes.dtype)
        scales /= 100
    else:
        scales /= 2 ** (form.of_codes.bits - 1)
    zeros = rng.integers(0, 1 << form.of_codes.bits, scales.shape) if form.zeros else None
    return BlockScaled(
        jnp.asarray(values),
        jnp.asarray(scales.astype(jnp.dtype(form.scale_dtype))),
        form.block,
        jnp.dtype(dtype),
        "bits",
        form.codes,
        None if zeros is None else jnp.asarray(zeros, jnp.uint8),
    )

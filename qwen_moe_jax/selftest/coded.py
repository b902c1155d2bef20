"""Matrices in codes for checks of kernels, and what they stand for, by NumPy alone."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import MatrixFormat
from qwen_moe_jax.kernels.table import Kernels

FLOAT8 = "float8"
# of checkpoints that people have
FORMATS = {
    FLOAT8: MatrixFormat("e4m3", (128, 128)),
    "int4, groups of 128": MatrixFormat("int4", (1, 128), "bfloat16"),
    "int4 with zero points, groups of 32": MatrixFormat("int4", (1, 32), "float16", zeros=True),
    "int8, groups of 32": MatrixFormat("int8", (1, 32), "bfloat16"),
    "MXFP4": MatrixFormat("e2m1", (1, 32), "float8_e8m0fnu"),
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def in_codes(matrices: np.ndarray, form: MatrixFormat, target: str) -> BlockScaled:
    """A matrix, or a stack, on the device: float8 near the given numbers, other codes at random."""
    rng = np.random.default_rng(matrices.size)
    shape, widening = form.scales_shape(matrices.shape), Kernels(target).widening
    size = matrices.shape[-1] ** -0.5
    if form.codes == "e4m3":
        values = np.clip(matrices.astype(np.float32) * 64, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        size = 1 / 64
    else:
        values = rng.integers(0, 256, form.values_shape(matrices.shape), np.uint8)
        size /= 2 ** (form.of_codes.bits - 1)
    scales = (rng.uniform(0.5, 2, shape) * size).astype(jnp.dtype(form.scale_dtype))
    zeros = rng.integers(4, 12, shape).astype(np.uint8) if form.zeros else None
    return BlockScaled(
        jnp.asarray(values),
        jnp.asarray(scales),
        form.block,
        jnp.dtype("bfloat16"),
        widening,
        form.codes,
        None if zeros is None else jnp.asarray(zeros),
    )


def multiplied_out(matrix: BlockScaled) -> np.ndarray:
    """What it stands for, by NumPy, float32."""
    rows, columns = matrix.shape[-2:]

    def spread(blocks: Any) -> np.ndarray:
        wide = np.asarray(blocks).astype(np.float32).repeat(matrix.block[0], axis=-2)
        return wide.repeat(matrix.block[1], axis=-1)[..., :rows, :columns]

    codes = np.asarray(matrix.values)
    if matrix.codes in ("int4", "e2m1"):
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(matrix.shape)
    if matrix.codes == "e2m1":
        numbers = np.where(codes < 8, 1, -1) * _E2M1[codes & 7]
    else:
        numbers = codes.astype(np.float32)
    if matrix.codes.startswith("int"):
        numbers -= {"int4": 8, "int8": 128}[matrix.codes] if matrix.zeros is None else spread(matrix.zeros)
    return (numbers * spread(matrix.scales)).astype(np.float32)

"""FP8 matrices with a scale for each block of 128 x 128, as DeepSeek-V3 (arXiv:2412.19437, 3.3) stores them.

A matrix [out, in] is stored as float8_e4m3fn values of that shape and scales
[ceil(out / 128), ceil(in / 128)]; block by block, matrix = values * scale. The last blocks of a row or column
may be ragged. Checkpoints call the scales `weight_scale_inv`.
"""

import jax.numpy as jnp
import numpy as np

BLOCK = 128
E4M3 = np.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(E4M3).max)  # 448
# A block of nothing but denormals gets a normal scale, so that dividing by it stays finite.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The scales' shape of a matrix."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(matrix: np.ndarray, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Nearest float8 values under the smallest scale that lets a block's largest magnitude through.

    Args:
        matrix: finite float32 [out, in].
        scale_dtype: float32 or bfloat16. The values are divided by the scale as it is stored, so that its
            rounding costs nothing.

    Returns:
        (float8_e4m3fn [out, in], scales [ceil(out / 128), ceil(in / 128)]); a block of zeros has scale 1.
    """
    blocks = _blocks(matrix)
    largest = np.abs(blocks).max(axis=(1, 3))
    exact = np.where(largest > 0, np.maximum(largest / np.float32(LARGEST), _SMALLEST_SCALE), 1)
    scales = exact.astype(np.float32).astype(scale_dtype)
    scaled = blocks / scales.astype(np.float32)[:, None, :, None]
    # the stored scale may be a little smaller than the exact one
    values = np.clip(scaled, -LARGEST, LARGEST).astype(E4M3)
    return np.ascontiguousarray(_matrix(values, matrix.shape)), scales


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """values * scale, block by block, in float32 [out, in].

    Raises:
        ValueError: scales of another shape than the matrix needs.
    """
    if scales.shape != scale_shape(values.shape):
        raise ValueError(f"scales are {scales.shape}; expected {scale_shape(values.shape)}.")
    blocks = _blocks(values.astype(np.float32))
    return _matrix(blocks * scales.astype(np.float32)[:, None, :, None], values.shape)


def _blocks(matrix: np.ndarray) -> np.ndarray:
    """[out, in] -> [row blocks, 128, column blocks, 128], ragged ones filled up with zeros."""
    down, across = scale_shape(matrix.shape)
    missing = [(0, n * BLOCK - size) for n, size in zip((down, across), matrix.shape, strict=True)]
    padded = np.pad(matrix, missing) if any(n for _, n in missing) else matrix
    return padded.reshape(down, BLOCK, across, BLOCK)


def _matrix(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    down, _, across, _ = blocks.shape
    return blocks.reshape(down * BLOCK, across * BLOCK)[: shape[0], : shape[1]]

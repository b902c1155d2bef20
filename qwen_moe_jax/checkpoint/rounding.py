"""Matrices rounded to few bits: codes and scales, with the scales chosen to lose least.

Groups lie along a row. The scale of a group is tried at several fractions of the one that lets its largest
magnitude through, and the one with the least sum of squared errors is taken (as `mse` observers do in LLM
Compressor). Codes lie packed as `formats/codes.py` says.
"""

import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.formats.codes import CODES

# Fractions of the largest magnitude that scales are tried for.
_FRACTIONS = np.linspace(1.0, 0.7, 13, dtype=np.float32)

# Magnitudes of E2M1, by code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# Between them; on the border the even code wins, as in round-half-to-even.
_BORDERS = (_E2M1[1:] + _E2M1[:-1]) / 2

# Groups rounded at once.
_ROWS = 1 << 14


def round_integers(
    matrix: np.ndarray, codes: str, group: int, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers of 4 or 8 bits.

    Args:
        matrix: finite float32 [out, in].
        codes: "int4" or "int8".
        group: columns that share a scale; the last ones of a row may be fewer.
        scale_dtype: bfloat16, float16 or float32; codes are chosen for the scale as it is stored.

    Returns:
        (uint8 [out, in / packed], scales [out, ceil(in / group)]); a group of zeros has scale 1.
    """
    zero = CODES[codes].zero or 0
    groups, count = _groups(matrix, group)
    found = np.empty(groups.shape, np.uint8)
    scales = np.empty(len(groups), scale_dtype)
    for first in range(0, len(groups), _ROWS):
        part = groups[first : first + _ROWS]
        largest = np.abs(part).max(axis=1)
        least = np.full(len(part), np.inf, np.float32)
        for fraction in _FRACTIONS:
            scale = _stored(largest * fraction / (zero - 1), scale_dtype)
            wide = scale.astype(np.float32)[:, None]
            rounded = np.clip(np.rint(part / wide), -zero, zero - 1)
            error = ((rounded * wide - part) ** 2).sum(axis=1)
            better = error < least
            least[better] = error[better]
            found[first : first + _ROWS][better] = (rounded[better] + zero).astype(np.uint8)
            scales[first : first + _ROWS][better] = scale[better]
    values = found.reshape(matrix.shape[0], -1)[:, : matrix.shape[1]]
    return packed(values, codes), scales.reshape(matrix.shape[0], count)


def round_mxfp4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 with a power of two for each group of 32 (OCP Microscaling Formats 1.0).

    Of the power that the specification names and the next one, which clips nothing, the better one is taken.

    Args:
        matrix: finite float32 [out, in].

    Returns:
        (uint8 [out, in / 2], float8_e8m0fnu [out, ceil(in / 32)]).
    """
    groups, count = _groups(matrix, 32)
    found = np.empty(groups.shape, np.uint8)
    exponents = np.empty(len(groups), np.int32)
    for first in range(0, len(groups), _ROWS):
        part = groups[first : first + _ROWS]
        largest = np.abs(part).max(axis=1)
        floor = np.where(largest > 0, np.floor(np.log2(np.where(largest > 0, largest, 1))), 0)
        least = np.full(len(part), np.inf, np.float32)
        for more in (0, 1):
            # 6 = 1.5 * 2^2 is the largest magnitude
            exponent = np.clip(floor.astype(np.int32) - 2 + more, -127, 127)
            wide = np.ldexp(np.float32(1), exponent)[:, None].astype(np.float32)
            codes = _nearest_e2m1(part / wide)
            error = ((_values_e2m1(codes) * wide - part) ** 2).sum(axis=1)
            better = error < least
            least[better] = error[better]
            found[first : first + _ROWS][better] = codes[better]
            exponents[first : first + _ROWS][better] = exponent[better]
    values = found.reshape(matrix.shape[0], -1)[:, : matrix.shape[1]]
    scales = (exponents + 127).astype(np.uint8).view(jnp.float8_e8m0fnu)
    return packed(values, "e2m1"), scales.reshape(matrix.shape[0], count)


def packed(values: np.ndarray, codes: str) -> np.ndarray:
    """Codes, one a byte [out, in] -> as they are held, uint8 [out, in / packed].

    Raises:
        ValueError: an odd number of columns, of which two share a byte.
    """
    if CODES[codes].packed == 1:
        return np.ascontiguousarray(values)
    if values.shape[1] % 2:
        raise ValueError(f"{codes} packs 2 columns, and there are {values.shape[1]}.")
    return values[:, 0::2] | values[:, 1::2] << 4


def _groups(matrix: np.ndarray, group: int) -> tuple[np.ndarray, int]:
    """([groups, columns], groups a row); the last ones of a row are filled up with zeros."""
    rows, columns = matrix.shape
    count = -(-columns // group)
    if count * group != columns:
        matrix = np.pad(matrix, [(0, 0), (0, count * group - columns)])
    return matrix.reshape(rows * count, group), count


def _stored(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scales as they are stored; none is zero, so that dividing by it stays finite."""
    stored = np.where(scale > 0, scale, 1).astype(np.float32).astype(dtype)
    return np.where(stored.astype(np.float32) > 0, stored, np.array(1, dtype)).astype(dtype)


def _nearest_e2m1(values: np.ndarray) -> np.ndarray:
    magnitudes = np.abs(values)
    # a border belongs to the even code on one of its sides
    up = np.searchsorted(_BORDERS, magnitudes, side="right")
    down = np.searchsorted(_BORDERS, magnitudes, side="left")
    codes = np.where(up % 2 == 0, up, down)
    return (codes | np.where(np.signbit(values) & (codes > 0), 8, 0)).astype(np.uint8)


def _values_e2m1(codes: np.ndarray) -> np.ndarray:
    return np.where(codes & 8, -1, 1).astype(np.float32) * _E2M1[codes & 7]

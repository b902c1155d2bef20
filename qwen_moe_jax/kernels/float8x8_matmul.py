"""A product of 8-bit floats: activations quantised as they come, a float8 matrix with block scales.

    out[t, n] = sum over blocks b of 128 columns of  (q[t, b] . w[n, b]) * s[t, b] * scale[n, b]
    s[t, b] = max |x[t, b]| / 448,   q[t, b] = e4m3(x[t, b] / max(s[t, b], 1e-12))

with exact products summed in float32: what transformers computes of FP8 checkpoints on GPUs (DeepSeek-V3,
arXiv:2412.19437, 3.3). It rounds every activation to 4 bits of mantissa, so its results are not those of
the multiplied-out matrix.

Matrix units multiply e4m3fn on gfx950 and e4m3fnuz on gfx942. At the same bits the latter is worth half, and
the bits of -0 are its NaN; they become 0, and the product four times as much. So both give the same numbers.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import widened_scales
from qwen_moe_jax.kernels.grouped_matmul import up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch
from qwen_moe_jax.kernels.widen import both, masked_load, within

BLOCK = 128
_LARGEST = 448.0
_SHORTEST = 32  # columns of a step: what one instruction multiplies


def takes_float8x8(weight: BlockScaled) -> bool:
    """Whether the matrix is e4m3 in blocks that whole steps fit."""
    return weight.codes == "e4m3" and _step(weight) >= _SHORTEST


def float8x8_matmul(
    x: jax.Array, weight: BlockScaled, dtype: DTypeLike, *, float8: jnp.dtype, interpret: bool
) -> jax.Array:
    """x @ weight^T as above.

    Args:
        x: [..., in].
        weight: [out, in], one of those that `takes_float8x8`.
        dtype: of the result.
        float8: that is multiplied, float8_e4m3fn or float8_e4m3fnuz (`Kernels.float8`).
        interpret: as of `launch`.

    Returns:
        [..., out].
    """
    *leading, inner = x.shape
    tokens, out = prod(leading), weight.shape[0]
    values, scales = quantized(x.reshape(tokens, inner), float8)
    rows = min(128, up_to_power(tokens))
    columns = min(128 if rows >= 64 else 64, up_to_power(out))
    step = _step(weight)
    cost = KernelCost(
        flops=2.0 * pl.cdiv(tokens, rows) * rows * out * inner,
        bytes=weight.values.size
        + weight.scales.size * weight.scales.dtype.itemsize
        + tokens * (inner + scales.shape[1] * 4 + out * jnp.dtype(dtype).itemsize),
    )
    [result] = launch(
        partial(_kernel, tile=rows, columns=columns, step=step, block=weight.block, float8=float8),
        [
            lax.bitcast_convert_type(values, jnp.uint8),
            scales,
            lax.bitcast_convert_type(weight.values, jnp.uint8),
            widened_scales(weight.scales),
        ],
        [jax.ShapeDtypeStruct((tokens, out), dtype)],
        grid=(pl.cdiv(tokens, rows), pl.cdiv(out, columns)),
        name="float8x8_matmul",
        cost=cost,
        schedule=Schedule(warps=8 if rows >= 64 else 4, stages=2),
        interpret=interpret,
    )
    return result.reshape(*leading, out)


def quantized(x: jax.Array, float8: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Activations in blocks of 128 columns, the last of which may be shorter.

    Args:
        x: [tokens, columns].
        float8: of the result. In e4m3fnuz the numbers are half of those in e4m3fn, at the same bits.

    Returns:
        [tokens, columns] in `float8`; scales of the numbers in e4m3fn, float32 [tokens, ceil(columns / 128)].
    """
    tokens, columns = x.shape
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -columns % BLOCK))).reshape(tokens, -1, BLOCK)
    scales = jnp.abs(blocks).max(axis=-1) / _LARGEST
    values = blocks / jnp.maximum(scales, 1e-12)[..., None]
    if float8 == jnp.float8_e4m3fnuz:
        values = values / 2
    return values.astype(float8).reshape(tokens, -1)[:, :columns], scales


def _step(weight: BlockScaled) -> int:
    """Columns of a step: the most, up to a block of activations, in which a row has one scale."""
    width = weight.block[1]
    if width >= weight.shape[1]:
        return BLOCK
    return min(BLOCK, width & -width)


def _kernel(x_ref, s_ref, w_ref, scale_ref, out_ref, *, tile, columns, step, block, float8):
    tokens, out = out_ref.shape
    inner = x_ref.shape[1]
    row, column = pl.program_id(0) * tile, pl.program_id(1) * columns
    rows, lines = row + jnp.arange(tile), column + jnp.arange(columns)
    held, inside = within(row, tile, tokens), within(column, columns, out)
    # behind the borders the last one's, which is not stored
    token = jnp.minimum(rows, tokens - 1)
    down = jnp.minimum(lines // block[0], scale_ref.shape[0] - 1)

    def one(i: jax.Array, total: jax.Array) -> jax.Array:
        at = i * step
        across = within(at, step, inner)
        part = masked_load(x_ref.at[pl.ds(row, tile), pl.ds(at, step)], both(held, across, (tile, step)))
        matrix = masked_load(
            w_ref.at[pl.ds(column, columns), pl.ds(at, step)], both(inside, across, (columns, step))
        )
        product = plt.dot(_numbers(part, float8), _numbers(matrix, float8), trans_b=True)
        # array indices only: an interpreted kernel has no mixed ones
        of_tokens = plt.load(s_ref.at[*jnp.broadcast_arrays(token, at // BLOCK)])
        of_rows = plt.load(scale_ref.at[*jnp.broadcast_arrays(down, at // block[1])])
        if float8 == jnp.float8_e4m3fnuz:
            of_tokens = of_tokens * 4
        return total + product * (of_tokens[:, None] * of_rows[None, :])

    total = lax.fori_loop(0, pl.cdiv(inner, step), one, jnp.zeros((tile, columns), jnp.float32))
    plt.store(
        out_ref.at[pl.ds(row, tile), pl.ds(column, columns)],
        total.astype(out_ref.dtype),
        mask=both(held, inside, (tile, columns)),
    )


def _numbers(bits: jax.Array, float8: jnp.dtype) -> jax.Array:
    """Bits of e4m3fn, uint8 -> what is multiplied."""
    if float8 == jnp.float8_e4m3fnuz:
        bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
    return lax.bitcast_convert_type(bits, float8)

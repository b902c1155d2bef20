"""Products of sorted rows with the matrix of each row's group, for many rows a group or few.

    out[slot] = weights[group of slot] x[slot // slots_per_row]          (Pallas, lowered by Triton)

Slots are sorted by group and cut into tiles of one group each (`tiles.py`); a program computes one tile of
slots and one of columns. It gathers its rows of x and writes to its slots, wherever they lie: nothing is
copied into sorted order, and no matrix is copied at all. Only tiles that hold a slot are computed, so the
work follows the routing; a matrix is read once a tile of its group.

With `gated`, the matrices hold gate rows, then up rows, and what is written is silu(gate) * up: the first
product of a SwiGLU expert (Shazeer, arXiv:2002.05202), whose halves never meet the memory.

Products are bfloat16 (or float32) with float32 accumulation. Gate, up and the activation are each rounded to
x.dtype, as the plain forms do (`model/experts.py`). Float8 matrices are widened as they are read, multiplied
with the scales of their blocks and rounded to x.dtype.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch
from qwen_moe_jax.kernels.tiles import Tiles
from qwen_moe_jax.kernels.widen import tile_of


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """A program's part of a product.

    Attributes:
        columns: of the result.
        inner: of the contracted dimension, a step of its loop.
        schedule: for Triton.
    """

    columns: int
    inner: int
    schedule: Schedule


def grouped_matmul(
    x: jax.Array,
    weights: Matrix,
    tiles: Tiles,
    *,
    gated: bool,
    slots_per_row: int,
    sizes: TileSizes,
    expected_groups: float,
    widening: str,
    name: str,
    interpret: bool,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiplies every slot that has a group.

    Args:
        x: [rows, inner].
        weights: [groups, out, inner], or with `gated` [groups, 2 * out, inner]; x.dtype or float8.
        tiles: of the slots.
        gated: see above.
        slots_per_row: slot s reads row s // slots_per_row of x.
        sizes: of a program's part.
        expected_groups: how many groups have a slot, on average, for the cost.
        widening: how float8 becomes a number (`widen.py`).
        name: of the call in the compiled program.
        interpret: as of `launch`.
        dtype: of the result, rounded to from float32; None means x.dtype.

    Returns:
        [slots, out]. A slot without a group means nothing, and may hold anything.
    """
    rows, inner = x.shape
    out = weights.shape[1] // (2 if gated else 1)
    slots = rows * slots_per_row
    values, scales = split_matrix(weights)
    columns = min(sizes.columns, up_to_power(out))
    step = min(sizes.inner, up_to_power(inner))
    if isinstance(weights, BlockScaled):
        step = min(step, max(16, weights.block[1]))
    kernel = partial(
        _kernel,
        gated=gated,
        slots_per_row=slots_per_row,
        tile=tiles.rows,
        columns=columns,
        step=step,
        block=weights.block if isinstance(weights, BlockScaled) else None,
        widening=widening,
    )
    halves = 2 if gated else 1
    expected_tiles = tiles.expected(expected_groups)
    bytes_read = expected_groups * halves * out * inner * values.dtype.itemsize
    if scales is not None:
        bytes_read += expected_groups * scales[0].size * 4
    used = tiles.expected_slots
    cost = KernelCost(
        flops=2.0 * expected_tiles * tiles.rows * halves * out * inner,
        # a matrix is read once: the few tiles of a group run next to each other and share it in the cache
        bytes=bytes_read + used * (inner * x.dtype.itemsize + out * jnp.dtype(dtype or x.dtype).itemsize),
    )
    operands = [
        x,
        values,
        *([] if scales is None else [scales]),
        tiles.slots,
        tiles.group,
        tiles.start,
        tiles.stop,
    ]
    [result] = launch(
        kernel,
        operands,
        [jax.ShapeDtypeStruct((slots, out), dtype or x.dtype)],
        grid=(tiles.group.shape[0], pl.cdiv(out, columns)),
        name=name,
        cost=cost,
        schedule=sizes.schedule,
        interpret=interpret,
    )
    return result


def _kernel(x_ref, w_ref, *refs, gated, slots_per_row, tile, columns, step, block, widening):
    scale_ref = None
    if block is not None:
        scale_ref, *refs = refs
    slots_ref, group_ref, start_ref, stop_ref, out_ref = refs
    inner, out = x_ref.shape[1], out_ref.shape[1]
    number, column = pl.program_id(0), pl.program_id(1) * columns
    start, stop, group = start_ref[number], stop_ref[number], group_ref[number]

    @pl.when(start < stop)
    def _():
        held = start + jnp.arange(tile) < stop
        # rows of the tile without a slot point behind the last one, where nothing is read or written
        slots = plt.load(slots_ref.at[pl.ds(start, tile)], mask=held, other=out_ref.shape[0])
        rows = slots // slots_per_row

        def product(at: jax.Array, first: jax.Array, total: jax.Array) -> jax.Array:
            """total + x[rows, at:] times rows `first` and on of the group's matrix."""
            across = at + jnp.arange(step) < inner
            part = plt.load(
                x_ref.at[rows[:, None], at + jnp.arange(step)[None, :]],
                mask=held[:, None] & across[None, :],
                other=0,
            )
            inside = column + jnp.arange(columns) < out
            matrix = tile_of(
                w_ref,
                scale_ref,
                group,
                first,
                at,
                (columns, step),
                inside[:, None] & across[None, :],
                block,
                part.dtype,
                widening,
            )
            return total + plt.dot(part, matrix, trans_b=True)

        empty = jnp.zeros((tile, columns), jnp.float32)
        totals = sums(
            product, empty, gated=gated, steps=pl.cdiv(inner, step), step=step, column=column, out=out
        )
        result = gated_activation(totals, out_ref.dtype)
        inside = column + jnp.arange(columns) < out
        plt.store(
            out_ref.at[slots[:, None], column + jnp.arange(columns)[None, :]],
            result,
            mask=held[:, None] & inside[None, :],
        )


def sums(
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    empty: jax.Array,
    *,
    gated: bool,
    steps: int,
    step: int,
    column: jax.Array,
    out: int,
) -> tuple[jax.Array, ...]:
    """A program's products over all steps of the contracted dimension: (gate, up) if `gated`, else one.

    Args:
        product: (first contracted element, first row of the matrix, what was summed before) -> the sum after.
        empty: what sums begin with.
        gated: the matrix holds `out` gate rows, then up rows.
        steps, step: how many, and how long.
        column: of the result, the program's first.
        out: columns of the result.
    """
    firsts = (column, out + column) if gated else (column,)

    def one(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(product(i * step, first, total) for first, total in zip(firsts, totals, strict=True))

    return lax.fori_loop(0, steps, one, (empty,) * len(firsts))


def gated_activation(totals: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """silu(gate) * up of float32 sums, each rounded to `dtype` where the plain forms round; of a single sum
    itself, rounded."""
    if len(totals) == 1:
        return totals[0].astype(dtype)
    gate, up = (total.astype(dtype).astype(jnp.float32) for total in totals)
    active = (gate * (1 / (1 + jnp.exp(-gate)))).astype(dtype)
    return (active.astype(jnp.float32) * up).astype(dtype)


def split_matrix(weights: Matrix) -> tuple[jax.Array, jax.Array | None]:
    """(values, or the bits of float8 ones; their scales or None), as kernels take them."""
    if isinstance(weights, BlockScaled):
        return lax.bitcast_convert_type(weights.values, jnp.uint8), weights.scales
    return weights, None


def up_to_power(size: int) -> int:
    """The least power of two that is at least `size`, and 16, which is the least a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())

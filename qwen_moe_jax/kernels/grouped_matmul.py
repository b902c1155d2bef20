"""Products of sorted rows with the matrix of each row's group, for many rows a group or few.

    out[slot] = weights[group of slot] x[slot // slots_per_row]          (Pallas, lowered by Triton)

Slots are sorted by group and cut into tiles of one group each (`tiles.py`); a program computes one tile of
slots and one of columns. It gathers its rows of x and writes to its slots, wherever they lie: nothing is
copied into sorted order, and no matrix is copied at all. Only tiles that hold a slot are computed, so the
work follows the routing; a matrix is read once a tile of its group.

With `gated`, the matrices hold gate rows, then up rows, and what is written is silu(gate) * up: the first
product of a SwiGLU expert (Shazeer, arXiv:2002.05202), whose halves never meet the memory.

Products are bfloat16 (or float32) with float32 accumulation. Gate, up and the activation are each rounded to
x.dtype, as the plain forms do (`model/experts.py`). Codes are widened as they are read (`widen.py`). Scales
of blocks of 64 columns or more are multiplied into float32 sums; those of narrower ones into the matrix,
which is then rounded to x.dtype.
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
from qwen_moe_jax.kernels.widen import Place, Stored, both, bytes_of_one, masked_load, operands_of, within

# The least columns that a step is shortened to so that a row has one scale in it. In a shorter one a thread
# would load less than 16 bytes of 4-bit codes.
_SHORTEST = 64


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
        weights: [groups, out, inner], or with `gated` [groups, 2 * out, inner]; x.dtype, or codes.
        tiles: of the slots.
        gated: see above.
        slots_per_row: slot s reads row s // slots_per_row of x.
        sizes: of a program's part.
        expected_groups: how many groups have a slot, on average, for the cost.
        widening: how e4m3 becomes a number (`widen.py`).
        name: of the call in the compiled program.
        interpret: as of `launch`.
        dtype: of the result, rounded to from float32; None means x.dtype.

    Returns:
        [slots, out]. A slot without a group means nothing, and may hold anything.
    """
    rows, inner = x.shape
    out = weights.shape[1] // (2 if gated else 1)
    slots = rows * slots_per_row
    columns = min(sizes.columns, up_to_power(out))
    step = min(sizes.inner, up_to_power(inner))
    if isinstance(weights, BlockScaled):
        divisor = weights.block[1] & -weights.block[1]  # the largest power of two that is one
        step = min(step, divisor) if divisor >= _SHORTEST else step
    kernel = partial(
        _kernel,
        gated=gated,
        slots_per_row=slots_per_row,
        tile=tiles.rows,
        columns=columns,
        stored=Stored.of(weights, step, widening),
    )
    expected_tiles = min(tiles.expected(expected_groups), tiles.group.shape[0])  # of a single group all are
    of_slot = inner * x.dtype.itemsize + out * jnp.dtype(dtype or x.dtype).itemsize
    cost = KernelCost(
        flops=2.0 * expected_tiles * tiles.rows * weights.shape[1] * inner,
        # a matrix is read once: the few tiles of a group run next to each other and share it in the cache
        bytes=expected_groups * bytes_of_one(weights) + tiles.expected_slots * of_slot,
    )
    [result] = launch(
        kernel,
        [x, *operands_of(weights), tiles.slots, tiles.group, tiles.start, tiles.stop],
        [jax.ShapeDtypeStruct((slots, out), dtype or x.dtype)],
        grid=(tiles.group.shape[0], pl.cdiv(out, columns)),
        name=name,
        cost=cost,
        schedule=sizes.schedule,
        interpret=interpret,
    )
    return result


def _kernel(x_ref, *refs, gated, slots_per_row, tile, columns, stored):
    matrix_refs, refs = refs[: stored.operands], refs[stored.operands :]
    slots_ref, group_ref, start_ref, stop_ref, out_ref = refs
    inner, out, step = x_ref.shape[1], out_ref.shape[1], stored.step
    number, column = pl.program_id(0), pl.program_id(1) * columns
    start, stop, group = start_ref[number], stop_ref[number], group_ref[number]

    @pl.when(start < stop)
    def _():
        held = start + jnp.arange(tile) < stop
        # rows of the tile without a slot point behind the last one, where nothing is read or written
        slots = plt.load(slots_ref.at[pl.ds(start, tile)], mask=held, other=out_ref.shape[0])
        rows = slots // slots_per_row
        inside = within(column, columns, out)

        def product(i: jax.Array, first: jax.Array, total: jax.Array) -> jax.Array:
            """total + step i of x[rows] times rows `first` and on of the group's matrix."""
            across = i * step + jnp.arange(step)[None, :]
            mask = both(held, within(i * step, step, inner), (tile, step))
            part = masked_load(x_ref.at[rows[:, None], across], mask)
            matrix, scales = stored.tile(matrix_refs, Place(group, first, columns, i, inside), part.dtype)
            added = plt.dot(part, matrix, trans_b=True)
            return total + (added if scales is None else added * scales[None, :])

        empty = jnp.zeros((tile, columns), jnp.float32)
        totals = sums(product, empty, gated=gated, steps=pl.cdiv(inner, step), column=column, out=out)
        result = gated_activation(totals, out_ref.dtype)
        plt.store(
            out_ref.at[slots[:, None], column + jnp.arange(columns)[None, :]],
            result,
            mask=both(held, inside, (tile, columns)),
        )


def sums(
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    empty: jax.Array,
    *,
    gated: bool,
    steps: int,
    column: jax.Array,
    out: int,
) -> tuple[jax.Array, ...]:
    """A program's products over all steps of the contracted dimension: (gate, up) if `gated`, else one.

    Args:
        product: (step, first row of the matrix, what was summed before) -> the sum after.
        empty: what sums begin with.
        gated: the matrix holds `out` gate rows, then up rows.
        steps: how many.
        column: of the result, the program's first.
        out: columns of the result.
    """
    firsts = (column, out + column) if gated else (column,)

    def one(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(product(i, first, total) for first, total in zip(firsts, totals, strict=True))

    return lax.fori_loop(0, steps, one, (empty,) * len(firsts))


def gated_activation(totals: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """silu(gate) * up of float32 sums, each rounded to `dtype` where the plain forms round; of a single sum
    itself, rounded."""
    if len(totals) == 1:
        return totals[0].astype(dtype)
    gate, up = (total.astype(dtype).astype(jnp.float32) for total in totals)
    active = (gate * (1 / (1 + jnp.exp(-gate)))).astype(dtype)
    return (active.astype(jnp.float32) * up).astype(dtype)


def up_to_power(size: int) -> int:
    """The least power of two that is at least `size`, and 16, which is the least a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())

"""Products of single rows with the matrix of each one's group: for a few slots (decode).

    out[slot] = weights[groups_of_slots[slot]] x[slot // slots_per_row]   (Pallas, lowered by Triton)

A program reads some rows of one slot's matrix, once, in place. Nothing is sorted, and slots without a group
read nothing. Slots of the same group read its matrix once each, so this is for when they are few beside
groups; `gated`, roundings and float8 are as in `grouped_matmul.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.kernels.grouped_matmul import TileSizes, gated_activation, split_matrix, sums, up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, launch
from qwen_moe_jax.kernels.widen import tile_of


def gathered_matmul(
    x: jax.Array,
    weights: Matrix,
    groups_of_slots: jax.Array,
    *,
    gated: bool,
    slots_per_row: int,
    sizes: TileSizes,
    expected_slots: float,
    widening: str,
    name: str,
    interpret: bool,
) -> jax.Array:
    """Multiplies every slot that has a group; arguments and result as of `grouped_matmul`.

    Args:
        groups_of_slots: int32 [slots]; the number of groups or more means that the slot has none.
        expected_slots: that have a group, on average, for the cost.
    """
    rows, inner = x.shape
    out = weights.shape[1] // (2 if gated else 1)
    slots = rows * slots_per_row
    values, scales = split_matrix(weights)
    columns, step = min(sizes.columns, up_to_power(out)), min(sizes.inner, up_to_power(inner))
    block = weights.block if isinstance(weights, BlockScaled) else None
    if block is not None:
        step = min(step, max(16, block[1]))
    matrix_bytes = weights.shape[1] * inner * values.dtype.itemsize
    if scales is not None:
        matrix_bytes += scales[0].size * 4
    cost = KernelCost(
        flops=2.0 * expected_slots * weights.shape[1] * inner,
        bytes=expected_slots * (matrix_bytes + (inner + out) * x.dtype.itemsize),
    )
    [result] = launch(
        partial(
            _kernel,
            gated=gated,
            slots_per_row=slots_per_row,
            columns=columns,
            step=step,
            block=block,
            widening=widening,
        ),
        [x, values, *([] if scales is None else [scales]), groups_of_slots],
        [jax.ShapeDtypeStruct((slots, out), x.dtype)],
        grid=(pl.cdiv(out, columns), slots),
        name=name,
        cost=cost,
        schedule=sizes.schedule,
        interpret=interpret,
    )
    return result


def _kernel(x_ref, w_ref, *refs, gated, slots_per_row, columns, step, block, widening):
    scale_ref = None
    if block is not None:
        scale_ref, *refs = refs
    group_ref, out_ref = refs
    inner, out = x_ref.shape[1], out_ref.shape[1]
    column, slot = pl.program_id(0) * columns, pl.program_id(1)
    group = group_ref[slot]

    @pl.when(group < w_ref.shape[0])
    def _():
        row = slot // slots_per_row
        inside = column + jnp.arange(columns) < out

        def products(at: jax.Array, first: jax.Array, total: jax.Array) -> jax.Array:
            """total + rows `first` and on of the matrix times x, not yet summed over columns."""
            across = at + jnp.arange(step) < inner
            part = plt.load(x_ref.at[row, pl.ds(at, step)], mask=across, other=0)
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
            return total + matrix.astype(jnp.float32) * part.astype(jnp.float32)[None, :]

        empty = jnp.zeros((columns, step), jnp.float32)
        totals = sums(
            products, empty, gated=gated, steps=pl.cdiv(inner, step), step=step, column=column, out=out
        )
        result = gated_activation([total.sum(axis=1) for total in totals], out_ref.dtype)
        plt.store(out_ref.at[slot, pl.ds(column, columns)], result, mask=inside)

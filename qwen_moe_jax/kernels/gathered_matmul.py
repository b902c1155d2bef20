"""Products of single rows with the matrix of each one's group: for a few slots (decode).

    out[slot] = weights[groups_of_slots[slot]] x[slot // slots_per_row]   (Pallas, lowered by Triton)

A program reads some rows of one slot's matrix, once, in place. Nothing is sorted, and slots without a group
read nothing. Slots of the same group read its matrix once each, so this is for when they are few beside
groups; `gated` and roundings are as in `grouped_matmul.py`, but that codes times scales are not rounded: they
are float32 numbers here, as are the products.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.grouped_matmul import TileSizes, gated_activation, sums, up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, launch
from qwen_moe_jax.kernels.widen import Place, Stored, bytes_of_one, masked_load, operands_of, within


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
    columns, step = min(sizes.columns, up_to_power(out)), min(sizes.inner, up_to_power(inner))
    cost = KernelCost(
        flops=2.0 * expected_slots * weights.shape[1] * inner,
        bytes=expected_slots * (bytes_of_one(weights) + (inner + out) * x.dtype.itemsize),
    )
    [result] = launch(
        partial(
            _kernel,
            gated=gated,
            slots_per_row=slots_per_row,
            columns=columns,
            stored=Stored.of(weights, step, widening),
        ),
        [x, *operands_of(weights), groups_of_slots],
        [jax.ShapeDtypeStruct((slots, out), x.dtype)],
        grid=(pl.cdiv(out, columns), slots),
        name=name,
        cost=cost,
        schedule=sizes.schedule,
        interpret=interpret,
    )
    return result


def _kernel(x_ref, *refs, gated, slots_per_row, columns, stored):
    matrix_refs, refs = refs[: stored.operands], refs[stored.operands :]
    group_ref, out_ref = refs
    inner, out, step = x_ref.shape[1], out_ref.shape[1], stored.step
    column, slot = pl.program_id(0) * columns, pl.program_id(1)
    group = group_ref[slot]

    @pl.when(group < matrix_refs[0].shape[0])
    def _():
        row = slot // slots_per_row
        inside = within(column, columns, out)

        def products(i: jax.Array, first: jax.Array, total: jax.Array) -> jax.Array:
            """total + step i of rows `first` and on of the matrix times x, not yet summed over columns."""
            part = masked_load(x_ref.at[row, pl.ds(i * step, step)], within(i * step, step, inner))
            matrix = stored.numbers(matrix_refs, Place(group, first, columns, i, inside))
            return total + matrix * part.astype(jnp.float32)[None, :]

        empty = jnp.zeros((columns, step), jnp.float32)
        totals = sums(products, empty, gated=gated, steps=pl.cdiv(inner, step), column=column, out=out)
        result = gated_activation([total.sum(axis=1) for total in totals], out_ref.dtype)
        plt.store(out_ref.at[slot, pl.ds(column, columns)], result, mask=inside)

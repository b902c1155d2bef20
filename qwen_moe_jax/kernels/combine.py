"""The weighted sum of each token's expert outputs, of those that are held here (Pallas, lowered by Triton).

Outputs lie slot by slot, with room for all of a token's slots. Where experts are divided among ranks most of
them are elsewhere: plain XLA reads the whole array and drops what means nothing, this reads what was written.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.kernels.grouped_matmul import up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch

# Of a program: so that each of 256 threads loads 16 bytes of bfloat16.
_TOKENS, _COLUMNS = 8, 256


def combine_slots(
    outputs: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: int,
    *,
    expected_slots: float,
    interpret: bool,
) -> jax.Array:
    """Sums over slots in their order, in float32.

    Args:
        outputs: [tokens * top_k, hidden]; a slot without an expert may hold anything.
        expert_ids: int32 [tokens, top_k]; `experts` and more mean "none".
        weights: float32 [tokens, top_k].
        experts: held here.
        expected_slots: with an expert, on average, for the cost.
        interpret: as of `launch`.

    Returns:
        [tokens, hidden] in outputs.dtype, rounded to once.
    """
    tokens, top_k = expert_ids.shape
    hidden = outputs.shape[1]
    columns = min(_COLUMNS, up_to_power(hidden))
    size = outputs.dtype.itemsize
    [total] = launch(
        partial(_kernel, top_k=top_k, experts=experts, columns=columns),
        [outputs, expert_ids, weights],
        [jax.ShapeDtypeStruct((tokens, hidden), outputs.dtype)],
        grid=(pl.cdiv(hidden, columns), pl.cdiv(tokens, _TOKENS)),
        name="combine",
        cost=KernelCost(
            flops=2.0 * expected_slots * hidden,
            bytes=expected_slots * hidden * size + tokens * (size * hidden + 8.0 * top_k),
        ),
        schedule=Schedule(warps=4, stages=1),
        interpret=interpret,
    )
    return total


def _kernel(outputs_ref, ids_ref, weights_ref, total_ref, *, top_k, experts, columns):
    tokens, hidden = total_ref.shape
    token = pl.program_id(1) * _TOKENS + jnp.arange(_TOKENS)
    across = pl.program_id(0) * columns + jnp.arange(columns)
    mine = token < tokens

    def one_slot(slot: jax.Array, total: jax.Array) -> jax.Array:
        where = jnp.broadcast_arrays(token, slot)
        held = mine & (plt.load(ids_ref.at[*where], mask=mine, other=experts) < experts)
        weight = plt.load(weights_ref.at[*where], mask=held, other=0)
        mask = held[:, None] & (across < hidden)[None, :]
        rows = (token * top_k + slot)[:, None]
        part = plt.load(outputs_ref.at[rows, across[None, :]], mask=mask, other=0)
        return total + part.astype(jnp.float32) * weight[:, None]

    total = lax.fori_loop(0, top_k, one_slot, jnp.zeros((_TOKENS, columns), jnp.float32))
    inside = mine[:, None] & (across < hidden)[None, :]
    plt.store(total_ref.at[token[:, None], across[None, :]], total.astype(total_ref.dtype), mask=inside)

"""A few steps of the gated delta rule with the state read once and written once (Pallas, lowered by Triton).

The recurrence of `model/delta_rule.py`, per row and value head, with state S [Dk, Dv]:

    S <- S e^g;   d = (v - S^T k) beta;   S <- S + k d^T;   o = S^T q

A program holds some columns of one head's state in registers: they do not meet the other columns. Written as
products, XLA reads the state three times and writes it twice. The head's key and query are read where they
are, not repeated for each value head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch

_COLUMNS = 32  # of the state a program: 128 rows of them are 16 KiB of registers


def delta_step(
    state: jax.Array,
    slots: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    keep: bool = False,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Some tokens a row, one after another.

    Args:
        state: float32 [slots, heads, Dk, Dv], whose memory the new one takes over.
        slots: int32 [batch], the entry of each row; a row whose entry there is not changes none, and its
            output means nothing. No two rows have the same.
        query, key: float32 [batch, seq, key_heads, Dk]; value head h reads key head h // (heads / key_heads).
        value: [batch, seq, heads, Dv].
        g: float32 [batch, seq, heads], log decay.
        beta: float32 [batch, seq, heads], write strength.
        keep: the states stay as they are, and are not written.
        interpret: as of `launch`.

    Returns:
        (output float32 [batch, seq, heads, Dv], the states of all slots).
    """
    heads, key_dim, value_dim = state.shape[1:]
    batch, touched = slots.shape[0], slots.shape[0] * heads * key_dim * value_dim
    tokens = value.shape[1]
    width = min(_COLUMNS, 1 << (value_dim - 1).bit_length())
    length = 1 << (key_dim - 1).bit_length()
    results = [jax.ShapeDtypeStruct(value.shape, jnp.float32)]
    if not keep:
        results.append(jax.ShapeDtypeStruct(state.shape, jnp.float32))
    output, *changed = launch(
        partial(_kernel, ratio=heads // key.shape[2], tokens=tokens, width=width, length=length),
        [state, slots, query, key, value.astype(jnp.float32), g, beta],
        results,
        grid=(pl.cdiv(value_dim, width), heads, batch),
        name="delta_step",
        cost=KernelCost(
            flops=7.0 * touched * tokens,
            bytes=4.0 * ((2 - keep) * touched + query.size + key.size + 2 * value.size + g.size + beta.size),
        ),
        schedule=Schedule(warps=4, stages=1),
        interpret=interpret,
        # the states of before are not needed again
        aliases={} if keep else {0: 1},
    )
    return output, changed[0] if changed else state


def _kernel(
    state_ref, slot_ref, q_ref, k_ref, v_ref, g_ref, beta_ref, out_ref, *new_ref, ratio, tokens, width, length
):
    column, head, row = pl.program_id(0) * width, pl.program_id(1), pl.program_id(2)
    entries, _, key_dim, value_dim = state_ref.shape
    given = slot_ref[row]
    slot = jnp.clip(given, 0, entries - 1)
    held = (given >= 0) & (given < entries)
    down, across = jnp.arange(length) < key_dim, column + jnp.arange(width) < value_dim
    mask = down[:, None] & across[None, :]
    lines, columns = pl.ds(0, length), pl.ds(column, width)
    mine = mask & held
    state = plt.load(state_ref.at[slot, head, lines, columns], mask=mine, other=0)

    def one_token(token, state):
        key = plt.load(k_ref.at[row, token, head // ratio, lines], mask=down, other=0)
        query = plt.load(q_ref.at[row, token, head // ratio, lines], mask=down, other=0)
        value = plt.load(v_ref.at[row, token, head, columns], mask=across, other=0)
        state = state * jnp.exp(g_ref[row, token, head])
        recalled = jnp.sum(state * key[:, None], axis=0)
        correction = (value - recalled) * beta_ref[row, token, head]
        state = state + key[:, None] * correction[None, :]
        read = jnp.sum(state * query[:, None], axis=0)
        plt.store(out_ref.at[row, token, head, columns], read, mask=across)
        return state

    state = lax.fori_loop(0, tokens, one_token, state)
    for ref in new_ref:
        plt.store(ref.at[slot, head, lines, columns], state, mask=mine)

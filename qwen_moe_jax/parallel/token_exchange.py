"""Sending tokens to the ranks that hold their experts, and their outputs back.

A token goes to a rank once, however many of its experts are there, with the list of them. Every rank has
room for all tokens of every other, so that none is ever dropped: row s * tokens + p of what a rank receives
is the p-th token that rank s sent. `lax.ragged_all_to_all` moves only the rows there are; the padded
`lax.all_to_all` moves all of the room and gives the same, where a backend lacks the former (XLA:CPU).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_moe_jax.kernels.varying import vary_like


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """What this rank sends and receives.

    Attributes:
        needed: bool [ranks, tokens], whether a rank holds any of a token's experts.
        position: int32 [ranks, tokens], the token's place among those sent to the rank.
        sent: int32 [ranks], rows sent to each rank.
        received: int32 [ranks], rows from each.
        ids: int32 [ranks * tokens, top_k], slots of the stacks held here, of each row received.
        weights: float32 [ranks * tokens, top_k], of each row received.
        axis: of the mesh.
    """

    needed: jax.Array
    position: jax.Array
    sent: jax.Array
    received: jax.Array
    ids: jax.Array
    weights: jax.Array
    axis: str


def plan_exchange(
    ids: jax.Array, weights: jax.Array, held: int, none: int, axis: str, ranks: int
) -> ExchangePlan:
    """Plans from this rank's routing; exchanges ids and weights.

    Args:
        ids: int32 [tokens, top_k], global; expert e is held by rank e // held, and `ranks * held` by none.
        weights: float32 [tokens, top_k].
        held: routed experts a rank has room for.
        none: the slot that means "no expert" there.
        axis: of the mesh.
        ranks: its size.
    """
    tokens, top_k = ids.shape
    owner = ids // held
    there = owner[None] == jnp.arange(ranks)[:, None, None]  # [ranks, tokens, top_k]
    needed = there.any(axis=2)
    position = jnp.cumsum(needed, axis=1, dtype=jnp.int32) - 1
    sent = needed.sum(axis=1, dtype=jnp.int32)
    local = jnp.where(there, ids[None] - jnp.arange(ranks)[:, None, None] * held, none).astype(jnp.int32)
    # ids and the bits of the weights travel together, with the number of rows in front
    bits = lax.bitcast_convert_type(jnp.broadcast_to(weights, there.shape), jnp.int32)
    listed = _compact(jnp.concatenate([local, bits], axis=2), needed, position, fill=none)
    counts = jnp.broadcast_to(sent[:, None, None], (ranks, 1, 2 * top_k))
    letters = lax.all_to_all(jnp.concatenate([counts, listed], axis=1), axis, 0, 0)
    listed = letters[:, 1:].reshape(ranks * tokens, 2 * top_k)
    return ExchangePlan(
        needed=needed,
        position=position,
        sent=sent,
        received=letters[:, 0, 0],
        ids=listed[:, :top_k],
        weights=lax.bitcast_convert_type(listed[:, top_k:], jnp.float32),
        axis=axis,
    )


def exchange(x: jax.Array, plan: ExchangePlan, *, ragged: bool) -> jax.Array:
    """Each token to the ranks that need it: [tokens, width] -> [ranks * tokens, width], zeros where none."""
    ranks = plan.needed.shape[0]
    rows = _compact(jnp.broadcast_to(x, (ranks, *x.shape)), plan.needed, plan.position, fill=0)
    return _move(rows, plan.sent, plan.received, plan.axis, ragged)


def give_back(outputs: jax.Array, plan: ExchangePlan, *, ragged: bool, dtype: DTypeLike) -> jax.Array:
    """Outputs of received rows [ranks * tokens, width] to their owners, summed there in the order of ranks.

    Args:
        outputs: of the rows, in float32.
        plan: of their exchange.
        ragged: as of `exchange`.
        dtype: that they are rounded to and travel in.

    Returns:
        float32 [tokens, width].
    """
    ranks, tokens = plan.needed.shape
    rows = outputs.reshape(ranks, tokens, -1)
    returned = _move(rows.astype(dtype), plan.received, plan.sent, plan.axis, ragged)
    returned = returned.reshape(rows.shape).astype(outputs.dtype)
    found = jnp.take_along_axis(returned, jnp.maximum(plan.position, 0)[..., None], axis=1)
    found = jnp.where(plan.needed[..., None], found, 0)
    summed = found[0]
    for rank in range(1, ranks):
        summed = summed + found[rank]
    return summed


def _compact(rows: jax.Array, needed: jax.Array, position: jax.Array, fill: int) -> jax.Array:
    """[ranks, tokens, width] -> the needed rows of each rank first, `fill` behind them."""
    ranks, tokens, _ = rows.shape
    place = jnp.where(needed, position, tokens)
    start = vary_like(jnp.full_like(rows, fill), rows, needed)
    return start.at[jnp.arange(ranks)[:, None], place].set(rows, mode="drop", unique_indices=True)


def _move(rows: jax.Array, sent: jax.Array, received: jax.Array, axis: str, ragged: bool) -> jax.Array:
    """rows [ranks, tokens, width], the first sent[r] of which go to rank r -> [ranks * tokens, width]."""
    ranks, tokens, width = rows.shape
    if not ragged:
        return lax.all_to_all(rows, axis, 0, 0).reshape(ranks * tokens, width)
    flat = rows.reshape(ranks * tokens, width)
    # this rank's rows begin at the same place in every receiver's room
    offsets = jnp.arange(ranks, dtype=jnp.int32) * tokens
    there = vary_like(jnp.full(ranks, lax.axis_index(axis) * tokens, jnp.int32), rows)
    return lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), vary_like(offsets, rows), sent, there, received, axis_name=axis
    )

"""Moves of recurrent states between pools: into snapshots at a page's border, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.formats.cache import DeltaNetCache
from qwen_moe_jax.kernels.cpu.calls import native_move_states
from qwen_moe_jax.kernels.table import Kernels


def move_states(
    kernels: Kernels,
    to: tuple[DeltaNetCache, ...],
    given: tuple[DeltaNetCache, ...],
    places: jax.Array,
    sources: jax.Array,
) -> tuple[DeltaNetCache, ...]:
    """Copies entries of one pool to places of another. A decode step calls it every time, and mostly moves
    nothing.

    Args:
        kernels: those of C++ are used where they are loaded.
        to, given: a pool each layer.
        places: int32 [moves], entries of `to`; nothing goes to one that it has not.
        sources: int32 [moves], entries of `given`; one that it has not stands for a state that has seen
            nothing.
    """
    if kernels.native is not None:
        pools, others = jax.tree.leaves(to), jax.tree.leaves(given)
        moved = native_move_states(pools, others, places, sources, kernels.variant)
        return jax.tree.unflatten(jax.tree.structure(to), moved)
    entries, there = to[0].conv.shape[0], given[0].conv.shape[0]
    moves = places < entries
    # the moves first, without a sort
    turn = jnp.cumsum(moves) - 1
    numbers = jnp.arange(places.shape[0])
    order = jnp.zeros_like(numbers).at[jnp.where(moves, turn, places.shape[0])].set(numbers, mode="drop")

    def whose(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return places[order[index]], sources[order[index]]

    # The loop carries whose turn it is. Of a single move, XLA would else see that every turn copies the same
    # entry, and read that in front of the loop: in every step, whether anything moves or not.
    def one(index: jax.Array, carried: tuple[Any, ...]) -> tuple[Any, ...]:
        place, source, pools = carried

        def copied(pool: jax.Array, other: jax.Array) -> jax.Array:
            entry = lax.dynamic_index_in_dim(other, jnp.minimum(source, there - 1), keepdims=False)
            entry = jnp.where(source < there, entry, 0).astype(pool.dtype)
            return lax.dynamic_update_index_in_dim(pool, entry, place, axis=0)

        return *whose(index + 1), jax.tree.map(copied, pools, given)

    return lax.fori_loop(0, moves.sum(), one, (*whose(jnp.int32(0)), to))[-1]

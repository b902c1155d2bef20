"""Which mesh axes a value differs over, as JAX types it inside `jax.shard_map`; nothing outside of it."""

from typing import Any

import jax
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which ranks hold different values of x."""
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def unreduced_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which x is a part of a sum that is still to be taken."""
    aval = jax.typeof(x)
    return aval.mat.unreduced if hasattr(aval, "mat") else aval.sharding.spec.unreduced


def vary_like(start: jax.Array, *others: Any) -> jax.Array:
    """`start`, typed as varying over every axis that one of the others varies over.

    Others may be trees of arrays. For what a loop begins with: its type must be that of what the loop makes
    of it.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(others))) - varying_axes(start)
    return lax.pcast(start, tuple(sorted(axes)), to="varying") if axes else start

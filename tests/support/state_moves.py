"""Random moves of states, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.formats.cache import DeltaNetCache
from qwen_moe_jax.kernels.state_moves import move_states
from qwen_moe_jax.kernels.table import Kernels


def pools_of(rng: np.random.Generator, entries: int, dtype: str) -> tuple[DeltaNetCache, ...]:
    """Two layers' pools of random numbers."""
    return tuple(
        DeltaNetCache(
            conv=jnp.asarray(rng.normal(size=(entries, 3, 40)), dtype),
            state=jnp.asarray(rng.normal(size=(entries, 2, 8, 16)), jnp.float32),
        )
        for _ in range(2)
    )


def check_moves(seed: int, kernels: Kernels) -> None:
    """Some entries move, some become those of rows that have seen nothing, most stay; also of NaN."""
    rng = np.random.default_rng(seed)
    entries, there = (int(n) for n in rng.integers(1, 9, 2))
    dtype = ("float32", "bfloat16")[seed % 2]
    to, given = pools_of(rng, entries, dtype), pools_of(rng, there, dtype)
    bad = given[0].state.at[0, 0, 0, 0].set(jnp.nan)
    given = (DeltaNetCache(conv=given[0].conv, state=bad), given[1])
    moves = int(rng.integers(1, 2 * entries + 1))
    # no place twice, but for those that there are not
    places = np.full(moves, entries)
    some = rng.permutation(entries)[: rng.integers(0, min(entries, moves) + 1)]
    places[rng.permutation(moves)[: len(some)]] = some
    sources = rng.integers(0, there + 1, moves)

    def moved(before: jax.Array, other: jax.Array) -> np.ndarray:
        after = np.array(before)
        for place, source in zip(places, sources, strict=True):
            if place < entries:
                after[place] = other[source] if source < there else 0
        return after

    wanted = jax.tree.map(moved, to, given)
    run = jax.jit(lambda to, given, *lists: move_states(kernels, to, given, *lists), donate_argnums=0)
    found = run(to, given, places.astype(np.int32), sources.astype(np.int32))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

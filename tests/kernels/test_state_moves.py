"""Moves of recurrent states between pools, in both forms: which entries, and what steps without any cost."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.state_moves import check_moves, pools_of

from qwen_moe_jax.aot.hlo import Module
from qwen_moe_jax.kernels.state_moves import move_states
from qwen_moe_jax.kernels.table import Kernels, make_kernels

FORMS = {"xla": Kernels(target="cpu"), "native": make_kernels("cpu")}


@pytest.fixture(params=FORMS)
def kernels(request):
    found = FORMS[request.param]
    if request.param == "native" and found.native is None:
        pytest.skip("without the C++ kernels")
    return found


@pytest.mark.parametrize("seed", range(8))
def test_random_moves_are_those_of_numpy(kernels, seed):
    check_moves(seed, kernels)


def large_arrays(kernels: Kernels, rows: int, slots: int, dtype: str, *, moves: bool) -> list[str]:
    """What a decode loop's step makes of an entry's size or more, but for what the loop over moves does."""
    rng = np.random.default_rng(5)
    kept, states = pools_of(rng, 7, dtype), pools_of(rng, slots, dtype)

    def run(kept, states, length, sources, steps):
        def step(index, pools):
            kept, states = pools
            states = jax.tree.map(lambda x: x * 2, states)
            places = jnp.where((length + index) % 64 == 0, jnp.arange(rows), 7)
            return move_states(kernels, kept, states, places, sources) if moves else kept, states

        return lax.fori_loop(0, steps, step, (kept, states))

    lists = jnp.zeros(rows, jnp.int32), jnp.arange(rows)
    lowered = jax.jit(run, donate_argnums=(0, 1)).lower(kept, states, *lists, 5)
    module = Module(lowered.compile().as_text())
    loop = next(i for i in module.computations[module.entry] if i.opcode == "while")
    entry = min(x[0].size for pool in kept for x in (pool.conv, pool.state))
    handed_on = ("parameter", "get-tuple-element", "tuple", "while", "custom-call", "bitcast")
    return [
        str(shape.dims)
        for i in module.computations[loop.called("body") or ""]
        for shape in i.shapes
        if i.opcode not in handed_on and prod(shape.dims) >= entry
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (1, 4), (3, 4)])
def test_a_step_in_which_nothing_moves_copies_no_entry(kernels, dtype, rows, slots):
    if kernels.native is None and dtype == "bfloat16":
        pytest.skip("XLA:CPU widens bfloat16 pools, hence the form in C++")
    with_moves, without = (large_arrays(kernels, rows, slots, dtype, moves=m) for m in (True, False))
    assert sorted(with_moves) == sorted(without)

"""The delta rule's step as a kernel, interpreted, against the plain scan."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.slow import some

from qwen_moe_jax.kernels.delta_step import delta_step
from qwen_moe_jax.model.delta_rule import delta_rule_scan

# Sums of at most 128 products in another order, over the largest value.
TOLERANCE = 2e-6


def draw(batch: int, tokens: int, heads: int, key_heads: int, key_dim: int, value_dim: int) -> dict:
    rng = np.random.default_rng([batch, tokens, heads, key_dim, value_dim])

    def normal(*shape: int):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "state": normal(batch, heads, key_dim, value_dim),
        "query": normal(batch, tokens, key_heads, key_dim) / key_dim,
        "key": normal(batch, tokens, key_heads, key_dim) / key_dim**0.5,
        "value": normal(batch, tokens, heads, value_dim),
        "g": -rng.exponential(size=(batch, tokens, heads)).astype(np.float32),
        "beta": rng.uniform(size=(batch, tokens, heads)).astype(np.float32),
    }


SHAPES = [(1, 1, 8, 2, 128, 128), (3, 4, 4, 4, 24, 40), (2, 3, 6, 1, 16, 5), (5, 2, 2, 1, 7, 64)]


@pytest.mark.parametrize("shape", some([(shape,) for shape in SHAPES], lambda i: i == 1))
def test_the_kernel_equals_the_plain_scan(shape):
    given = draw(*shape)
    wanted, after = delta_rule_scan(**{name: jnp.asarray(x) for name, x in given.items()})
    # the rows' states in some slots of a larger pool, whose other entries stay as they are
    rng, batch = np.random.default_rng(shape), shape[0]
    slots = rng.permutation(batch + 3)[:batch].astype(np.int32)
    pool = rng.normal(size=(batch + 3, *given["state"].shape[1:])).astype(np.float32)
    untouched = pool.copy()
    pool[slots] = given.pop("state")
    output, states = delta_step(jnp.asarray(pool), jnp.asarray(slots), **given, interpret=True)
    for ours, theirs in ((output, wanted), (np.asarray(states)[slots], after)):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
    others = np.setdiff1d(np.arange(batch + 3), slots)
    np.testing.assert_array_equal(np.asarray(states)[others], untouched[others])
    looked, kept = delta_step(jnp.asarray(pool), jnp.asarray(slots), **given, keep=True, interpret=True)
    np.testing.assert_allclose(looked, output, rtol=0, atol=TOLERANCE * np.abs(output).max())
    np.testing.assert_array_equal(kept, pool)


def test_a_pad_leaves_the_state_as_it_is_bit_for_bit():
    given = draw(2, 2, 4, 2, 32, 32)
    for name in ("g", "beta", "key", "value"):
        given[name] = np.zeros_like(given[name])
    state = given.pop("state")
    _, after = delta_step(jnp.asarray(state), jnp.arange(2, dtype=jnp.int32), **given, interpret=True)
    np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("none", [2, 7, -1])
def test_a_row_without_a_slot_changes_nothing(none):
    given = draw(2, 3, 4, 2, 32, 32)
    state = given.pop("state")
    slots = jnp.asarray([none, 1], jnp.int32)
    _, after = delta_step(jnp.asarray(state), slots, **given, interpret=True)
    np.testing.assert_array_equal(after[0], state[0])
    assert np.abs(np.asarray(after[1]) - state[1]).max() > 0

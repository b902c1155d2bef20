"""The delta rule's step as a kernel, interpreted, against the plain step."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.kernels.delta_step import delta_step
from qwen_moe_jax.model.delta_rule import delta_rule_step

# Sums of at most 128 products in another order, over the largest value.
TOLERANCE = 2e-6


def draw(batch: int, heads: int, key_heads: int, key_dim: int, value_dim: int) -> dict:
    rng = np.random.default_rng([batch, heads, key_dim, value_dim])

    def normal(*shape: int):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "state": normal(batch, heads, key_dim, value_dim),
        "query": normal(batch, key_heads, key_dim) / key_dim,
        "key": normal(batch, key_heads, key_dim) / key_dim**0.5,
        "value": normal(batch, heads, value_dim),
        "g": -rng.exponential(size=(batch, heads)).astype(np.float32),
        "beta": rng.uniform(size=(batch, heads)).astype(np.float32),
    }


@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 128, 128), (3, 4, 4, 24, 40), (2, 6, 1, 16, 5), (5, 2, 1, 7, 64)]
)
def test_the_kernel_equals_the_plain_step(shape):
    given = draw(*shape)
    heads, key_heads = shape[1:3]
    repeated = {
        name: np.repeat(x, heads // key_heads, axis=1) if name in ("query", "key") else x
        for name, x in given.items()
    }
    wanted = delta_rule_step(**{name: jnp.asarray(x) for name, x in repeated.items()})
    found = delta_step(**{name: jnp.asarray(x) for name, x in given.items()}, interpret=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def test_a_pad_leaves_the_state_as_it_is_bit_for_bit():
    given = draw(2, 4, 2, 32, 32)
    for name in ("g", "beta", "key", "value"):
        given[name] = np.zeros_like(given[name])
    _, state = delta_step(**{name: jnp.asarray(x) for name, x in given.items()}, interpret=True)
    np.testing.assert_array_equal(state, given["state"])

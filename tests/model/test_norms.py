"""The norms against the reference's own classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.rounding import assert_within_ulps, to_numpy, to_torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeRMSNormGated,
    l2norm,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from qwen_moe_jax.model.norms import gated_rms_norm, l2_normalise, rms_norm

DTYPES = [jnp.float32, jnp.bfloat16]
EPS = 1e-6
ROWS = 64
rms = jax.jit(rms_norm, static_argnums=(2, 3))
gated = jax.jit(gated_rms_norm, static_argnums=3)
l2 = jax.jit(l2_normalise)

# Sums of squares in another order, two libraries' 1/sqrt and two products: at most 5 apart over 240 draws.
# silu's exponential adds one or two (at most 6 seen).
FLOAT32_ULPS = 8
GATED_FLOAT32_ULPS = 10
# The float32 differences above can only tip a rounding to the neighbouring bfloat16.
BFLOAT16_ULPS = 1


def draw(seed: int, dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x over six orders of magnitude with a row of zeros, a gate, and a weight; all of `dtype`."""
    rng = np.random.default_rng([seed, dim])
    x, gate = rng.normal(size=(2, ROWS, dim))
    x *= np.exp(rng.uniform(-7, 7, (ROWS, 1)))
    x[0] = 0
    gate *= 5  # silu from about -20 to 20: without the subnormal results that XLA:CPU flushes to zero
    return tuple(jnp.asarray(a, dtype) for a in (x, gate, rng.normal(0.2, 0.7, dim)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 20, 128])
def test_zero_centred_norm_equals_the_reference(dtype: jnp.dtype, dim: int) -> None:
    reference = Qwen3_5MoeRMSNorm(dim, eps=EPS)
    for seed in range(3):
        x, _, weight = draw(seed, dim, dtype)
        reference.weight.data = to_torch(weight)
        ours = rms(x, weight, EPS, 1.0)
        assert ours.dtype == dtype
        theirs = reference(to_torch(x)).detach()
        assert_within_ulps(ours, theirs, FLOAT32_ULPS if dtype == jnp.float32 else BFLOAT16_ULPS)


@pytest.mark.parametrize("dim", [1, 20, 128])
def test_plain_norm_equals_the_reference(dim: int) -> None:
    """In float32: the reference rounds to bfloat16 before the weight, ours only once."""
    reference = Qwen3MoeRMSNorm(dim, eps=EPS)
    for seed in range(3):
        x, _, weight = draw(seed, dim, jnp.float32)
        reference.weight.data = to_torch(weight)
        assert_within_ulps(rms(x, weight, EPS, 0.0), reference(to_torch(x)).detach(), FLOAT32_ULPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 128])
def test_gated_norm_equals_the_reference(dtype: jnp.dtype, dim: int) -> None:
    reference = Qwen3_5MoeRMSNormGated(dim, eps=EPS)
    for seed in range(3):
        x, gate, weight = draw(seed, dim, dtype)
        reference.weight.data = to_torch(weight)
        ours = gated(x, gate, weight, EPS)
        assert ours.dtype == dtype
        theirs = reference(to_torch(x), to_torch(gate)).detach()
        # a normed value one bfloat16 apart stays about one apart (two across a power of two)
        assert_within_ulps(ours, theirs, GATED_FLOAT32_ULPS if dtype == jnp.float32 else 2 * BFLOAT16_ULPS)


def test_a_float32_weight_counts_as_its_bfloat16_value_in_a_bfloat16_model() -> None:
    """Vectors are held in float32; the result must not depend on it."""
    x, gate, weight = draw(5, 128, jnp.bfloat16)
    held = weight.astype(jnp.float32)
    np.testing.assert_array_equal(to_numpy(rms(x, held, EPS, 1.0)), to_numpy(rms(x, weight, EPS, 1.0)))
    np.testing.assert_array_equal(to_numpy(gated(x, gate, held, EPS)), to_numpy(gated(x, gate, weight, EPS)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_norm_of_queries_and_keys_is_the_references_float32(dtype: jnp.dtype) -> None:
    x, *_ = draw(9, 24, dtype)
    ours = l2(x)
    assert ours.dtype == jnp.float32
    assert_within_ulps(ours, l2norm(to_torch(x).float()), FLOAT32_ULPS)
    assert (to_numpy(ours)[0] == 0).all(), "a zero vector stays zero"


def test_zero_centred_norm_scales_by_one_plus_weight() -> None:
    """A checkpoint whose weights were shifted already would show here as a factor of two."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 128)), jnp.float32)
    plain = to_numpy(rms(x, jnp.zeros(128), EPS, 1.0))
    np.testing.assert_allclose(np.sqrt(np.square(plain).mean(axis=-1)), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(to_numpy(rms(x, jnp.ones(128), EPS, 1.0)), 2 * plain)


def test_statistics_are_float32_also_where_bfloat16_squares_would_drown() -> None:
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)  # a bfloat16 sum of 4096 ones stops at 256
    np.testing.assert_array_equal(to_numpy(rms(x, jnp.zeros(4096, jnp.bfloat16), EPS, 1.0)), 1.0)
    assert torch.equal(Qwen3_5MoeRMSNorm(4096, EPS)(to_torch(x)), torch.ones(1, 4096).bfloat16())

"""Matrix products: one rounding, whatever dtype the weights are held in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.rounding import assert_within_ulps, to_numpy, to_torch

from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.linear import held_dtype, linear

product = jax.jit(linear)
SHAPES = [(1, 96, 40), (5, 33, 7), (16, 512, 64)]  # tokens, in, out
FLOAT32_EPS = 2.0**-24


def draw(shape: tuple[int, int, int], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    tokens, inner, outer = shape
    rng = np.random.default_rng(shape)
    return (
        jnp.asarray(rng.normal(size=(tokens, inner)), dtype),
        jnp.asarray(rng.normal(size=(outer, inner)), dtype),
    )


def rounded(x: np.ndarray) -> np.ndarray:
    """The exact product's nearest bfloat16 (by way of float64, where it is all but exact)."""
    return to_numpy(torch.from_numpy(x).to(torch.bfloat16))


@pytest.mark.parametrize("held", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_product_is_the_exact_one_rounded_once(shape: tuple[int, int, int], held: jnp.dtype) -> None:
    x, weight = draw(shape, jnp.bfloat16)
    ours = product(x, weight.astype(held))
    assert ours.dtype == jnp.bfloat16
    exact = to_numpy(x) @ to_numpy(weight).T
    # Float32 accumulation may tip a value beside a rounding boundary, or cancel: hence an absolute term, the
    # float32 sum's own error, for values far below the terms they are a sum of.
    noise = shape[1] * FLOAT32_EPS * (np.abs(to_numpy(x)) @ np.abs(to_numpy(weight)).T)
    apart = np.abs(to_numpy(ours) - rounded(exact))
    spacing = np.ldexp(1.0, np.frexp(np.abs(exact))[1] - 8)
    assert (apart <= spacing + noise).all()
    assert (apart == 0).mean() > 0.99, "beside a boundary, and only there, another value is right"


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_product_equals_torch(shape: tuple[int, int, int]) -> None:
    x, weight = draw(shape, jnp.bfloat16)
    theirs = torch.nn.functional.linear(to_torch(x), to_torch(weight))
    assert_within_ulps(product(x, weight.astype(jnp.float32)), theirs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_product_has_only_float32_error(shape: tuple[int, int, int]) -> None:
    x, weight = draw(shape, jnp.float32)
    error = np.abs(to_numpy(product(x, weight)) - to_numpy(x) @ to_numpy(weight).T)
    # the bound of any order of summation (Higham 2002, eq. 3.5)
    bound = shape[1] * FLOAT32_EPS * (np.abs(to_numpy(x)) @ np.abs(to_numpy(weight)).T)
    assert (error <= bound).all()


def test_float32_activations_are_not_rounded_to_a_narrower_weight() -> None:
    x, weight = draw(SHAPES[1], jnp.float32)
    weight = weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(product(x, weight), product(x, weight.astype(jnp.float32)))


def test_leading_dimensions_are_kept() -> None:
    x, weight = draw((6, 33, 7), jnp.float32)
    np.testing.assert_array_equal(
        product(x.reshape(2, 3, 33), weight), np.asarray(product(x, weight)).reshape(2, 3, 7)
    )


def test_matrices_are_held_in_the_compute_dtype_but_for_plain_xla_on_cpu() -> None:
    for compute in (jnp.float32, jnp.bfloat16):
        assert held_dtype(compute, Kernels("cpu")) == jnp.float32
        assert held_dtype(compute, Kernels("cpu", (("linear", "products"),), native="plain")) == jnp.float32
        assert held_dtype(compute, Kernels("cpu", native="plain")) == compute
        for target in ("gfx942", "gfx950", "gpu"):
            assert held_dtype(compute, Kernels(target)) == compute

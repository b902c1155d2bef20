"""The C++ kernels against plain XLA, in every variant that this processor runs."""

import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cpu_kernels import (
    BFLOAT16,
    CHUNK_SHAPES,
    CONV_SHAPES,
    DELTA_SHAPES,
    FLOAT32,
    attention_case,
    attention_cases,
    check_attention,
    check_conv,
    check_delta_chunks,
    check_delta_step,
    check_experts,
    check_linear,
    delta_case,
    draw_matrix,
    expert_case,
    expert_cases,
    linear_cases,
)
from support.slow import some

from qwen_moe_jax import make_mesh
from qwen_moe_jax.kernels.cpu.build import copy_finite, load, runnable_variants
from qwen_moe_jax.kernels.cpu.calls import (
    native_attention,
    native_delta_step,
    native_experts,
    native_linears,
)

if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

HERE = runnable_variants()


def native_linear(x, w, out, variant):
    return native_linears(x, [w], [out], variant)[0]


# each of the others takes a compiler half a minute, and is tested by slow tests
variants = pytest.mark.parametrize("variant", some(HERE, lambda i: i == 0))
FIRST = HERE[0]


@variants
def test_products_of_random_shapes(variant):
    for case in linear_cases(seed=1, count=24):
        check_linear(*case, variant)


@variants
def test_products_with_several_matrices_at_once(variant):
    rng = np.random.default_rng(14)
    for tokens in (1, 6, 50):
        x = jnp.asarray(rng.normal(size=(tokens, 96)), BFLOAT16)
        held = (BFLOAT16, "e4m3", FLOAT32, BFLOAT16)
        matrices = [draw_matrix(rng, (rows, 96), h) for rows, h in zip((700, 33, 1, 64), held, strict=True)]
        dtypes = [BFLOAT16, FLOAT32, FLOAT32, FLOAT32]
        together = jax.jit(lambda x, m: native_linears(x, m, dtypes, variant))(x, matrices)  # noqa: B023
        for found, matrix, dtype in zip(together, matrices, dtypes, strict=True):
            np.testing.assert_array_equal(found, native_linear(x, matrix, dtype, variant))


@variants
def test_expert_layers_of_random_shapes(variant):
    for index, given in enumerate(expert_cases(seed=2, count=10)):
        check_experts(given, variant, by_slot=index % 4 == 3)


@variants
@pytest.mark.parametrize("tokens", [3, 300])
def test_one_expert_may_have_every_slot(variant, tokens):
    given = expert_case(3, tokens, 2, 5, 40, 24, BFLOAT16, BFLOAT16)
    given["expert_ids"] = jnp.full((tokens, 2), 3, jnp.int32)
    check_experts(given, variant)


@variants
def test_without_any_expert_the_sum_is_zero(variant):
    given = expert_case(4, 9, 2, 5, 32, 24, FLOAT32, FLOAT32)
    given["expert_ids"] = jnp.full((9, 2), 5, jnp.int32)
    found = jax.jit(lambda given: native_experts(**given, variant=variant))(given)
    np.testing.assert_array_equal(found, np.zeros((9, 32)))


@variants
def test_a_token_s_slots_do_not_depend_on_the_other_experts_here(variant):
    given = expert_case(5, 60, 3, 8, 64, 32, BFLOAT16, BFLOAT16)
    run = jax.jit(lambda given: native_experts(**given, variant=variant, by_slot=True))
    whole = np.asarray(run(given))
    lower, upper = (
        given | {"expert_ids": jnp.where(here, given["expert_ids"], 8)}
        for here in (given["expert_ids"] < 4, given["expert_ids"] >= 4)
    )
    np.testing.assert_array_equal(np.asarray(run(lower)) + np.asarray(run(upper)), whole)


@variants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_a_convolution_and_what_follows_it(variant, shape, dtype):
    check_conv(shape, dtype, variant)


@variants
@pytest.mark.parametrize("shape", DELTA_SHAPES)
def test_a_step_of_the_delta_rule(variant, shape):
    check_delta_step(delta_case(6, *shape), variant)


@variants
@pytest.mark.parametrize("shape", CHUNK_SHAPES)
def test_chunks_of_the_delta_rule(variant, shape):
    check_delta_chunks(shape, variant)


@variants
def test_attention_of_random_shapes(variant):
    for given in attention_cases(seed=7, count=8):
        check_attention(given, variant)


@variants
def test_a_row_s_attention_does_not_depend_on_the_others_of_its_batch(variant):
    given = attention_case(12, 3, 1, 2, 4, 64, 3000, FLOAT32, FLOAT32)
    run = jax.jit(functools.partial(native_attention, variant=variant))
    together = run(**given)[0]
    for row in range(3):
        cache = given["cache"]
        mine = {name: x[row : row + 1] for name, x in given.items() if name != "cache"}
        alone = run(**mine, cache=cache)[0]
        np.testing.assert_array_equal(alone[0], together[row])


@variants
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 20, 40])
@pytest.mark.parametrize("held", [FLOAT32, BFLOAT16])
def test_nan_and_infinities_reach_their_own_results_only(variant, held, tokens):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(tokens, 70)).astype(np.float32)
    w = rng.normal(size=(40, 70)).astype(np.float32)
    x[0, 69], w[39, 3] = np.nan, np.inf
    found = np.asarray(native_linear(jnp.asarray(x, held), jnp.asarray(w, held), FLOAT32, variant))
    assert np.isnan(found[0]).all()
    assert np.isinf(found[1:, 39]).all()
    assert np.isfinite(found[1:, :39]).all()


@variants
def test_a_nan_passes_through_experts_and_the_delta_rule(variant):
    given = expert_case(9, 6, 2, 4, 32, 16, BFLOAT16, BFLOAT16)
    given["expert_ids"] = jnp.asarray([[0, 1]] * 6, jnp.int32)
    given["x"] = given["x"].at[2, 5].set(jnp.nan)
    found = np.asarray(native_experts(**given, variant=variant))
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()
    step = delta_case(9, 2, 1, 1, 2, (16, 16))
    step["value"] = step["value"].at[0, 0, 1, 4].set(jnp.nan)
    output, state = native_delta_step(**step, slots=jnp.arange(2, dtype=jnp.int32), variant=variant)
    assert np.isnan(output[0, 0, 1, 4])
    assert np.isnan(state[0, 1, :, 4]).all()
    assert np.isfinite(np.delete(np.asarray(output).ravel(), 20)).all()


@variants
@pytest.mark.parametrize("tokens", [1, 30])
def test_denormals_count_as_zero_or_as_themselves(variant, tokens):
    # XLA's threads flush them, and so do tiles; either way a sum is off by less than they are large
    rng = np.random.default_rng(10)
    tiny = 2.0**-130
    w = jnp.asarray(rng.choice([tiny, 1.0], (33, 64)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(tokens, 64)), jnp.bfloat16)
    found = native_linear(x, w, FLOAT32, variant)
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, "float8_e4m3fn"])
def test_a_copy_finds_every_value_that_is_not_finite(dtype):
    load(FIRST)
    rng = np.random.default_rng(16)
    for count in (1, 7, 64, 129, 1000):
        values = rng.normal(size=count).astype(jnp.dtype(dtype))
        out = np.empty_like(values)
        assert copy_finite(out, values) is True
        np.testing.assert_array_equal(out.view(np.uint8), values.view(np.uint8))
        for bad in (np.nan, -np.nan) if dtype == "float8_e4m3fn" else (np.nan, np.inf, -np.inf):
            place = int(rng.integers(count))
            damaged = values.copy()
            damaged[place] = bad
            assert copy_finite(out, damaged) is False
            np.testing.assert_array_equal(out.view(np.uint8), damaged.view(np.uint8))


@variants
def test_the_state_and_the_caches_change_where_they_lie(variant):
    given = delta_case(11, 2, 3, 2, 2, (16, 16)) | {"slots": jnp.asarray([1, 0], jnp.int32)}
    step = jax.jit(lambda state, rest: native_delta_step(state, **rest, variant=variant), donate_argnums=0)
    state = given.pop("state")
    compiled = step.lower(state, given).compile()
    assert "copy" not in compiled.as_text()
    before = state.unsafe_buffer_pointer()
    _, after = compiled(state, given)
    assert after.unsafe_buffer_pointer() == before


def test_kernels_of_many_devices_run_at_once_without_waiting_for_each_other():
    x = jnp.asarray(np.random.default_rng(12).normal(size=(8, 64, 256)), jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(13).normal(size=(512, 256)), jnp.bfloat16)
    mesh = make_mesh(data=8)
    spec = jax.sharding.PartitionSpec("data")

    def on_a_rank(x, w):
        for _ in range(30):
            x = x + native_linear(x, w, BFLOAT16, FIRST)[..., :256] * 1e-3
        return x

    run = jax.jit(
        jax.shard_map(on_a_rank, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    )
    found = run(x, w)
    alone = jax.jit(on_a_rank)(x[3], w)
    np.testing.assert_array_equal(found[3], alone)

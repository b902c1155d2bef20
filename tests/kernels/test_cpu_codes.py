"""Products of codes and block scales by the C++ kernels, against NumPy in float64."""

import functools
import itertools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cpu_kernels import (
    BFLOAT16,
    BLOCKS,
    FLOAT32,
    SCALE_DTYPES,
    check_experts,
    check_product,
    draw_codes,
    expert_case,
    multiplied_out,
)
from support.slow import some

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.kernels.cpu.build import runnable_variants
from qwen_moe_jax.kernels.cpu.calls import native_experts, native_linears

if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

variants = pytest.mark.parametrize("variant", some(runnable_variants(), lambda i: i == 0))
# Every number format, with zero points of its own where it can have them.
FORMATS = [
    (codes, zeros) for codes in CODES for zeros in (False, True) if not zeros or codes.startswith("int")
]
formats = pytest.mark.parametrize(("codes", "zeros"), FORMATS)


@functools.partial(jax.jit, static_argnums=(2, 3))
def products(x: jax.Array, matrices: list[BlockScaled], out: str, variant: str) -> list[jax.Array]:
    return native_linears(x, matrices, [out] * len(matrices), variant)


@variants
@formats
@pytest.mark.parametrize("dtype", some([BFLOAT16, FLOAT32], lambda i: i == 0))
def test_products_of_any_blocks_scales_and_tokens(variant, codes, zeros, dtype):
    rng = np.random.default_rng([18, *codes.encode(), zeros])
    sizes = itertools.cycle([(1, 33, 96), (2, 7, 130), (5, 32, 1024), (8, 1, 64), (17, 31, 1026)])
    for first in range(0, len(BLOCKS), 3):
        some = [(block, scales) for block in BLOCKS[first : first + 3] for scales in SCALE_DTYPES]
        for tokens, rows, depth in (next(sizes), (int(rng.integers(1, 41)), 40, 258)):
            x = jnp.asarray(rng.normal(size=(tokens, depth)), dtype)
            matrices = [draw_codes(rng, (rows, depth), codes, *each, zeros) for each in some]
            out = str(rng.choice([FLOAT32, BFLOAT16]))
            for found, matrix in zip(products(x, matrices, out, variant), matrices, strict=True):
                check_product(found, x, matrix, out, variant)


@variants
@formats
@pytest.mark.parametrize("tokens", some([1, 2, 5, 15, 40], lambda i: i in (0, 3)))
def test_a_token_that_is_one_at_one_element_reads_that_column_exactly(variant, codes, zeros, tokens):
    # scales are powers of two, so that nothing is rounded: each code is read, and where it is
    rng = np.random.default_rng([19, tokens])
    for rows, depth in ((3, 40), (33, 300)):
        matrices = [draw_codes(rng, (rows, depth), codes, block, "float8_e8m0fnu", zeros) for block in BLOCKS]
        exact = [multiplied_out(matrix)[0] for matrix in matrices]
        for first in range(0, depth, tokens) if depth == 40 else (0, 100, depth - tokens):
            x = jnp.asarray(np.eye(depth)[first : first + tokens], BFLOAT16)
            for found, numbers in zip(products(x, matrices, FLOAT32, variant), exact, strict=True):
                columns = numbers[:, first : first + tokens]
                np.testing.assert_array_equal(np.asarray(found, np.float64), columns.T)


@variants
@pytest.mark.parametrize("codes", CODES)
def test_every_code_is_read_exactly(variant, codes):
    every = np.arange(256, dtype=np.uint8)[:, None]
    if codes == "e4m3":
        every = every[(every & 0x7F) != 0x7F][:, None].view(jnp.float8_e4m3fn)
    depth = CODES[codes].packed
    scales = jnp.ones((len(every), 1), jnp.float32)
    matrix = BlockScaled(jnp.asarray(every), scales, (1, depth), jnp.dtype(FLOAT32), "bits", codes)
    for tokens in (1, 20):
        x = jnp.tile(jnp.eye(depth, dtype=FLOAT32), (tokens, 1))
        found = np.asarray(products(x, [matrix], FLOAT32, variant)[0])
        np.testing.assert_array_equal(found, np.tile(multiplied_out(matrix)[0].T, (tokens, 1)))


@variants
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_every_scale_is_read_exactly(variant, dtype, tokens):
    if dtype == "float8_e8m0fnu":
        bits = np.arange(1, 255, dtype=np.uint8)  # 2^-127 is subnormal in float32
    elif dtype == FLOAT32:
        bits = np.random.default_rng(20).integers(1 << 23, 255 << 23, 1000, np.uint32)
    else:
        bits = np.arange(1 << 16, dtype=np.uint16)
    scales = bits.view(jnp.dtype(dtype))
    wide = scales.astype(np.float32)
    # a float16's subnormal numbers are none in float32
    kept = np.isfinite(wide) & ((np.abs(wide) >= np.finfo(np.float32).tiny) | (wide == 0))
    scales, wide = scales[kept], wide[kept]
    ones = jnp.full((len(scales), 1), 129, jnp.uint8)
    matrix = BlockScaled(ones, jnp.asarray(scales[:, None]), (1, 1), jnp.dtype(FLOAT32), "bits", "int8")
    found = products(jnp.ones((tokens, 1), FLOAT32), [matrix], FLOAT32, variant)[0]
    np.testing.assert_array_equal(found, np.tile(wide, (tokens, 1)))


@variants
@formats
def test_expert_layers(variant, codes, zeros):
    rng = np.random.default_rng([21, *codes.encode(), zeros])
    for index, tokens in enumerate((1, 3, 16, 40)):
        hidden, inner = ((64, 32), (130, 70), (18, 256), (256, 96))[index]
        dtype = (BFLOAT16, FLOAT32)[index % 2]
        given = expert_case(22 + index, tokens, 3, 6, hidden, inner, dtype, FLOAT32)
        for name, shape in (("gate_up", (6, 2 * inner, hidden)), ("down", (6, hidden, inner))):
            block, scales = BLOCKS[rng.integers(len(BLOCKS))], str(rng.choice(SCALE_DTYPES))
            given[name] = draw_codes(rng, shape, codes, block, scales, zeros)
        assert (np.asarray(given["expert_ids"]) == 6).any() or tokens == 1
        check_experts(given, variant, by_slot=index == 2)


@variants
@formats
def test_one_expert_may_have_every_slot_and_the_others_none(variant, codes, zeros):
    rng = np.random.default_rng([23, *codes.encode(), zeros])
    given = expert_case(24, 150, 2, 5, 64, 32, BFLOAT16, FLOAT32)
    given["gate_up"] = draw_codes(rng, (5, 64, 64), codes, (1, 32), "float16", zeros)
    given["down"] = draw_codes(rng, (5, 64, 32), codes, (1, 32), "float16", zeros)
    given["expert_ids"] = jnp.full((150, 2), 3, jnp.int32)
    check_experts(given, variant)
    given["expert_ids"] = jnp.full((150, 2), 5, jnp.int32)
    found = jax.jit(lambda given: native_experts(**given, variant=variant))(given)
    np.testing.assert_array_equal(found, np.zeros((150, 64)))


@variants
@formats
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_nan_reaches_its_own_token_only(variant, codes, zeros, tokens):
    rng = np.random.default_rng(25)
    x = rng.normal(size=(tokens, 70)).astype(np.float32)
    x[1, 69] = np.nan
    matrix = draw_codes(rng, (40, 70), codes, (1, 32), "float16", zeros)
    found = np.asarray(products(jnp.asarray(x), [matrix], FLOAT32, variant)[0])
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


def test_scales_and_zero_points_that_do_not_fit_are_refused():
    variant = runnable_variants()[0]
    rng = np.random.default_rng(26)
    x = jnp.ones((1, 64), FLOAT32)
    right = draw_codes(rng, (8, 64), "int4", (1, 32), FLOAT32, True)
    for changed in (
        {"scales": right.scales[:, :1]},
        {"scales": right.scales[:4]},
        {"scales": right.scales.astype(jnp.int32)},
        {"zeros": right.zeros[:, :1]},
        {"zeros": right.zeros.astype(jnp.int32)},
        {"codes": "e2m1"},  # has no zero points
        {"codes": "e4m3"},  # is not held in bytes
    ):
        names = ("values", "scales", "block", "dtype", "widening", "codes", "zeros")
        wrong = BlockScaled(**({name: getattr(right, name) for name in names} | changed))
        x_fits = jnp.ones((1, wrong.shape[1]), FLOAT32)
        with pytest.raises(Exception, match="linear: a matrix"):
            jax.block_until_ready(products(x_fits, [wrong], FLOAT32, variant))
    assert products(x, [right], FLOAT32, variant)[0].shape == (1, 8)

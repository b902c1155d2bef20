"""The kernels that widen codes, interpreted, against the multiplied-out matrices in plain XLA."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.coded import random_codes
from support.routed import routed_inputs
from support.slow import some

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import CODES, MatrixFormat
from qwen_moe_jax.kernels.experts import gathered_kernels, grouped_kernels
from qwen_moe_jax.kernels.float8x8_matmul import float8x8_matmul, quantized, takes_float8x8
from qwen_moe_jax.kernels.launch import COST
from qwen_moe_jax.kernels.scaled_matmul import scaled_matmul
from qwen_moe_jax.kernels.table import IMPLEMENTATIONS, TARGETS, Kernels, make_kernels
from qwen_moe_jax.kernels.widen import Stored
from qwen_moe_jax.model.experts import dense_experts
from qwen_moe_jax.model.linear import linear

KERNELS = {"gathered": gathered_kernels, "grouped": grouped_kernels}

# Sums of at most 300 float32 products in another order, largest difference over the largest value.
FLOAT32_TOLERANCE = 3e-6
# Of the largest slot: gate, up, the activation and the output are rounded to either of two bfloat16 where a
# sum is near their middle (2^-8), the first three before an average.
BFLOAT16_TOLERANCE = 3 * 2.0**-8

# Groups along a row; blocks as published and granules of them; one scale a row; blocks that fit no step.
BLOCKS = [(1, 16), (1, 32), (1, 64), (1, 128), (128, 128), (64, 64), (1, 1000), (8, 48)]
SCALES = ["float32", "bfloat16", "float16", "float8_e8m0fnu"]


def every_form() -> list[MatrixFormat]:
    """All codes in all blocks; dtypes of scales and zero points take turns, and meet all codes."""
    forms = []
    for row, codes in enumerate(CODES.values()):
        for column, block in enumerate(BLOCKS):
            zeros = codes.zero is not None and column % 2 == 1
            forms.append(MatrixFormat(codes.name, block, SCALES[(row + column) % 4], zeros))
    return forms


def name_of(form: MatrixFormat) -> str:
    return f"{form.codes}-{form.block[0]}x{form.block[1]}-{form.scale_dtype}" + "-zeros" * form.zeros


FORMS = every_form()
every = pytest.mark.parametrize(
    "form",
    # a few of every row of the table, and all of them in slow runs
    [
        pytest.param(form, id=name_of(form), marks=[pytest.mark.slow] * ((i + i // len(BLOCKS)) % 5 > 0))
        for i, form in enumerate(FORMS)
    ],
)


def rounds(form: MatrixFormat, columns: int) -> bool:
    """Whether numbers times scales are rounded: blocks are narrower than a step, scales no powers of two."""
    narrow = form.block[1] < 64 and form.block[1] < columns
    return narrow and form.scale_dtype != "float8_e8m0fnu"


def assert_near(found: jax.Array, wanted: jax.Array, tolerance: float = FLOAT32_TOLERANCE) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@every
def test_one_matrix_equals_the_plain_product(form):
    """In bfloat16, with codes and products that are exact; of odd sizes."""
    rng = np.random.default_rng(FORMS.index(form))
    tokens = int(rng.choice([1, 7, 16, 33]))
    x = jnp.asarray(rng.normal(size=(1, tokens, 202)), jnp.bfloat16)
    matrix = random_codes(rng, (91, 202), form)
    found = scaled_matmul(x, matrix, jnp.float32, widening="bits", interpret=True)
    exact, rounded = (matrix.multiplied_out(dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert_near(found, linear(x, rounded if rounds(form, 202) else exact, jnp.float32))


def test_the_test_above_tells_rounded_numbers_from_exact_ones():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 202)), jnp.bfloat16)
    matrix = random_codes(rng, (91, 202), MatrixFormat("int4", (1, 128)))
    exact, rounded = (
        linear(x, matrix.multiplied_out(dtype), jnp.float32) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert np.abs(exact - rounded).max() > 10 * FLOAT32_TOLERANCE * np.abs(exact).max()


def draw(shape: tuple[int, ...], form: MatrixFormat, dtype: str, seed: int = 0) -> dict[str, Any]:
    """As of `routed_inputs`, with matrices of codes."""
    rng = np.random.default_rng([seed, *shape])
    return routed_inputs(rng, shape, dtype, lambda stack: random_codes(rng, stack, form))


def run(kernel: str, given: dict[str, Any], **options: Any) -> jax.Array:
    settings = {"chance": 0.1, "widening": "bits", "interpret": True} | options
    return jax.jit(lambda given: KERNELS[kernel](**given, **settings))(given)


def wanted(given: dict[str, Any], **options: Any) -> jax.Array:
    plain = {name: given[name].multiplied_out(jnp.float32) for name in ("gate_up", "down")}
    return dense_experts(**given | plain, **options)


# each codes, in a group that whole steps fit and in one that several of fit a step
EXPERT_FORMS = [
    MatrixFormat("int4", (1, 128), "bfloat16"),
    MatrixFormat("int4", (1, 32), "float16", zeros=True),
    MatrixFormat("e2m1", (1, 32), "float8_e8m0fnu"),
    MatrixFormat("e2m1", (1, 16)),
    MatrixFormat("int8", (1, 1000), "bfloat16"),
    MatrixFormat("int8", (64, 32), zeros=True),
    MatrixFormat("e4m3", (128, 128)),
    MatrixFormat("e4m3", (8, 16), "bfloat16"),
]


@pytest.mark.parametrize("form", some(EXPERT_FORMS, lambda i: i % 3 == 1), ids=map(name_of, EXPERT_FORMS))
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_float32_experts_equal_the_plain_form(kernel, form):
    """Neither rounds anything. 140 rows of gate and up, so their border cuts blocks of rows."""
    given = draw((9, 2, 3, 130, 70), form, "float32", seed=EXPERT_FORMS.index(form))
    assert_near(run(kernel, given), wanted(given))


@pytest.mark.parametrize(
    "form", some(EXPERT_FORMS[1:3], lambda i: i == 0), ids=map(name_of, EXPERT_FORMS[1:3])
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_experts_equal_the_plain_form_but_for_roundings(kernel, form):
    given = draw((9, 2, 3, 130, 70), form, "bfloat16")
    largest = np.abs(wanted(given, by_slot=True)).max()
    np.testing.assert_allclose(
        run(kernel, given), wanted(given), rtol=0, atol=BFLOAT16_TOLERANCE * float(largest)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("expert", some([2, 5, 17], lambda i: i > 1))
def test_all_slots_may_have_one_expert_or_one_that_is_not_here(kernel, expert):
    given = draw((20, 2, 5, 34, 24), EXPERT_FORMS[1], "float32")
    given["expert_ids"] = jnp.full((20, 2), expert, jnp.int32)
    found = run(kernel, given)
    if expert < 5:
        assert_near(found, wanted(given))
    else:
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_most_experts_may_have_no_slot(kernel):
    given = draw((7, 1, 20, 18, 10), EXPERT_FORMS[0], "float32")
    assert_near(run(kernel, given), wanted(given))


@pytest.mark.parametrize("form", EXPERT_FORMS[:2], ids=map(name_of, EXPERT_FORMS[:2]))
@pytest.mark.parametrize("kernel", KERNELS)
def test_costs_count_bytes_as_they_are_stored(kernel, form):
    tokens, top_k, experts, hidden, inner = shape = (64, 2, 4, 256, 128)
    given = draw(shape, form, "bfloat16")
    jaxpr = jax.make_jaxpr(lambda given: KERNELS[kernel](**given, chance=1, widening="bits", interpret=False))
    calls = [e for e in jaxpr(given).jaxpr.eqns if e.primitive.name == "pallas_call"]
    costs = [json.loads(call.params["metadata"][COST])["bytes"] for call in calls]
    groups = -(-hidden // form.block[1]), -(-inner // form.block[1])
    of_group = 3 if form.zeros else 2
    matrices = (
        2 * inner * (hidden / 2 + groups[0] * of_group),
        hidden * (inner / 2 + groups[1] * of_group),
    )
    slots = tokens * experts  # each token has each expert, for a chance of 1
    reads = slots if kernel == "gathered" else experts
    products = [reads * matrix + slots * (hidden + inner) * 2 for matrix in matrices]
    # the sum reads the slots that are there, their ids and weights
    combine = [slots * hidden * 2 + tokens * (2 * hidden + 8 * top_k)] if kernel == "grouped" else []
    assert costs == products + combine


def test_a_step_of_the_loop_has_one_scale_a_row_where_it_can():
    def scales(width: int, step: int, columns: int = 4096) -> int:
        return Stored(columns, step, "int4", (1, width)).scales

    assert [scales(width, 128) for width in (16, 32, 64, 128, 256)] == [8, 4, 2, 1, 1]
    assert scales(200, 128, columns=200) == 1  # one for all columns
    assert scales(48, 128) == 128  # blocks and steps have no common border


# Float8 times float8

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


def block_product(x: np.ndarray, matrix: BlockScaled) -> np.ndarray:
    """Quantised activations times the matrix, by NumPy in float64."""
    codes, scales = (np.asarray(a, np.float64) for a in quantized(jnp.asarray(x), FLOAT8))
    numbers = codes * scales.repeat(128, axis=1)[:, : codes.shape[1]]
    return numbers @ np.asarray(matrix.multiplied_out(jnp.float32), np.float64).T


def test_activations_become_the_nearest_float8_of_their_block():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 300)) * np.exp(rng.normal(size=(40, 300)) * 4)
    x[3] = 0
    codes, scales = (np.asarray(a, np.float64) for a in quantized(jnp.asarray(x, jnp.float32), FLOAT8))
    for start, scale in zip(range(0, 300, 128), scales.T, strict=True):
        block = x[:, start : start + 128]
        np.testing.assert_allclose(scale, np.abs(block).max(axis=1) / 448, rtol=1e-6)
        wanted = block / np.maximum(scale, 1e-12)[:, None]
        # between neighbours of 4 bits lie 2^-3 of the power of two below, and at the lower end 2^-9
        spacing = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))) / 8, 2.0**-9)
        difference = np.abs(codes[:, start : start + 128] - wanted)
        assert (difference <= spacing / 2 * (1 + 1e-5)).all()


FLOAT8X8 = [
    ((1, 200, 90), MatrixFormat("e4m3", (128, 128))),
    ((37, 256, 130), MatrixFormat("e4m3", (64, 64), "bfloat16")),
    ((130, 130, 17), MatrixFormat("e4m3", (1, 1000))),
    ((5, 96, 40), MatrixFormat("e4m3", (1, 32), "float8_e8m0fnu")),
]


@pytest.mark.parametrize(("shape", "form"), some(FLOAT8X8, lambda i: i == 1))
def test_quantised_activations_give_the_sum_over_blocks_in_either_float8(shape, form):
    tokens, columns, out = shape
    rng = np.random.default_rng(shape)
    x = rng.normal(size=(tokens, columns)).astype(ml_dtypes.bfloat16)
    x[0] = 0  # a block without a largest value
    x[-1, ::3] = -1e-6  # becomes -0, of which e4m3fnuz has no bits
    matrix = random_codes(rng, (out, columns), form)
    assert (np.asarray(matrix.values).view(np.uint8) == 0x80).any()
    ours, fnuz = (
        float8x8_matmul(jnp.asarray(x), matrix, jnp.float32, float8=jnp.dtype(float8), interpret=True)
        for float8 in (jnp.float8_e4m3fn, jnp.float8_e4m3fnuz)
    )
    assert_near(ours, block_product(x, matrix))
    # products and scales differ by powers of two
    np.testing.assert_array_equal(ours, fnuz)


def test_e4m3fnuz_activations_have_the_bits_of_e4m3fn_ones_but_for_minus_zero():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 300)) * np.exp(rng.normal(size=(40, 300)) * 4), jnp.float32)
    (ours, scales), (fnuz, same) = (quantized(x, f) for f in (FLOAT8, jnp.dtype(jnp.float8_e4m3fnuz)))
    bits, found = (np.asarray(a).view(np.uint8) for a in (ours, fnuz))
    assert (bits == 0x80).any()
    np.testing.assert_array_equal(found, np.where(bits == 0x80, 0, bits))
    np.testing.assert_array_equal(scales, same)
    assert np.abs(np.asarray(ours, np.float32)).max() == 448


def test_float8_times_float8_runs_only_where_it_is_asked_for():
    for target in TARGETS:
        for dtype in ("bfloat16", "float32"):
            for tokens in (1, 200, 10_000):
                assert Kernels(target).pick("scaled", dtype, tokens) != "pallas_float8x8"
    asked = make_kernels("gfx950", {"scaled": "pallas_float8x8"})
    assert asked.pick("scaled", "bfloat16", 1) == "pallas_float8x8"
    assert "  scaled        pallas_float8x8, asked for" in asked.lines("bfloat16")
    assert "float8" not in IMPLEMENTATIONS


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_a_linear_layer_quantises_activations_if_asked_to_and_its_codes_are_e4m3(target):
    kernels = make_kernels(target, {"scaled": "pallas_float8x8"}, interpret=True)
    widening = dataclasses.replace(kernels, chosen=(("scaled", "pallas_tiles"),))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(9, 128)), jnp.bfloat16)
    for codes, quantises in (("e4m3", True), ("int4", False)):
        matrix = random_codes(rng, (24, 128), MatrixFormat(codes, (1, 128)))
        found, plain = (linear(x, matrix, jnp.float32, kernels=k) for k in (kernels, widening))
        assert takes_float8x8(matrix) == quantises
        assert (np.asarray(found) != np.asarray(plain)).any() == quantises
        if quantises:
            assert_near(found, block_product(np.asarray(x), matrix))

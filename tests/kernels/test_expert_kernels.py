"""The expert kernels, interpreted, against every expert on every token in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.routed import routed_inputs
from support.slow import some

from qwen_moe_jax.checkpoint.block_scales import quantize
from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.kernels.experts import gathered_kernels, grouped_kernels, tile_rows
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.kernels.tiles import sort_into_tiles
from qwen_moe_jax.model.experts import dense_experts

FORMS = {"gathered": gathered_kernels, "grouped": grouped_kernels}

# float32: sums of at most 300 products in another order, largest difference over the largest value.
FLOAT32_TOLERANCE = 3e-6
# bfloat16: a sum near the middle between two values may be rounded to either (2^-8 of it). Gate, up, the
# activation and the output are, the first three before a product that averages them, and top_k slots are
# added up. Of the largest slot's size.
BFLOAT16_TOLERANCE = 3 * 2.0**-8

# tokens, top_k, experts, hidden, intermediate
SHAPES = [
    (1, 2, 4, 64, 32),  # one token
    (5, 3, 7, 48, 40),  # nothing is a multiple of a tile
    (37, 2, 3, 130, 70),  # several tiles an expert
    (19, 1, 64, 17, 9),  # most experts without a slot
    (70, 4, 8, 64, 300),
]


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> dict:
    """As of `routed_inputs`, with matrices of numbers."""
    rng, (*_, hidden, inner) = np.random.default_rng([seed, *shape]), shape

    def matrix(stack: tuple[int, int, int]) -> jax.Array:
        size = 2 * hidden**-0.5 if stack[1:] == (2 * inner, hidden) else inner**-0.5
        return jnp.asarray(rng.normal(size=stack) * size, dtype)

    return routed_inputs(rng, shape, dtype, matrix)


def run(form: str, given: dict, **options) -> jax.Array:
    settings = {"chance": 0.1, "widening": "bits", "interpret": True} | options
    return jax.jit(lambda given: FORMS[form](**given, **settings))(given)


def assert_close(found: jax.Array, given: dict, dtype: str) -> None:
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    slots = np.abs(np.asarray(dense_experts(**given, by_slot=True)))
    wanted = np.asarray(dense_experts(**given))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(slots.max(), 1e-3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", some([(shape,) for shape in SHAPES], lambda i: i in (1, 3)))
@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_equals_the_plain_form(form, shape, dtype):
    given = draw(shape, dtype)
    assert_close(run(form, given), given, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_one_expert_may_have_every_slot(form):
    given = draw((41, 2, 5, 32, 24), "float32")
    given["expert_ids"] = jnp.full((41, 2), 3, jnp.int32)
    assert_close(run(form, given), given, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_without_any_expert_the_sum_is_zero_whatever_lies_in_memory(form):
    given = draw((9, 2, 5, 32, 24), "bfloat16")
    given["expert_ids"] = jnp.full((9, 2), 5, jnp.int32)
    # results of an interpreted kernel begin as NaN, so a slot that was read and not written would show
    np.testing.assert_array_equal(run(form, given), 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_that_no_expert_here_has_does_not_meet_another_ones_nan(form):
    given = draw((12, 2, 5, 32, 24), "float32")
    given["expert_ids"] = given["expert_ids"].at[4].set(5)
    clean = run(form, given)
    given["x"] = given["x"].at[4].set(jnp.nan)
    np.testing.assert_array_equal(run(form, given), clean)


@pytest.mark.parametrize("form", FORMS)
def test_by_slot_gives_what_is_summed(form):
    given = draw((11, 3, 6, 32, 24), "float32")
    slots = run(form, given, by_slot=True)
    assert slots.shape == (11, 3, 32)
    whole = run(form, given)
    np.testing.assert_allclose(slots.sum(axis=1), whole, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(whole).max())
    wanted = dense_experts(**given, by_slot=True)
    np.testing.assert_allclose(slots, wanted, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_ranks_add_up_to_the_whole(form, ranks):
    given = draw((23, 3, 8, 32, 24), "float32")
    held = 8 // ranks
    total = jnp.zeros((23, 32))
    for rank in range(ranks):
        ids = given["expert_ids"] - rank * held
        mine = slice(rank * held, (rank + 1) * held)
        part = given | {
            "expert_ids": jnp.where((ids >= 0) & (ids < held), ids, held),
            "gate_up": given["gate_up"][mine],
            "down": given["down"][mine],
        }
        total += run(form, part)
    wanted = dense_experts(**given)
    np.testing.assert_allclose(total, wanted, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max())


def scaled(matrices: jax.Array, block: tuple[int, int], kernels: Kernels) -> BlockScaled:
    """A stack in float8 with scales for blocks of a size of its own."""
    rng = np.random.default_rng(matrices.size)
    values = np.stack([quantize(np.asarray(m, np.float32), np.dtype(np.float32))[0] for m in matrices])
    counts = [-(-n // b) for n, b in zip(matrices.shape[-2:], block, strict=True)]
    scales = 2.0 ** rng.integers(-11, -7, (len(matrices), *counts)) * rng.uniform(1, 2, counts)
    return BlockScaled(
        jnp.asarray(values), jnp.asarray(scales, jnp.float32), block, jnp.dtype("bfloat16"), kernels.widening
    )


# rows and columns of a scale: the published ones, granules of them, and blocks narrower than any tile
BLOCKS = [(128, 128), (64, 32), (8, 16), (128, 8)]
INTERPRETED = Kernels("gfx942", interpret=True)


@pytest.mark.parametrize("widening", ["bits", "native"])
@pytest.mark.parametrize("block", some([(block,) for block in BLOCKS], lambda i: i == 0))
@pytest.mark.parametrize("form", FORMS)
def test_float8_matrices_are_multiplied_as_if_they_were_multiplied_out(form, block, widening):
    given = draw((21, 2, 4, 160, 140), "bfloat16")
    float8: dict[str, Matrix] = {
        name: scaled(given[name], block, INTERPRETED) for name in ("gate_up", "down")
    }
    plain = {name: matrix.multiplied_out(jnp.bfloat16) for name, matrix in float8.items()}
    assert_close(run(form, given | float8, widening=widening), given | plain, "bfloat16")


@pytest.mark.parametrize("seed", some(range(6), lambda i: i < 2))
def test_tiles_hold_every_slot_with_a_group_once_and_no_other(seed):
    rng = np.random.default_rng(seed)
    slots, groups, rows = int(rng.integers(1, 200)), int(rng.integers(1, 40)), int(rng.choice([16, 32]))
    of_slot = rng.integers(0, groups + 3, slots).clip(0, groups)
    tiles = sort_into_tiles(jnp.asarray(of_slot, jnp.int32), groups, rows, slots)
    found = []
    for group, start, stop in zip(tiles.group, tiles.start, tiles.stop, strict=True):
        mine = np.asarray(tiles.slots)[int(start) : int(stop)]
        assert len(mine) <= rows
        assert (of_slot[mine] == int(group)).all()
        found += mine.tolist()
    assert sorted(found) == np.flatnonzero(of_slot < groups).tolist()


def test_padding_is_a_quarter_of_an_experts_slots_on_average_where_it_can_be():
    for mean in (32, 80, 128, 200, 256, 400):  # half of the last tile is empty
        assert tile_rows(mean) / 2 <= mean / 4
        assert tile_rows(mean) == 128 or tile_rows(mean) > mean / 4
    assert tile_rows(1) == 16
    assert tile_rows(10_000) == 128

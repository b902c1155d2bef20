"""The attention kernel, interpreted, against attention written down in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paging import in_pages
from support.slow import some

from qwen_moe_jax.kernels import flash_attention as flash_attention_module
from qwen_moe_jax.kernels.flash_attention import attend, flash_attention
from qwen_moe_jax.kernels.launch import Schedule

# float32: sums over at most 130 keys and 256 dimensions in another order; over the largest value.
FLOAT32_TOLERANCE = 3e-6
# bfloat16: weights are rounded before they are averaged, and the output once.
BFLOAT16_TOLERANCE = 2.0**-7


def draw(batch: int, seq: int, heads: int, kv_heads: int, dim: int, capacity: int, dtype: str, seed: int = 0):
    rng = np.random.default_rng([seed, batch, seq, heads, dim, capacity])
    query = jnp.asarray(rng.normal(size=(batch, seq, heads, dim)), dtype)
    key, value = (jnp.asarray(rng.normal(size=(batch, capacity, kv_heads, dim)), dtype) for _ in range(2))
    start = rng.integers(0, capacity - seq + 1, (batch, 1))
    return query, key, value, jnp.asarray(start + np.arange(seq), jnp.int32)


def attention_float64(query, key, value, positions) -> np.ndarray:
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("bshd,bthd->bhst", query, key) * query.shape[-1] ** -0.5
    visible = np.arange(key.shape[1]) <= np.asarray(positions)[:, None, :, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(axis=-1, keepdims=True), value)


PAGES = (16, 64)


@pytest.mark.parametrize("page", some(PAGES, lambda i: i == 0))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "tile", "block", "splits"),
    [
        ((3, 1, 4, 2, 32, 70), 16, 16, 1),
        ((3, 1, 4, 2, 32, 70), 16, 16, 3),
        ((1, 1, 32, 2, 256, 64), 16, 16, 9),  # more splits than blocks
        ((2, 5, 6, 2, 24, 100), 16, 16, 2),  # a width that is no power of two
        ((1, 40, 4, 1, 64, 130), 64, 16, 2),  # several tiles, a last block that is not full
        ((2, 1, 3, 3, 16, 1), 16, 16, 1),  # a cache of one slot
    ],
)
def test_the_kernel_equals_attention(shape, tile, block, splits, dtype, page):
    query, key, value, positions = given = draw(*shape, dtype)
    # pages in any order, with NaN behind each row's last token and in all other pages
    paged = in_pages(key, value, page, positions.max(axis=1) + 1)
    found = flash_attention(
        query,
        *paged.pools,
        positions,
        paged.tables,
        tile=tile,
        block=block,
        splits=splits,
        schedule=Schedule(),
        interpret=True,
    )
    wanted = attention_float64(*given)
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


@pytest.mark.parametrize(("seq", "capacity"), [(1, 2048), (3, 64), (20, 96), (80, 160)])
def test_the_sizes_chosen_for_shapes_change_nothing(seq, capacity):
    query, key, value, positions = given = draw(2, seq, 4, 2, 32, capacity, "float32")
    paged = in_pages(key, value, 64, positions.max(axis=1) + 1)
    attention = jax.jit(lambda *given: attend(*given, interpret=True))
    found = attention(query, *paged.pools, positions, paged.tables)
    wanted = attention_float64(*given)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max())


def test_a_tile_reads_no_block_behind_its_last_query():
    """Keys from some position on are NaN, though tokens are there: only tiles that see them fail."""
    query, key, value, _ = draw(1, 48, 4, 1, 32, 48, "float32")
    positions = jnp.arange(48, dtype=jnp.int32)[None]
    paged = in_pages(key.at[:, 32:].set(jnp.nan), value.at[:, 32:].set(jnp.nan), 16, [48])
    sizes = {"tile": 64, "block": 16, "splits": 1, "schedule": Schedule(), "interpret": True}
    found = np.asarray(flash_attention(query, *paged.pools, positions, paged.tables, **sizes))
    # 64 rows are the 4 heads of 16 queries
    wanted = attention_float64(query[:, :32], key[:, :32], value[:, :32], positions[:, :32])
    tolerance = FLOAT32_TOLERANCE * np.abs(wanted).max()
    np.testing.assert_allclose(found[:, :32], wanted, rtol=0, atol=tolerance)
    assert np.isnan(found[:, 32:]).all()


def test_the_cost_is_of_the_keys_that_tiles_see(monkeypatch):
    """8 tiles of 16 queries behind 128 keys, of 256 in all, read 144, 160, ... 256 of them."""
    told = []
    launch = flash_attention_module.launch

    def noted(*args, **options):
        told.append(options["cost"])
        return launch(*args, **options)

    monkeypatch.setattr(flash_attention_module, "launch", noted)
    query, key, value, positions = draw(2, 128, 4, 1, 32, 256, "float32")
    paged = in_pages(key, value, 64, [256, 256])
    sizes = {"tile": 64, "block": 16, "splits": 1, "schedule": Schedule(), "interpret": True}
    sizes["expected_keys"] = 256
    jax.eval_shape(
        lambda *given: flash_attention(*given, **sizes), query, *paged.pools, positions, paged.tables
    )
    keys = sum(range(144, 257, 16))
    # of two rows: keys and values, then queries and what is written
    assert told[0].bytes == 2 * 2 * keys * 32 * 4 + 2 * query.size * 4
    assert told[0].flops == 4 * 2 * keys * 64 * 32


def test_rows_that_share_pages_see_the_same_keys_each_to_its_own_end():
    query, key, value, _ = draw(1, 1, 4, 2, 32, 100, "float32")
    paged = in_pages(key, value, 16, [100])
    rows, ends = 3, np.asarray([[99], [17], [64]], np.int32)
    found = flash_attention(
        jnp.repeat(query, rows, axis=0),
        *paged.pools,
        jnp.asarray(ends),
        jnp.repeat(paged.tables, rows, axis=0),
        tile=16,
        block=16,
        splits=4,
        schedule=Schedule(),
        interpret=True,
    )
    for row, end in enumerate(ends):
        wanted = attention_float64(query, key, value, end[None])
        np.testing.assert_allclose(
            found[row], wanted[0], rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max()
        )


def test_blocks_that_do_not_divide_a_page_are_refused():
    query, key, value, positions = draw(1, 1, 4, 2, 32, 64, "float32")
    paged = in_pages(key, value, 16, [64])
    with pytest.raises(ValueError, match="blocks of 32 keys do not divide pages of 16"):
        flash_attention(
            query,
            *paged.pools,
            positions,
            paged.tables,
            tile=16,
            block=32,
            splits=1,
            schedule=Schedule(),
            interpret=True,
        )

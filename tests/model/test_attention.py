"""Blockwise attention against a full softmax in float64, and that it stays blockwise in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paging import in_pages
from support.rounding import to_numpy

from qwen_moe_jax.formats.cache import KVCache
from qwen_moe_jax.model.attention import append_keys, blockwise_attention

PAGE = 16
_attend = jax.jit(blockwise_attention, static_argnames="block")


def attend(query, key, value, positions, *, block: int) -> jax.Array:
    """In pages of 16, in any order, with NaN wherever no query of a row sees."""
    paged = in_pages(key, value, PAGE, positions.max(axis=1) + 1)
    return _attend(query, *paged.pools, positions, paged.tables, block=block)


# float32 scores of up to about 20 rounded once each, and sums of at most 130 weights.
FLOAT32_TOLERANCE = 1e-5
# bfloat16 keys and values: weights are rounded to 8 bits before they mix, so is the result.
BFLOAT16_TOLERANCE = 2.0**-7

# (kv heads, query heads a kv head, head_dim, capacity, new tokens, tokens before, block)
SHAPES = [
    (1, 1, 8, 64, 64, 0, 256),  # one block
    (2, 3, 16, 130, 20, 75, 64),  # a capacity that is not a multiple of the block; an offset
    (3, 1, 8, 33, 17, 16, 8),  # the last block overlaps the one before
    (1, 4, 24, 100, 1, 99, 7),  # decode at the last slot; an odd block
    (2, 2, 8, 70, 1, 0, 16),  # the first token
]


def draw(shape: tuple[int, ...], seed: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """(query, key, value, positions) for 2 rows, the second one 3 tokens behind where there is room.

    Slots that no query may see hold garbage as large as a half-precision value can be.
    """
    kv_heads, group, dim, capacity, seq, before, _ = shape
    rng = np.random.default_rng([seed, *shape])
    query = 3 * rng.normal(size=(2, seq, kv_heads * group, dim))
    key, value = rng.normal(size=(2, 2, capacity, kv_heads, dim))
    positions = np.stack([before + np.arange(seq), max(before - 3, 0) + np.arange(seq)])
    for row in range(2):
        key[row, positions[row, -1] + 1 :] = value[row, positions[row, -1] + 1 :] = 6e4
    return (*(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.asarray(positions, jnp.int32))


def full_softmax(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> np.ndarray:
    """All scores at once, float64."""
    query, key, value = (to_numpy(x) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("bshd,bthd->bhst", query, key) * query.shape[-1] ** -0.5
    hidden = np.arange(key.shape[1]) > np.asarray(positions)[:, None, :, None]
    scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_full_softmax(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    tolerance = FLOAT32_TOLERANCE if dtype == jnp.float32 else BFLOAT16_TOLERANCE
    for seed in range(2):
        given = draw(shape, seed, dtype)
        ours = attend(*given, block=shape[-1])
        assert ours.dtype == dtype
        truth = full_softmax(*given)
        np.testing.assert_allclose(to_numpy(ours), truth, rtol=0, atol=tolerance * np.abs(truth).max())


def test_float32_keys_of_bfloat16_values_give_bfloat16_queries_no_more_error() -> None:
    """The CPU's cache: bfloat16 values held in float32."""
    query, key, value, positions = draw(SHAPES[1], 3, jnp.bfloat16)
    ours = attend(query, key.astype(jnp.float32), value.astype(jnp.float32), positions, block=64)
    assert ours.dtype == jnp.bfloat16
    truth = full_softmax(query, key, value, positions)
    # one rounding of the result
    np.testing.assert_allclose(
        to_numpy(ours), truth, rtol=2.0**-8, atol=FLOAT32_TOLERANCE * np.abs(truth).max()
    )


def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    query, key, value, positions = draw(SHAPES[2], 0, jnp.float32)
    for scale in (0.0, 1e4):
        ours = np.asarray(attend(query * scale, key, value, positions, block=8))
        truth = full_softmax(query * scale, key, value, positions)
        assert np.isfinite(ours).all()
        # a softmax this sharp follows the score's own rounding where two are close: compare what is not
        np.testing.assert_allclose(ours, truth, rtol=0, atol=0.05 * np.abs(truth).max())


def test_chunks_that_continue_a_cache_equal_one_pass() -> None:
    kv_heads, group, dim, capacity, seq = 2, 2, 8, 50, 45
    query, key, value, positions = draw((kv_heads, group, dim, capacity, seq, 0, 16), 5, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(seq), (2, seq)).astype(jnp.int32)
    whole = full_softmax(query, key, value, positions)
    paged = in_pages(key, value, PAGE, [0, 0], room=seq)
    cache = KVCache(*paged.pools)
    append = jax.jit(append_keys)
    for start in range(0, seq, 15):
        piece = slice(start, start + 15)
        cache = append(cache, key[:, piece], value[:, piece], positions[:, piece], paged.tables)
        ours = _attend(query[:, piece], cache.k, cache.v, positions[:, piece], paged.tables, block=16)
        np.testing.assert_allclose(
            ours, whole[:, piece], rtol=0, atol=FLOAT32_TOLERANCE * np.abs(whole).max()
        )
        for row in range(2):
            assert np.isnan(paged.row(cache.k, row, seq)[start + 15 :]).all()


def test_pads_are_dropped_and_every_row_writes_to_its_own_pages() -> None:
    pages, page = 7, 2
    rng = np.random.default_rng(0)
    old = KVCache(*(jnp.asarray(rng.normal(size=(pages, page, 2, 4)), jnp.float32) for _ in range(2)))
    key, value = (jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32) for _ in range(2))
    tables = jnp.asarray([[4, 0, 6], [5, 3, pages], [1, 2, pages]], jnp.int32)
    behind = 3 * page
    # row 0: three tokens; row 1: one token, a pad, and one that its row has no page for; row 2: pads only
    places = jnp.asarray([[1, 2, 3], [3, behind, 4], [behind] * 3], jnp.int32)
    new = jax.jit(append_keys)(old, key, value, places, tables)
    for before, given, after in ((old.k, key, new.k), (old.v, value, new.v)):
        expected = np.array(before)
        expected[4, 1], expected[0, 0], expected[0, 1], expected[3, 1] = (*given[0], given[1, 0])
        np.testing.assert_array_equal(after, expected)


def test_keys_are_held_in_the_caches_dtype() -> None:
    cache = KVCache(*(jnp.zeros((1, 4, 1, 2), jnp.float32) for _ in range(2)))
    place = jnp.zeros((1, 1), jnp.int32)
    new = append_keys(cache, *(jnp.ones((1, 1, 1, 2), jnp.bfloat16),) * 2, place, place)
    assert new.k.dtype == new.v.dtype == jnp.float32


def test_no_score_matrix_exists_for_32k_keys() -> None:
    """Compiled, not run: temporaries against what all scores of one 512-token chunk would take."""
    batch, seq, heads, kv_heads, dim, capacity = 1, 512, 16, 2, 256, 32768
    queries = jax.ShapeDtypeStruct((batch, seq, heads, dim), jnp.float32)
    keys = jax.ShapeDtypeStruct((capacity // 64, 64, kv_heads, dim), jnp.float32)
    tables = jax.ShapeDtypeStruct((batch, capacity // 64), jnp.int32)
    positions = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    compiled = _attend.lower(queries, keys, keys, positions, tables).compile()
    all_scores = 4 * batch * heads * seq * capacity  # 1 GiB
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 10

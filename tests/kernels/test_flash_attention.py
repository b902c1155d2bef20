"""The attention kernel, interpreted, against attention written down in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "tile", "block", "splits"),
    [
        ((3, 1, 4, 2, 32, 70), 16, 16, 1),
        ((3, 1, 4, 2, 32, 70), 16, 16, 3),
        ((1, 1, 32, 2, 256, 64), 16, 32, 4),  # more splits than blocks
        ((2, 5, 6, 2, 24, 100), 16, 16, 2),  # a width that is no power of two
        ((1, 40, 4, 1, 64, 130), 64, 32, 1),  # several tiles, a last block that is not full
        ((2, 1, 3, 3, 16, 1), 16, 16, 1),  # a cache of one slot
    ],
)
def test_the_kernel_equals_attention(shape, tile, block, splits, dtype):
    given = draw(*shape, dtype)
    found = flash_attention(
        *given, tile=tile, block=block, splits=splits, schedule=Schedule(), interpret=True
    )
    wanted = attention_float64(*given)
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max()
    )


@pytest.mark.parametrize(("seq", "capacity"), [(1, 2048), (3, 64), (20, 96)])
def test_the_sizes_chosen_for_shapes_change_nothing(seq, capacity):
    given = draw(2, seq, 4, 2, 32, capacity, "float32")
    found = jax.jit(lambda *given: attend(*given, interpret=True))(*given)
    wanted = attention_float64(*given)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max())


def test_slots_behind_a_query_are_not_seen_even_if_they_hold_nan():
    query, key, value, _ = draw(2, 1, 4, 2, 32, 100, "float32")
    positions = jnp.asarray([[17], [63]], jnp.int32)
    hidden = np.arange(100)[None, :] > np.asarray(positions)
    dirty = [jnp.where(hidden[..., None, None], jnp.nan, x) for x in (key, value)]
    clean = [jnp.where(hidden[..., None, None], 0, x) for x in (key, value)]
    # what a block holds of unseen slots meets weights of zero, so only numbers may lie there: caches begin as
    # zeros and are written with numbers alone; blocks that no query sees are not read at all
    options = {"tile": 16, "block": 16, "splits": 2, "schedule": Schedule(), "interpret": True}
    wanted = flash_attention(query, *clean, positions, **options)
    beyond = hidden & (np.arange(100)[None, :] >= (np.asarray(positions) // 16 + 1) * 16)
    dirty = [jnp.where(beyond[..., None, None], d, c) for d, c in zip(dirty, clean, strict=True)]
    np.testing.assert_array_equal(flash_attention(query, *dirty, positions, **options), wanted)

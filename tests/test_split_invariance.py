"""However a row is split, padded, batched or cached, it gets what one forward over it alone gives."""

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle, parity
from support.configs import FULL, LINEAR, random_config, random_ids
from support.reference import save_reference

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.engine.logits import SequenceLogits
from qwen_moe_jax.formats.cache import PAGE, DeltaNetCache, HybridCache, KVCache
from qwen_moe_jax.generation.loading import load_forward
from qwen_moe_jax.kernels.table import make_kernels

# lfllf with a convolution of kernel 4: both layer kinds, also one behind the other.
SEED = 26
CONFIG = random_config(SEED)
VOCAB = CONFIG["vocab_size"]
WIDTH = 64  # every piece is padded to it, so that all splits share one compiled shape
CAPACITY = 256

# Splits change the order of sums only: the float32 noise of this model, about 1e-5 of the largest logit.
SPLIT_TOLERANCE = 1e-4


@functools.cache
def folder() -> Path:
    where = Path(tempfile.mkdtemp())
    return save_reference(parity.random_model(SEED).reference, where)


@functools.cache
def forward(dtype: str = "float32") -> SequenceLogits:
    config = ModelConfig.from_file(folder())
    return SequenceLogits(
        load_forward(folder(), config, jnp.dtype(dtype), make_kernels("cpu"), progress=False).forward
    )


@functools.cache
def model() -> QwenMoe:
    return QwenMoe.from_pretrained(folder(), dtype="auto")


def truth(row: Iterable[int]) -> np.ndarray:
    return oracle.forward(CONFIG, parity.random_model(SEED).params, list(row)).logits


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def piece(rows: list[np.ndarray], width: int, garbage: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, valid) right-padded to `width` with random ids."""
    tokens = garbage.integers(0, VOCAB, (len(rows), width)).astype(np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    return tokens, valid


def feed(
    cache: HybridCache, rows: list[np.ndarray], width: int = WIDTH, seed: int = 0
) -> tuple[list[np.ndarray], HybridCache]:
    """Feeds each row's next tokens; returns each row's logits of just those."""
    tokens, valid = piece(rows, width, np.random.default_rng(seed))
    logits, cache = forward()(tokens, valid, cache)
    return [np.asarray(logits[i, : len(row)]) for i, row in enumerate(rows)], cache


def feed_split(rows: list[np.ndarray], counts: list[list[int]]) -> tuple[list[np.ndarray], HybridCache]:
    """Feeds row b in pieces of counts[b][0], counts[b][1], ...; single-token pieces take the decode form."""
    cache = forward().new_cache(len(rows), CAPACITY)
    done = [0] * len(rows)
    seen: list[list[np.ndarray]] = [[] for _ in rows]
    for number, sizes in enumerate(zip(*counts, strict=True)):
        now = [row[start : start + size] for row, start, size in zip(rows, done, sizes, strict=True)]
        logits, cache = feed(cache, now, 1 if max(sizes) == 1 else WIDTH, seed=number)
        for i, part in enumerate(logits):
            seen[i].append(part)
        done = [start + size for start, size in zip(done, sizes, strict=True)]
    assert done == [len(row) for row in rows]
    return [np.concatenate(parts) for parts in seen], cache


def random_counts(total: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """Sizes 0 .. WIDTH that sum to `total`."""
    while True:
        cuts = np.sort(rng.integers(0, total + 1, pieces - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [total]]))
        if sizes.max() <= WIDTH:
            return sizes.tolist()


LENGTHS = (65, 129, 200)
ROWS = [random_ids(CONFIG, length, SEED).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize("seed", range(6))
def test_any_split_of_a_ragged_batch_equals_one_forward(seed: int) -> None:
    """Each row is cut elsewhere, with empty pieces among them, and random ids lie under the pads."""
    rng = np.random.default_rng(seed)
    pieces = (5, 8, 12, 5, 8, 12)[seed]
    found, _ = feed_split(ROWS, [random_counts(length, pieces, rng) for length in LENGTHS])
    for row, logits in zip(ROWS, found, strict=True):
        assert relative(logits, truth(row)) < SPLIT_TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64])
@pytest.mark.parametrize("m", [1, 2, 3, 64])
def test_prefill_n_then_prefill_m_then_decode_equals_prefill_of_all(n: int, m: int) -> None:
    """A second multi-token piece continues the state and the convolution (transformers #45513)."""
    rows = [random_ids(CONFIG, 129, seed)[: n + m + 1].astype(np.int32) for seed in range(3)]
    cache = forward().new_cache(len(rows), CAPACITY)
    first, cache = feed(cache, [row[:n] for row in rows])
    second, cache = feed(cache, [row[n : n + m] for row in rows])
    last, cache = feed(cache, [row[n + m :] for row in rows], width=1)
    for row, *parts in zip(rows, first, second, last, strict=True):
        assert relative(np.concatenate(parts), truth(row)) < SPLIT_TOLERANCE
    np.testing.assert_array_equal(cache.length, n + m + 1)


def test_decode_from_the_first_token_equals_one_forward() -> None:
    rows = [row[:40] for row in ROWS]
    found, _ = feed_split(rows, [[1] * 40] * len(rows))
    for row, logits in zip(rows, found, strict=True):
        assert relative(logits, truth(row)) < SPLIT_TOLERANCE


def visible(cache: HybridCache, row: int) -> list[np.ndarray]:
    """What one row of a cache can still influence: states, convolution inputs, keys and values in use."""
    length = int(cache.length[row])
    kept: list[np.ndarray] = []
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            places = np.arange(length)
            pages = np.asarray(cache.rows.tables)[row, places // PAGE]
            kept += [np.asarray(pool)[pages, places % PAGE] for pool in (layer.k, layer.v)]
        else:
            kept += [np.asarray(layer.conv[row]), np.asarray(layer.state[row])]
    return kept


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_row_of_pads_leaves_its_cache_bitwise_unchanged(width: int) -> None:
    _, cache = feed(forward().new_cache(3, CAPACITY), [ROWS[0][:60], ROWS[1][:64], ROWS[2][:2]])
    before = [visible(cache, row) for row in range(3)]
    nothing = np.zeros(0, np.int32)
    _, cache = feed(cache, [nothing, ROWS[1][64:65], nothing], width)
    np.testing.assert_array_equal(cache.length, [60, 65, 2])
    for row in (0, 2):
        for was, now in zip(before[row], visible(cache, row), strict=True):
            np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 63, 64])
def test_the_cache_after_right_padding_is_that_of_the_valid_tokens(count: int) -> None:
    """Convolution inputs come from the last valid tokens, not from the pads behind them (LLM-TPU #150)."""
    row = ROWS[2][:count]
    _, padded = feed(forward().new_cache(3, CAPACITY), [row, row, row], seed=1)
    _, other = feed(forward().new_cache(3, CAPACITY), [row, row, row], seed=2)  # other ids under the pads
    _, stepped = feed_split([row] * 3, [[1] * count] * 3)
    for a, b, c in zip(visible(padded, 0), visible(other, 0), visible(stepped, 0), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() <= SPLIT_TOLERANCE * max(1.0, np.abs(c).max())
    kernel = CONFIG["linear_conv_kernel_dim"]
    convolutions = [layer.conv for layer in padded.layers if isinstance(layer, DeltaNetCache)]
    assert len(convolutions) == CONFIG["layer_types"].count(LINEAR)
    for conv in convolutions:
        used = np.abs(np.asarray(conv[0])).max(axis=1) > 0
        assert used.tolist() == [False] * max(kernel - 1 - count, 0) + [True] * min(kernel - 1, count)


def test_the_recurrent_state_is_float32_also_in_a_bfloat16_model() -> None:
    narrow = forward("bfloat16")
    tokens, valid = piece([ROWS[0][:5]], 5, np.random.default_rng(0))
    _, cache = narrow(tokens, valid, narrow.new_cache(1, CAPACITY))
    states = [layer.state for layer in cache.layers if isinstance(layer, DeltaNetCache)]
    assert states
    assert all(state.dtype == jnp.float32 for state in states)
    assert FULL in CONFIG["layer_types"]


def padded(rows: list[np.ndarray], width: int, left: bool, garbage: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) with `garbage` under the pads."""
    ids = np.full((len(rows), width), garbage, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("garbage", [0, VOCAB - 1])
@pytest.mark.parametrize("width", [200, 1000])
def test_padded_rows_get_the_logits_they_get_alone(left: bool, garbage: int, width: int) -> None:
    ids, mask = padded(ROWS, width, left, garbage)
    logits = np.asarray(model().logits(ids, mask))
    assert logits.shape == (len(ROWS), width, VOCAB)
    for i, row in enumerate(ROWS):
        assert relative(logits[i][mask[i] == 1], truth(row)) < SPLIT_TOLERANCE


@pytest.mark.parametrize("pads", [1, 3, 64, 500])
def test_left_padding_of_a_single_row_changes_nothing(pads: int) -> None:
    """A mask skipped at batch 1 moved logits by 0.5 (transformers #46773)."""
    row = ROWS[0]
    ids, mask = padded([row], len(row) + pads, left=True, garbage=7)
    alone = np.asarray(model().logits(row[None]))
    np.testing.assert_array_equal(np.asarray(model().logits(ids, mask))[:, pads:], alone)
    assert relative(alone[0], truth(row)) < SPLIT_TOLERANCE


NEW_TOKENS = 24


@functools.cache
def tokens_alone(row: int) -> list[int]:
    return model().generate([ROWS[row].tolist()], max_new_tokens=NEW_TOKENS).sequences[0]


def bits() -> dict[str, Any]:
    """Options under which every bit of a row can be looked at."""
    return {"max_new_tokens": NEW_TOKENS, "return_logprobs": True}


@pytest.mark.slow
def test_a_ragged_batch_generates_what_each_row_generates_alone() -> None:
    alone = [tokens_alone(row) for row in range(len(ROWS))]
    assert model().generate([row.tolist() for row in ROWS], max_new_tokens=NEW_TOKENS).sequences == alone
    for left in (True, False):
        ids, mask = padded(ROWS, 230, left, garbage=3)
        out = model().generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS)
        assert out.sequences == alone


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    others = [random_ids(CONFIG, length, 99) for length in LENGTHS]
    batch = [ROWS[0], others[1], others[2]]
    with model().engine(max_rows=4, prefix_cache=False) as engine:
        both, base = (dict(engine.run([row.tolist() for row in rows], bits()))[0] for rows in (batch, ROWS))
    assert both.sequences == base.sequences
    assert both.logprobs == base.logprobs


@pytest.mark.slow
def test_a_model_that_was_used_generates_bitwise_what_a_fresh_one_does() -> None:
    """No state survives a call (llama.cpp #29092)."""
    a, b = ROWS[1].tolist(), ROWS[2].tolist()
    with (
        model().engine(max_rows=4, prefix_cache=False) as used,
        model().engine(max_rows=4, prefix_cache=False) as fresh,
    ):
        used.submit(a, **bits()).result()
        for _ in used.run([a, b, b], bits()):
            pass
        first, second = (engine.submit(b, **bits()).result() for engine in (used, fresh))
    assert first.sequences == second.sequences
    assert first.logprobs == second.logprobs


# Controls: these are the sizes of what would be seen without masking, by the truth's own account.


def test_unmasked_left_pads_would_be_far_outside_the_tolerance() -> None:
    row = ROWS[0]
    unmasked = truth(np.concatenate([np.full(3, 7), row]))[3:]
    assert relative(unmasked, truth(row)) > 100 * SPLIT_TOLERANCE


def test_a_dropped_state_would_be_far_outside_the_tolerance() -> None:
    row = ROWS[1]
    assert relative(truth(row[64:]), truth(row)[64:]) > 100 * SPLIT_TOLERANCE

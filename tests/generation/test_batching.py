"""Every form of a prompt gives the same rows; everything else is a clear error."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.engine.shapes import (
    CPU_CHUNK,
    CPU_CHUNK_BATCH,
    GPU_CHUNK,
    GPU_CHUNK_BATCH,
    NATIVE_CHUNK,
    NATIVE_CHUNK_BATCH,
    cache_capacity,
    chunk_length,
    chunk_spans,
    right_pad,
)
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.batching import to_rows
from qwen_moe_jax.generation.chat import ChatTemplate
from qwen_moe_jax.kernels.table import Kernels

VOCAB = 200
IDS = [[3, 5, 7]]


class Letters:
    """Token ids are the characters' code points."""

    def encode(self, text):
        return [ord(character) for character in text]


TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{{ enable_thinking }}"
)


def rows(prompt, **options):
    options = {"tokenizer": Letters(), "chat_template": TEMPLATE, "vocab_size": VOCAB} | options
    return to_rows(prompt, **options)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab"], [[97, 98]]),
        (("ab", "c"), [[97, 98], [99]]),
        ([3, 5], [[3, 5]]),
        ((3, np.int64(5)), [[3, 5]]),
        ([[3, 5], [7]], [[3, 5], [7]]),
        ([(3,), np.array([5, 7])], [[3], [5, 7]]),
        (np.array([[3, 5], [7, 9]]), [[3, 5], [7, 9]]),
        (np.array([[3, 5]], np.uint8), [[3, 5]]),
        (jnp.array([[3, 5]]), [[3, 5]]),
        ([{"role": "user", "content": "a"}], [[117, 97]]),
        ([[{"role": "user", "content": "a"}], [{"role": "bot", "content": "bc"}]], [[117, 97], [98, 98, 99]]),
    ],
)
def test_every_form_of_prompt_becomes_rows_of_int32(prompt, expected):
    batch = rows(prompt)
    assert [row.tolist() for row in batch.rows] == expected
    assert all(row.dtype == np.int32 for row in batch.rows)
    assert batch.offsets == [0] * len(expected)
    assert batch.width == max(map(len, expected))


def test_template_options_reach_the_chat_template():
    batch = rows([{"role": "u", "content": ""}], template_options={"enable_thinking": False})
    assert bytes(batch.rows[0].tolist()).decode() == "uFalse"


def test_template_options_without_a_chat_are_an_error():
    with pytest.raises(InputError, match="enable_thinking only applies to chat messages"):
        rows("text", template_options={"enable_thinking": True})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ((), "prompt is empty"),
        ("", "prompt 0 is empty"),
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[]], "prompt 0 is empty"),
        (np.zeros((0, 3), int), "at least one row"),
        (np.zeros((2, 0), int), "at least one row"),
        (None, "a NoneType"),
        (5, "a int"),
        (b"ab", "a bytes"),
        ({"role": "user", "content": "a"}, "a dict"),
        ([1, "a"], "a list of int, str"),
        ([1.0, 2.0], "a list of float"),
        ([True, False], "a list of bool"),
        ([[1, 2.5]], "prompt 0 holds a list of float, int"),
        ([[True]], "prompt 0 holds a list of bool"),
        ([[1], ["a"]], "prompt 1 holds a list of str"),
        ([np.array(5)], "a list of ndarray"),
        ([np.array([[1, 2]])], "prompt 0 holds"),
        (np.array([1, 2]), "shape \\[2\\]"),
        (np.array(3), "shape \\[\\]"),
        (np.zeros((1, 2, 3), int), "shape \\[1, 2, 3\\]"),
        (np.array([[1.0]]), "float64"),
        (np.array([[True]]), "bool"),
        (np.array([["a"]]), "expected integers"),
        ([[VOCAB]], f"token id {VOCAB} is outside the vocabulary; expected 0 to {VOCAB - 1}"),
        ([[1, -1]], "token id -1 is outside"),
        ([2**70], f"token id {2**70} is outside"),
        (np.array([[0, VOCAB]]), "outside the vocabulary"),
        (np.array([[2**63]], np.uint64), "outside the vocabulary"),
        ([{"content": "no role"}], "message 0"),
    ],
)
def test_a_malformed_prompt_is_a_clear_error(prompt, message):
    with pytest.raises(InputError, match=message):
        rows(prompt)


def test_text_without_tokenizer_and_chat_without_template_are_errors():
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        rows("a", tokenizer=None)
    with pytest.raises(InputError, match="no chat template"):
        rows([{"role": "user", "content": "a"}], chat_template=None)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        rows([{"role": "user", "content": "a"}], tokenizer=None)


def test_masks_take_pads_left_and_right_and_remember_where_a_row_began():
    ids = np.arange(12).reshape(3, 4)
    batch = rows(ids, attention_mask=[[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]])
    assert [row.tolist() for row in batch.rows] == [[2, 3], [4, 5, 6], [9, 10]]
    assert batch.offsets == [2, 0, 1]
    assert batch.width == 4


@pytest.mark.parametrize("kind", [np.bool_, np.int64, np.float32])
def test_a_mask_may_be_of_any_kind_that_holds_zero_and_one(kind):
    batch = rows(np.array([[1, 2, 3]]), attention_mask=np.array([[0, 1, 1]], kind))
    assert batch.rows[0].tolist() == [2, 3]


def test_ids_under_a_pad_are_not_read():
    batch = rows(np.array([[-100, 3, VOCAB + 5]]), attention_mask=np.array([[0, 1, 0]]))
    assert batch.rows[0].tolist() == [3]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1]], "row 0 has a hole"),
        ([[0, 0, 0]], "masks out all of row 0"),
        ([[1, 1]], "shape \\[1, 2\\]; expected the ids' \\[1, 3\\]"),
        ([1, 1, 1], "shape \\[3\\]"),
        ([[1, 2, 1]], "other than 0 and 1"),
        ([[1, np.nan, 1]], "other than 0 and 1"),
        ([[1, 1], [1]], "ragged"),
    ],
)
def test_a_mask_that_does_not_fit_is_a_clear_error(mask, message):
    with pytest.raises(InputError, match=message):
        rows(np.array(IDS), attention_mask=mask)


@pytest.mark.parametrize("prompt", ["ab", [3, 5, 7], IDS])
def test_a_mask_without_an_array_is_an_error(prompt):
    with pytest.raises(InputError, match="attention_mask goes with an integer array"):
        rows(prompt, attention_mask=[[1, 1, 1]])


def test_right_pad_puts_rows_first_and_takes_empty_ones():
    ids, valid = right_pad([np.array([3, 5]), np.array([], int), np.array([7, 8, 9])], 3)
    assert ids.tolist() == [[3, 5, 0], [0, 0, 0], [7, 8, 9]]
    assert valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert ids.dtype == np.int32
    assert valid.dtype == bool


@pytest.mark.parametrize(
    ("kernels", "longest_chunk", "tokens"),
    [
        (Kernels("cpu"), CPU_CHUNK, CPU_CHUNK_BATCH),
        (Kernels("cpu", native="plain"), NATIVE_CHUNK, NATIVE_CHUNK_BATCH),
        (Kernels("gfx942"), GPU_CHUNK, GPU_CHUNK_BATCH),
    ],
)
def test_chunks_cover_a_prompt_once_in_a_bounded_set_of_lengths(kernels, longest_chunk, tokens):
    for batch in (1, 3, 8, 20, 300):
        chunk = chunk_length(batch, kernels)
        assert chunk * batch <= tokens or chunk == 16
        assert chunk <= longest_chunk
        lengths = set()
        for longest in range(1, 2 * chunk + 70, 1 if chunk <= 512 else 7):
            spans = list(chunk_spans(longest, chunk))
            starts = [start for start, _ in spans]
            assert starts == np.cumsum([0, *(length for _, length in spans)])[:-1].tolist()
            covered = sum(length for _, length in spans)
            # pads are few beside a long prompt
            assert longest <= covered <= max(longest * 4 / 3 + 512, 16)
            lengths |= {length for _, length in spans}
        assert lengths <= {2**n for n in range(4, 13)}
        assert max(lengths) == chunk


def test_cache_capacities_hold_what_is_asked_with_two_to_an_octave():
    capacities = {cache_capacity(tokens) for tokens in range(1, 4097)}
    assert sorted(capacities) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    for tokens in range(1, 4097):
        assert tokens <= cache_capacity(tokens) <= max(64, 1.5 * tokens)

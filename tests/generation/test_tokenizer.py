"""The checkpoint's tokenizer gives the ids and texts that transformers' AutoTokenizer gives."""

import json

import numpy as np
import pytest
import tokenizers
from text_files import TRAINING_TEXT, write_text_files
from transformers import AutoTokenizer

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.generation.tokenizer import Tokenizer

TEXTS = (
    *TRAINING_TEXT,
    " leading and trailing ",
    "tabs\tand\r\nlines\n\n",
    "🏳️‍🌈 e\u0301 한국어",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "can 't , won 't . n't",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_files(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def both(folder):
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def test_ids_and_texts_are_those_of_transformers(both):
    ours, theirs = both
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=False) == text
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, ours.vocab_size, 12).tolist()
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_end_token_and_vocabulary_are_those_of_transformers(both):
    ours, theirs = both
    assert ours.eos_token_id == theirs.eos_token_id == 2
    assert ours.vocab_size == len(theirs)


def test_the_end_token_may_be_written_as_an_object_or_be_missing(folder, tmp_path):
    for config, expected in (
        ({"eos_token": {"content": "<|endoftext|>"}}, 0),
        ({"eos_token": None}, None),
        ({"eos_token": "no such token"}, None),
        ({}, None),
    ):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer.from_folder(tmp_path).eos_token_id == expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_token_id is None


def test_saved_truncation_and_padding_do_not_apply(folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a long enough text"
    assert Tokenizer.from_folder(tmp_path).encode(text) == Tokenizer.from_folder(folder).encode(text)


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe\x00"])
def test_a_damaged_tokenizer_is_a_checkpoint_error_that_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "valid JSON"), (b"\xff", "valid JSON"), (b"[]", "list")]
)
def test_a_damaged_tokenizer_config_is_a_checkpoint_error_that_names_the_file(
    folder, tmp_path, content, message
):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json .*{message}"):
        Tokenizer.from_folder(tmp_path)

"""The configurations of the released models, against what is known of them, and how they are found."""

import json
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.configs import QWEN_397B, random_config
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig
from qwen_moe_jax.configs import find_config, released, released_config, short_name
from qwen_moe_jax.errors import CheckpointNotFoundError, InputError
from qwen_moe_jax.formats.cache import PAGE, DeltaNetCache, KVCache, empty_cache
from qwen_moe_jax.schemes.fp8 import FP8

KIB, MIB = 1 << 10, 1 << 20
# The names give whole billions: 30.5 are called 30.
NAMED_SIZE = 0.02


@pytest.mark.parametrize(
    ("name", "layers", "channels", "kv", "state", "billions"),
    [
        ("35b", (30, 10), 8192, 20 * KIB, 60 * MIB, 35),
        ("122b", (36, 12), 12288, 24 * KIB, 144 * MIB, 122),
        ("397b", (45, 15), 12288, 30 * KIB, 180 * MIB, 397),
        ("80b", (36, 12), 8192, 24 * KIB, 72 * MIB, 80),
        ("27b", (48, 16), 10240, 64 * KIB, 144 * MIB, 27),
        ("235b", (0, 94), 0, 188 * KIB, 0, 235),
        ("57b", (0, 28), 0, 56 * KIB, 0, 57.4),
    ],
)
def test_sizes_are_those_that_the_models_are_known_for(
    name: str, layers: tuple[int, int], channels: int, kv: int, state: int, billions: float
) -> None:
    config = released_config(name)
    full = config.layer_types.count(FULL_ATTENTION)
    assert (config.num_hidden_layers - full, full) == layers
    assert config.conv_channels == channels
    bfloat16 = jnp.dtype(jnp.bfloat16)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 1, bfloat16, bfloat16))
    keys = [layer for layer in cache.layers if isinstance(layer, KVCache)]
    states = [layer.state for layer in cache.layers if isinstance(layer, DeltaNetCache)]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(keys)) == PAGE * kv
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in states) == state
    parameters = sum(prod(shape) for shape in parameter_shapes(config).values())
    assert parameters == pytest.approx(billions * 1e9, rel=NAMED_SIZE)


@pytest.mark.parametrize("name", released())
def test_a_model_has_as_many_parameters_as_its_name_says(name: str) -> None:
    parameters = sum(prod(shape) for shape in parameter_shapes(released_config(name)).values())
    size = short_name(name).removesuffix("b")
    billions = 14.3 if size == "a2.7" else float(size)  # that one is named for what a token uses
    # "0.8B" counts a vision tower, and one digit says no more than this of a small one
    assert parameters == pytest.approx(billions * 1e9, rel=NAMED_SIZE if billions > 10 else 0.07)


QWEN35 = [name for name in released() if name.startswith("qwen3.5-")]


@pytest.mark.parametrize("name", QWEN35)
def test_what_the_models_of_qwen35_have_in_common(name: str) -> None:
    config = released_config(name)
    assert config.vocab_size == 248320
    assert config.max_position_embeddings == 262144
    assert config.eos_token_ids == (248044, 248046)
    assert config.tie_word_embeddings == (short_name(name) in ("0.8b", "2b", "4b"))
    assert config.quantization is None
    assert config.dtype == "bfloat16"
    assert (config.rope.kind, config.rope.theta, config.rotary_dim) == ("default", 1e7, 64)
    assert config.rope.mrope_section == (11, 11, 10)
    assert all(
        (kind == FULL_ATTENTION) == ((layer + 1) % 4 == 0) for layer, kind in enumerate(config.layer_types)
    )


def test_the_35b_is_the_default_of_the_reference_but_for_what_its_release_sets() -> None:
    reference = Qwen3_5MoeTextConfig().to_dict() | {
        "rope_parameters": {"rope_theta": 1e7, "rope_type": "default"},
        "max_position_embeddings": 262144,
        "eos_token_id": [248044, 248046],
        "dtype": "bfloat16",
    }
    assert released_config("35b") == ModelConfig.from_dict(reference)


def test_the_397b_has_the_sizes_that_other_tests_take_it_to_have() -> None:
    config = ModelConfig.from_dict(QWEN_397B | {"eos_token_id": [248044, 248046], "dtype": "bfloat16"})
    assert released_config("397b") == config


@pytest.mark.parametrize(
    "name", ["qwen3.5-397b-a17b", "Qwen3.5-397B-A17B", "Qwen/Qwen3.5-397B-A17B", "397B-A17B", "397b", "397B"]
)
def test_short_names_in_any_case_are_enough(name: str) -> None:
    assert released_config(name) == released_config("qwen3.5-397b-a17b")


@pytest.mark.parametrize("name", ["397", "b", "", "qwen3.5", "qwen3-236b", "a17b", "397b-a10b"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError, match=r"expected one of qwen3\.5-0\.8b, .*, qwen3\.5-397b-a17b"):
        released_config(name)


def write(folder: Path) -> ModelConfig:
    raw = random_config(3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_dict(raw)


def test_a_folder_or_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "397b")
    assert config != released_config("397b")
    monkeypatch.chdir(tmp_path)
    for given in ("397b", tmp_path / "397b", "397b/config.json", str(tmp_path / "397b" / "config.json")):
        assert find_config(given) == config


def test_a_name_is_found_where_there_is_no_folder_or_one_without_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("35B") == released_config("35b")
    (tmp_path / "35B").mkdir()
    assert find_config("35B") == released_config("35b")


def test_a_folder_without_config_is_not_taken_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json does not exist"):
        find_config(tmp_path)


def test_what_is_neither_path_nor_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"'no/such', which is no folder or file; .* qwen3\.5-122b-a10b"):
        find_config("no/such")


def test_float8_is_added_and_changes_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint")
    for given in (*released(), tmp_path / "checkpoint"):
        plain, float8 = find_config(given), find_config(given, dtype="float8")
        assert float8.quantization == FP8
        assert plain.quantization is None
        assert ModelConfig.from_dict({**float8.to_dict(), "quantization_config": None}) == plain

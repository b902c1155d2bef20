"""What is written loads in the reference, strictly and bit for bit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import (
    TIED_SEED,
    TORCH_DTYPES,
    UNTIED_SEED,
    assert_same_bits,
    config_of,
    expected_of,
    random_parameters,
    reference,
)
from safetensors import safe_open
from support.configs import random_ids
from support.reference import parameters_float64, reference_logits
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax.checkpoint.names import hf_key, is_matrix
from qwen_moe_jax.checkpoint.reader import read_parameters
from qwen_moe_jax.checkpoint.writer import EXTRA_FILES, write_safetensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError

DTYPES = ("float32", "bfloat16")
CONFIG = config_of(UNTIED_SEED)


def load_strictly(folder):
    # The plain loop over experts: the default one asks bfloat16 rows to be multiples of 16 bytes.
    model, info = Qwen3_5MoeForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    for weight in model.parameters():
        weight.data = (
            weight.data.clone()
        )  # from file-mapped to aligned memory, on which MKL's last bits depend
    return model.eval()


def read_and_rewrite(seed, dtype, source, target, **options):
    """The reference's checkpoint through our reader (matrices held in float32, as on CPU) and our writer."""
    reference(seed, dtype).save_pretrained(source)
    config = ModelConfig.from_file(source)
    parameters, _ = read_parameters(source, expected_of(config))
    write_safetensors(target, parameters, config, dtype=jnp.dtype(dtype), extra_files_from=source, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 2, TIED_SEED, 5])
def test_the_reference_loads_what_is_written_and_computes_the_same(seed, dtype, tmp_path):
    read_and_rewrite(seed, dtype, tmp_path / "a", tmp_path / "b")
    original, loaded = load_strictly(tmp_path / "a"), load_strictly(tmp_path / "b")
    for (name, a), (_, b) in zip(original.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    ids = random_ids(original.config.to_dict(), 9, seed)
    np.testing.assert_array_equal(reference_logits(loaded, ids), reference_logits(original, ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_checkpoint_loads_in_the_reference_and_here(dtype, tmp_path):
    limit = 20_000
    read_and_rewrite(UNTIED_SEED, dtype, tmp_path / "a", tmp_path / "b", max_shard_bytes=limit)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "b" / "model.safetensors").exists()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert len(list(file.keys())) == 1 or shard.stat().st_size < limit + 10_000  # and a header
    truth = parameters_float64(reference(UNTIED_SEED, dtype))
    read, _ = read_parameters(tmp_path / "b", expected_of(CONFIG))
    assert_same_bits(read, expected_of(CONFIG), truth)
    loaded = load_strictly(tmp_path / "b")
    for name, weight in parameters_float64(loaded).items():
        np.testing.assert_array_equal(weight, truth[name], name)


def test_the_safetensors_library_reads_the_file(tmp_path):
    parameters = random_parameters(CONFIG, matrix="bfloat16")
    write_safetensors(tmp_path, parameters, CONFIG, dtype=jnp.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(map(hf_key, parameters))
        for name, value in parameters.items():
            np.testing.assert_array_equal(file.get_tensor(hf_key(name)), np.asarray(value))


def test_bfloat16_values_held_in_float32_are_written_in_bfloat16_and_small_ones_keep_what_they_need(tmp_path):
    parameters = random_parameters(CONFIG)
    parameters["layers.0.input_layernorm.weight"] = jnp.full(CONFIG.hidden_size, 0.5)
    write_safetensors(tmp_path, parameters, CONFIG, dtype=jnp.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in parameters:
            in_bfloat16 = is_matrix(name) or name == "layers.0.input_layernorm.weight"
            dtype = file.get_tensor(hf_key(name)).dtype
            assert dtype == TORCH_DTYPES["bfloat16" if in_bfloat16 else "float32"], name
    read, _ = read_parameters(tmp_path, expected_of(CONFIG))
    for name, value in parameters.items():
        np.testing.assert_array_equal(np.asarray(read[name]), np.asarray(value))


def test_a_matrix_that_would_be_rounded_is_refused(tmp_path):
    parameters = random_parameters(CONFIG)
    name = "layers.1.mlp.experts.down_proj"
    parameters[name] = parameters[name].at[-1, -1, -1].set(1 + 2**-9)
    with pytest.raises(CheckpointError, match=f"{name} cannot be written in bfloat16 without rounding"):
        write_safetensors(tmp_path, parameters, CONFIG, dtype=jnp.bfloat16)
    assert not list(tmp_path.glob("*.safetensors"))
    write_safetensors(tmp_path, parameters, CONFIG, dtype=jnp.float32)


def test_config_is_written_with_the_dtype_and_the_files_beside_the_weights_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (*EXTRA_FILES, "README.md"):
        (source / name).write_text(f"content of {name}")
    target = tmp_path / "target"
    write_safetensors(target, random_parameters(CONFIG), CONFIG, dtype=jnp.bfloat16, extra_files_from=source)
    written = ModelConfig.from_file(target)
    assert written.dtype == "bfloat16"
    assert written.to_dict() == CONFIG.to_dict() | {"dtype": "bfloat16"}
    for name in EXTRA_FILES:
        assert (target / name).read_text() == f"content of {name}"
    assert not (target / "README.md").exists()


def test_an_earlier_checkpoint_in_the_folder_is_replaced(tmp_path):
    first, second = random_parameters(CONFIG, 1), random_parameters(CONFIG, 2)
    for shard_bytes, parameters in ((20_000, first), (4 << 30, second), (20_000, first), (40_000, second)):
        write_safetensors(
            tmp_path,
            parameters,
            CONFIG,
            dtype=jnp.float32,
            max_shard_bytes=shard_bytes,
            extra_files_from=tmp_path,
        )
        read, _ = read_parameters(tmp_path, expected_of(CONFIG))
        np.testing.assert_array_equal(read["norm.weight"], parameters["norm.weight"])
        assert not list(tmp_path.glob("*.part"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in second.values())


def test_parameters_of_another_configuration_are_refused_by_name(tmp_path):
    parameters = random_parameters(CONFIG)
    del parameters["norm.weight"]
    parameters["layers.0.mlp.gate.bias"] = jnp.zeros(3)
    parameters["lm_head.weight"] = parameters["lm_head.weight"][1:]
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path, parameters, CONFIG, dtype=jnp.float32)
    message = str(caught.value)
    assert "missing norm.weight" in message
    assert "unexpected layers.0.mlp.gate.bias" in message
    assert "wrong shapes lm_head.weight" in message


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written in float16"):
        write_safetensors(tmp_path, random_parameters(CONFIG), CONFIG, dtype=jnp.float16)


def test_a_folder_with_an_orbax_checkpoint_is_refused(tmp_path):
    (tmp_path / "orbax").mkdir()
    with pytest.raises(CheckpointError, match="another layout"):
        write_safetensors(tmp_path, random_parameters(CONFIG), CONFIG, dtype=jnp.float32)

"""The arithmetic of a checkpoint, against the reference and the published sizes."""

import json

import jax.numpy as jnp
import pytest
import torch
from checkpoint_cases import (
    TIED_SEED,
    UNTIED_SEED,
    config_of,
    edit,
    expected_of,
    multimodal_reference,
    random_parameters,
    reference,
)
from support.configs import QWEN_397B, random_config
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qwen_moe_jax.checkpoint import read_box
from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
from qwen_moe_jax.checkpoint.orbax import save_orbax
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError, ConfigError, InputError
from qwen_moe_jax.formats.cache import PAGE, empty_cache

KIB, MIB = 1024, 1024**2
TEXT = {"model_type": "qwen3_5_moe_text", "max_position_embeddings": 262144}

# Sizes of the released models; (config, total and active parameters in billions by their names,
# KiB of bfloat16 keys and values a token, MiB of recurrent state a sequence).
RELEASED = {
    "35B-A3B": (TEXT, 35, 3, 20, 60),
    "122B-A10B": (
        TEXT
        | {
            "hidden_size": 3072,
            "num_hidden_layers": 48,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
            "num_attention_heads": 32,
            "linear_num_value_heads": 64,
        },
        122,
        10,
        24,
        144,
    ),
    "397B-A17B": (
        QWEN_397B,
        397,
        17,
        30,
        180,
    ),
}


def write_config(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def meta_parameters(raw) -> int:
    """Parameters of the reference, built without memory."""
    given = {key: value for key, value in raw.items() if key != "model_type"}
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**given))
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, tmp_path):
    raw, billions, active_billions, kv_kib, state_mib = RELEASED[name]
    summary = inspect_checkpoint(write_config(tmp_path, raw))
    total = sum(summary.parameters.values())
    assert total == meta_parameters(raw)
    assert round(total / 1e9) in (billions - 1, billions)  # names round, and count vision and MTP differently
    assert round(sum(summary.active_parameters.values()) / 1e9) in (active_billions - 1, active_billions)
    assert summary.kv_bytes_per_token == {"bfloat16": kv_kib * KIB, "float32": 2 * kv_kib * KIB}
    assert summary.state_bytes == state_mib * MIB
    assert summary.loaded_bytes["float32"] == 4 * total
    assert (
        2 * total < summary.loaded_bytes["bfloat16"] < 2.001 * total
    )  # the small parameters stay in float32


@pytest.mark.parametrize("seed", range(12))
def test_parameters_and_caches_are_what_the_model_holds(seed, tmp_path):
    raw, config = random_config(seed), config_of(seed)
    summary = inspect_checkpoint(write_config(tmp_path, raw), context=100)
    assert sum(summary.parameters.values()) == meta_parameters(raw)
    for dtype in ("bfloat16", "float32"):
        held = expected_of(config, dtype)
        assert summary.loaded_bytes[dtype] == sum(s.size * s.dtype.itemsize for s in held.values())
        cache = empty_cache(config, 1, 2 * PAGE, jnp.dtype(dtype), jnp.dtype(dtype))
        arrays = [array for layer in cache.layers for array in vars(layer).values()]
        keys = 2 * PAGE * summary.kv_bytes_per_token[dtype]
        sequence = keys + summary.state_bytes + summary.conv_bytes[dtype]
        assert sequence == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("seed", [UNTIED_SEED, TIED_SEED])
def test_active_parameters_are_those_one_token_reads(seed, tmp_path):
    config = config_of(seed)
    summary = inspect_checkpoint(write_config(tmp_path, random_config(seed)))
    idle = dict(summary.parameters)
    for component, active in summary.active_parameters.items():
        idle[component] -= active
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    unused_experts = config.num_experts - config.num_experts_per_tok
    assert idle.pop("routed experts") == config.num_hidden_layers * unused_experts * expert
    other_rows = (config.vocab_size - 1) * config.hidden_size
    assert idle.pop("embedding") == (0 if config.tie_word_embeddings else other_rows)
    assert not any(idle.values())
    assert ("lm_head" in summary.parameters) == (not config.tie_word_embeddings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_on_disk_come_from_headers_alone(dtype, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(read_box, "_copy", refuse)
    model = multimodal_reference(dtype)
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"mtp.norm.weight": torch.zeros(10, dtype=torch.float16)}))
    summary = inspect_checkpoint(tmp_path)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    visual = sum(size for name, size in sizes.items() if name.startswith("model.visual."))
    assert summary.layout == "safetensors"
    assert summary.stored_bytes == {dtype: sum(sizes.values()) - visual}
    assert summary.skipped_bytes == {"model.visual": visual, "mtp": 20}
    assert "not loaded       model.visual" in str(summary)


def test_orbax_layout_is_recognised(tmp_path):
    config = config_of(UNTIED_SEED)
    parameters = random_parameters(config)
    save_orbax(tmp_path, parameters, config, dtype=jnp.float32)
    summary = inspect_checkpoint(tmp_path)
    assert summary.layout == "Orbax"
    assert summary.stored_bytes == {"float32": sum(value.nbytes for value in parameters.values())}


def test_config_alone_is_enough_and_the_report_says_so(tmp_path):
    summary = inspect_checkpoint(write_config(tmp_path, TEXT))
    assert summary.layout is None
    assert summary.stored_bytes == {}
    assert "no weights in this folder, only config.json" in str(summary)


def test_the_report_names_the_architecture_and_the_sizes(tmp_path):
    report = str(inspect_checkpoint(write_config(tmp_path, TEXT), context=8192))
    for part in (
        "40 of width 2048: 30 Gated DeltaNet, 10 full attention",
        "256 of width 512, top-8",
        "16 query heads, 2 key/value heads of 256, 64 rotated",
        "34,660,610,688",
        "20 KiB in bfloat16",
        "60 MiB of recurrent state",
        "of 8192 tokens",
    ):
        assert part in report


def test_bad_input_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(InputError, match="context is 0"):
        inspect_checkpoint(write_config(tmp_path, TEXT), context=0)
    write_config(tmp_path, {"model_type": "llama"})
    with pytest.raises(ConfigError, match="llama"):
        inspect_checkpoint(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    reference(UNTIED_SEED).save_pretrained(tmp_path)
    raw = ModelConfig.from_file(tmp_path).to_dict()
    write_config(tmp_path, raw | {"vocab_size": raw["vocab_size"] + 1})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is .* instead of"):
        inspect_checkpoint(tmp_path)

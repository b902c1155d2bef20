"""The configuration: what the reference reads from the same file, and what is refused."""

import dataclasses
import json

import pytest
from support.configs import random_config
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeTextConfig

from qwen_moe_jax.config import ModelConfig, RopeConfig
from qwen_moe_jax.errors import CheckpointNotFoundError, ConfigError

TEXT = {"model_type": "qwen3_5_moe_text"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# One name in both, one meaning.
SAME_NAME = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
]


def reference_of(raw):
    return Qwen3_5MoeTextConfig(**{key: value for key, value in raw.items() if key != "model_type"})


def assert_equal_to_reference(config, reference):
    for name in SAME_NAME:
        assert getattr(config, name) == getattr(reference, name), name
    assert list(config.layer_types) == reference.layer_types
    rope = reference.rope_parameters
    assert config.rope.kind == rope["rope_type"]
    assert config.rope.theta == rope["rope_theta"]
    assert config.rope.partial_rotary_factor == rope["partial_rotary_factor"]
    assert list(config.rope.mrope_section) == rope.get("mrope_section", [11, 11, 10])
    if config.rope.kind == "yarn":
        for name in ("factor", "original_max_position_embeddings", "attention_factor", "mscale"):
            assert getattr(config.rope, name) == rope.get(name), name
        assert config.rope.mscale_all_dim == rope.get("mscale_all_dim")
        assert config.rope.beta_fast == rope.get("beta_fast", 32)
        assert config.rope.beta_slow == rope.get("beta_slow", 1)
        assert config.rope.truncate == rope.get("truncate", True)


def test_missing_values_are_the_references_defaults_except_rope_theta():
    config = ModelConfig.from_dict(TEXT)
    # The reference falls back to the 10000 that all its models share; no Qwen3.5 MoE was trained with that.
    assert config.rope.theta == 1e7
    assert_equal_to_reference(config, Qwen3_5MoeTextConfig(rope_parameters={"rope_theta": 1e7}))


def test_null_values_mean_missing():
    nulls = dict.fromkeys(("head_dim", "layer_types", "hidden_act", "eos_token_id", "rope_scaling", "dtype"))
    assert ModelConfig.from_dict(TEXT | nulls) == ModelConfig.from_dict(TEXT)


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_are_read_as_the_reference_reads_them(seed):
    raw = random_config(seed)
    assert_equal_to_reference(ModelConfig.from_dict(raw), reference_of(raw))


@pytest.mark.parametrize("seed", range(12))
def test_text_config_json_of_the_reference_is_read(seed, tmp_path):
    reference = reference_of(
        random_config(seed) | {"eos_token_id": [3, 5], "bos_token_id": 1, "dtype": "bfloat16"}
    )
    reference.save_pretrained(tmp_path)
    config = ModelConfig.from_file(tmp_path)
    assert_equal_to_reference(config, reference)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((3, 5), 1, "bfloat16")
    assert ModelConfig.from_file(tmp_path / "config.json") == config


@pytest.mark.parametrize("tied", [False, True])
def test_multimodal_config_json_of_the_reference_is_read(tied, tmp_path):
    text = reference_of(random_config(3) | {"tie_word_embeddings": tied}).to_dict()
    reference = Qwen3_5MoeConfig(text_config=text, tie_word_embeddings=tied, dtype="float32", eos_token_id=4)
    reference.save_pretrained(tmp_path)
    config = ModelConfig.from_file(tmp_path)
    assert_equal_to_reference(config, reference.text_config)
    assert (config.dtype, config.eos_token_ids) == ("float32", (4,))


@pytest.mark.parametrize("seed", range(24))
def test_to_dict_and_from_dict_are_inverse_and_the_reference_reads_the_same(seed):
    config = ModelConfig.from_dict(random_config(seed) | {"eos_token_id": 2, "dtype": "float32"})
    written = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(written) == config
    assert_equal_to_reference(config, Qwen3_5MoeTextConfig.from_dict(written))


@pytest.mark.parametrize("extra", [{}, {"attention_factor": 1.2}, {"truncate": False, "beta_fast": 8.0}])
def test_yarn_round_trips(extra):
    config = ModelConfig.from_dict(TEXT | {"rope_parameters": YARN | extra})
    assert ModelConfig.from_dict(config.to_dict()) == config
    derived = ModelConfig.from_dict(TEXT | {"rope_parameters": YARN | extra | {"factor": None}})
    assert derived.rope.factor is None
    assert ModelConfig.from_dict(derived.to_dict()) == derived


def test_older_rope_scaling_wins_over_rope_parameters_as_in_the_reference():
    raw = TEXT | {
        "rope_scaling": YARN | {"type": "yarn"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "rope_theta": 7.0,
        "partial_rotary_factor": 0.5,
    }
    config = ModelConfig.from_dict(raw)
    assert_equal_to_reference(config, reference_of(raw))
    assert (config.rope.kind, config.rope.theta, config.rope.partial_rotary_factor) == ("yarn", 7.0, 0.5)


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 7])
def test_layer_pattern_follows_the_interval_as_in_the_reference(interval):
    raw = TEXT | {"num_hidden_layers": 9, "full_attention_interval": interval}
    assert list(ModelConfig.from_dict(raw).layer_types) == reference_of(raw).layer_types


def test_layer_types_win_over_the_interval():
    pattern = ["full_attention", "linear_attention", "linear_attention"]
    raw = TEXT | {"num_hidden_layers": 3, "layer_types": pattern, "full_attention_interval": 1}
    assert ModelConfig.from_dict(raw).layer_types == tuple(pattern)


def test_multimodal_outer_values_fill_in_for_the_text_model():
    raw = {
        "model_type": "qwen3_5_moe",
        "text_config": TEXT | {"tie_word_embeddings": True},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": None,
    }
    config = ModelConfig.from_dict(raw)
    assert config.tie_word_embeddings is False
    assert config.dtype == "bfloat16"


def test_derived_widths():
    config = ModelConfig.from_dict(TEXT)
    assert (config.key_dim, config.value_dim, config.conv_channels, config.rotary_dim) == (
        2048,
        4096,
        8192,
        64,
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "qwen3"}, "'qwen3'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "qwen3_5_moe"}, "text_config"),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_text"}}, "'qwen3_5_text'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'"),
        ({"quantization_config": {"quant_method": "exl2"}}, "'exl2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "bits None"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"torch_dtype": "float64"}, "dtype is 'float64'"),
        ({"layer_types": ["linear_attention"] * 39 + ["sliding_attention"]}, "'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "1 entries but num_hidden_layers is 40"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": "16"}, "num_attention_heads is '16'"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 .* num_key_value_heads 2"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads 24 .* linear_num_key_heads 16"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok 300"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"eos_token_id": 248320}, "248320"),
        ({"eos_token_id": ["<|im_end|>"]}, "im_end"),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor 1.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.001}}, "gives 0 rotated dimensions"),
        ({"rope_parameters": {"mrope_section": [11, 21]}}, r"mrope_section is \[11, 21\]"),
        ({"rope_parameters": {"mrope_interleaved": False}}, "mrope_interleaved is false"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "one object for all layers"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_parameters": YARN | {"factor": "4"}}, "factor is '4'"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate is 'no'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(TEXT | values)


def test_a_contradictory_configuration_cannot_be_built_directly_either():
    config = ModelConfig.from_dict(TEXT)
    with pytest.raises(ConfigError, match="num_hidden_layers is 41"):
        dataclasses.replace(config, num_hidden_layers=41)
    with pytest.raises(ConfigError, match="rotated dimensions"):
        dataclasses.replace(config, rope=RopeConfig(partial_rotary_factor=2.0))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json does not exist"):
        ModelConfig.from_file(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{not json")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_file(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="JSON list"):
        ModelConfig.from_file(file)

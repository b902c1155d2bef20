"""Random model configurations over everything a Qwen3.5 MoE config.json may vary."""

from typing import Any

import numpy as np

LINEAR, FULL = "linear_attention", "full_attention"
MAX_POSITIONS = 512  # room for the longest prompt (200) and 128 new tokens
PATTERNS = (
    (LINEAR, LINEAR, LINEAR, FULL),  # the released 3:1
    (FULL, LINEAR),
    (LINEAR, FULL, FULL),
    (LINEAR, LINEAR, LINEAR),
    (FULL, FULL),
    (LINEAR, FULL, LINEAR, LINEAR, FULL),
    (FULL, LINEAR, LINEAR),
)


QWEN35_MOE = "qwen3_5_moe_text"
MODEL_TYPES = (QWEN35_MOE, "qwen3_5_text", "qwen3_next", "qwen3_moe", "qwen2_moe")

_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def family_config(model_type: str, seed: int) -> dict[str, Any]:
    """The dictionary of a text-only config.json of a family, drawn as of `random_config`."""
    config = random_config(seed) | {"model_type": model_type}
    if model_type == QWEN35_MOE:
        return config
    config["intermediate_size"] = (20, 44, 31, 64)[seed % 4]
    if model_type == "qwen3_5_text":
        return {key: value for key, value in config.items() if key not in _EXPERTS}
    layers = config["num_hidden_layers"]
    config["mlp_only_layers"] = ([], [layers - 1], [], [0])[seed % 4]
    config["decoder_sparse_step"] = 2 if seed % 5 == 2 and layers > 2 else 1
    config["norm_topk_prob"] = seed % 3 != 1
    rope = config["rope_parameters"] = dict(config["rope_parameters"])
    del rope["mrope_section"], rope["mrope_interleaved"]
    if model_type == "qwen3_next":
        return config
    del rope["partial_rotary_factor"], config["layer_types"]
    config = {key: value for key, value in config.items() if not key.startswith("linear_")}
    if model_type == "qwen3_moe":
        del config["shared_expert_intermediate_size"]
        return config
    del config["attention_bias"]
    config["qkv_bias"] = seed % 5 != 4
    if seed % 2:
        config["hidden_size"] = config["num_attention_heads"] * config.pop("head_dim")
    return config


def random_config(seed: int) -> dict[str, Any]:
    """The dictionary of a text-only config.json; every consecutive dozen of seeds covers most values.

    What matters most goes round by the seed, with periods that share no factor where they can, so
    that few seeds cover it; the rest is drawn.
    """
    rng = np.random.default_rng([seed, 35])

    def pick(*values: Any) -> Any:
        value = values[rng.integers(len(values))]
        return value.item() if isinstance(value, np.generic) else value

    layer_types = PATTERNS[seed % len(PATTERNS)]
    kv_heads = 1 + seed % 4
    key_heads = pick(1, 2, 3, 5) if seed % 3 < 2 else pick(1, 2, 3)
    head_dim = pick(8, 16, 24, 32)
    partial = (0.25, 0.5, 1.0, 0.75)[(seed // 4 + seed) % 4]
    num_frequencies = int(head_dim * partial) // 2
    height = int(rng.integers(num_frequencies // 3 + 1))
    width = int(rng.integers(num_frequencies // 3 + 1))
    num_experts = (4, 8, 16, 32, 6, 12)[(seed + seed // 6) % 6]
    top_k = min(num_experts, (1, 2, 3, 4, 8)[seed % 5])
    intermediate = pick(8, 12, 16, 24)

    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": pick(1e4, 1e6, 1e7),
        "partial_rotary_factor": partial,
        "mrope_section": [num_frequencies - height - width, height, width],
        "mrope_interleaved": True,
    }
    if seed % 6 == 5:
        rope |= {
            "rope_type": "yarn",
            "original_max_position_embeddings": pick(64, 128, 256),
            "truncate": pick(True, False),
        }
        rope["factor"] = MAX_POSITIONS / rope["original_max_position_embeddings"]
        rope |= pick(
            {}, {"attention_factor": 1.1}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"beta_fast": 16.0}
        )
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": pick(67, 131, 257, 96),
        "hidden_size": pick(24, 32, 40, 48),
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": kv_heads * pick(1, 2, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * (1, 2, 4)[(seed + seed // 3) % 3],
        "linear_key_head_dim": pick(8, 16, 24),
        "linear_value_head_dim": pick(8, 16, 20),
        "linear_conv_kernel_dim": 2 + seed % 3,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": intermediate,
        "shared_expert_intermediate_size": pick(intermediate, 10, 32),
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": pick(1e-6, 1e-5),
        "tie_word_embeddings": seed % 4 == 3,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def random_ids(config: dict[str, Any], length: int, seed: int) -> np.ndarray:
    """Token ids, int64 [length]."""
    return np.random.default_rng([seed, length]).integers(0, config["vocab_size"], length)


# The sizes of Qwen3.5-397B-A17B; what is not named is the default.
QWEN_397B: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
    "max_position_embeddings": 262144,
}

# Every dimension divides by 8, so that half of 8 devices hold half of what is divided.
DIVISIBLE_BY_8: dict[str, Any] = {
    "vocab_size": 96,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

# Every quantised dimension is at most one block or whole blocks: transformers 5.23 takes an FP8 block to
# have the dimension over the number of scales, and reads others wrongly (160 in two blocks as twice 80).
WHOLE_BLOCKS: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

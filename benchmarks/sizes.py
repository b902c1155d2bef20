"""Sizes of the models that benchmarks make, as config.json has them."""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "mid": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "large": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "397b-narrow": {
        "vocab_size": 15520,
        "hidden_size": 256,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
}
# one matrix as large as the vocabulary shows as much as two
SIZES["35b-slice"] = SIZES["large"] | {"vocab_size": 248320, "tie_word_embeddings": True}
# head_dim -> temporal, height, width frequencies
MROPE_SECTION = {16: [2, 0, 0], 32: [2, 1, 1], 128: [6, 5, 5], 256: [11, 11, 10]}


def family_sizes(size: str, model_type: str) -> dict[str, Any]:
    """What a model type has of the sizes of `SIZES`; dense MLPs are as wide as 16 experts."""
    found = dict(SIZES[size])
    if model_type == "qwen3_5_moe_text":
        return found
    found["intermediate_size"] = 16 * found["moe_intermediate_size"]
    absent = {
        "qwen3_5_text": ("num_experts", "moe_", "shared_"),
        "qwen3_moe": ("linear_", "shared_"),
        "qwen2_moe": ("linear_",),
    }.get(model_type, ())
    return {key: value for key, value in found.items() if not key.startswith(absent)}

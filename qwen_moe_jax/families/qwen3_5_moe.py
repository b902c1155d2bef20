"""Qwen3.5 MoE: Gated DeltaNet and gated attention, experts with a shared one in every layer.

Source: `Qwen3_5MoeTextConfig` and `modeling_qwen3_5_moe.py` of transformers 5.23.0. What a released
config.json may leave out is that of Qwen3.5-35B-A3B.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import SPARSE, layer_types
from qwen_moe_jax.families.rope import RopeConfig

# Sizes that all of Qwen3.5 has, and Qwen3-Next but for its vocabulary.
COMMON_SIZES: Mapping[str, int] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 32768,
}
COMMON_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
}
COMMON_FEATURES: Mapping[str, Any] = {
    "norm_offset": 1.0,
    "qk_norm": True,
    "qkv_bias": False,
    "attn_output_gate": True,
}
# The reference falls back to the 10000 that all its models share; no Qwen3.5 was trained with that.
ROPE = RopeConfig(theta=1e7, partial_rotary_factor=0.25, mrope_section=(11, 11, 10))
MTP = ("mtp_num_hidden_layers", None)


def _read(text: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    layers = sizes["num_hidden_layers"]
    return {"layer_types": layer_types(text, layers), "mlp_types": (SPARSE,) * layers}


def written_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries on token mixers."""
    return {"layer_types": list(fields["layer_types"]), "attention_bias": False}


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    multimodal_type="qwen3_5_moe",
    title="Qwen3.5 MoE",
    architecture="Qwen3_5MoeForCausalLM",
    sizes={
        **COMMON_SIZES,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    fixed={**COMMON_FIXED, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    features={**COMMON_FEATURES, "norm_topk_prob": True},
    rope=ROPE,
    read=_read,
    write=written_layers,
    mtp_layers=MTP,
)

"""Qwen2 MoE (and Qwen1.5 MoE): attention with biases in every layer, experts with a gated shared one.

Source: `Qwen2MoeConfig` and `modeling_qwen2_moe.py` of transformers 5.23.0, whose defaults, those of
Qwen1.5-MoE-A2.7B, stand for what a config.json leaves out.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import attention_only, switch, written_routing
from qwen_moe_jax.families.rope import PLAIN_ROPE


def _read(text: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    return {**attention_only(text, sizes), "qkv_bias": switch(text, "qkv_bias", True)}


def _write(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "head_dim": fields["head_dim"],
        "qkv_bias": fields["qkv_bias"],
        **written_routing(fields),
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    title="Qwen2 MoE",
    architecture="Qwen2MoeForCausalLM",
    sizes={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 32768,
    },
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    features={"norm_offset": 0.0, "qk_norm": False, "attn_output_gate": False},
    rope=PLAIN_ROPE,
    read=_read,
    write=_write,
)

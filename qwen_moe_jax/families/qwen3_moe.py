"""Qwen3 MoE: attention with q/k norms in every layer, experts without a shared one.

Source: `Qwen3MoeConfig` and `modeling_qwen3_moe.py` of transformers 5.23.0, whose defaults stand for what a
config.json leaves out.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import attention_only, written_routing
from qwen_moe_jax.families.rope import PLAIN_ROPE


def _write(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "head_dim": fields["head_dim"],
        **written_routing(fields),
        "attention_bias": False,
        "use_sliding_window": False,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3 MoE",
    architecture="Qwen3MoeForCausalLM",
    sizes={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 32768,
    },
    aliases={"num_local_experts": "num_experts"},
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    features={"norm_offset": 0.0, "qk_norm": True, "qkv_bias": False, "attn_output_gate": False},
    rope=PLAIN_ROPE,
    read=attention_only,
    write=_write,
)

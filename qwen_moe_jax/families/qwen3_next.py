"""Qwen3-Next: the layers of Qwen3.5 MoE, one position a token, and two projections of Gated DeltaNet fused.

Source: `Qwen3NextConfig` and `modeling_qwen3_next.py` of transformers 5.23.0, whose defaults, those of
Qwen3-Next-80B-A3B, stand for what a config.json leaves out. That class drops multi-token prediction and
config.json does not name it; the released checkpoints hold one layer of it (`Qwen3NextMTP` of vLLM).
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import layer_types, routing, written_routing
from qwen_moe_jax.families.qwen3_5_moe import COMMON_FEATURES, COMMON_SIZES, written_layers
from qwen_moe_jax.families.rope import RopeConfig


def _read(text: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "layer_types": layer_types(text, sizes["num_hidden_layers"]),
        **routing(text, sizes, renormalised=True),
    }


def _write(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**written_layers(fields), **written_routing(fields)}


FAMILY = Family(
    model_type="qwen3_next",
    title="Qwen3-Next",
    architecture="Qwen3NextForCausalLM",
    sizes={
        **COMMON_SIZES,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    features=COMMON_FEATURES,
    rope=RopeConfig(theta=1e4, partial_rotary_factor=0.25, mrope_section=None),
    read=_read,
    write=_write,
    mtp_layers=("mtp_num_hidden_layers", 1),
    fused_delta_net=True,
)

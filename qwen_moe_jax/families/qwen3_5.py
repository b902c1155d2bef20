"""Dense Qwen3.5: the token mixers of Qwen3.5 MoE, and one MLP in every layer instead of experts.

Source: `Qwen3_5TextConfig` and `modeling_qwen3_5.py` of transformers 5.23.0. What a released config.json may
leave out is that class's default, the sizes of Qwen3.5-9B.
"""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import DENSE, layer_types
from qwen_moe_jax.families.qwen3_5_moe import (
    COMMON_FEATURES,
    COMMON_FIXED,
    COMMON_SIZES,
    MTP,
    ROPE,
    written_layers,
)


def _read(text: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    layers = sizes["num_hidden_layers"]
    return {"layer_types": layer_types(text, layers), "mlp_types": (DENSE,) * layers}


FAMILY = Family(
    model_type="qwen3_5_text",
    multimodal_type="qwen3_5",
    title="Qwen3.5",
    architecture="Qwen3_5ForCausalLM",
    sizes={
        **COMMON_SIZES,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    fixed=COMMON_FIXED,
    # nothing is routed
    features={**COMMON_FEATURES, "norm_topk_prob": False},
    rope=ROPE,
    read=_read,
    write=written_layers,
    mtp_layers=MTP,
)

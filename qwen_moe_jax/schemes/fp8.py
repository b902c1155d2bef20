"""`quant_method: fp8`, as Qwen publishes it: blocks of 128 x 128 and the modules that stay as they were."""

import json
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.schemes.fields import names_of
from qwen_moe_jax.schemes.scheme import Quantization, Rule, Scheme

BLOCK = 128

_FIXED = {
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

# Matrices of the layers that published FP8 checkpoints keep in their float dtype.
UNQUANTISED = (
    r".*\.mlp\.gate\Z",
    r".*\.mlp\.shared_expert_gate\Z",
    r".*\.linear_attn\.in_proj_(a|b|ba)\Z",
)

FP8 = Quantization(
    "fp8",
    (
        Rule(UNQUANTISED, None),
        Rule((r"(.*\.)?layers\.\d+\.",), Scheme("e4m3", (BLOCK, BLOCK), "fp8", scale_dtype="float32")),
    ),
    json.dumps({"quant_method": "fp8", **_FIXED}),
)


def read_fp8(raw: Mapping[str, Any]) -> Quantization:
    """The published FP8 layout; of `modules_to_not_convert` also what lies inside is not quantised.

    Raises:
        ConfigError: another one.
    """
    for key, implemented in _FIXED.items():
        value = raw.get(key)
        if value is not None and value != implemented:
            raise ConfigError(
                f"quantization_config has {key} {value!r}; only {implemented!r} is implemented for "
                "quant_method 'fp8'."
            )
    kept = names_of("modules_to_not_convert", raw.get("modules_to_not_convert"))
    if not kept:
        return FP8
    named = Rule((), None, frozenset(kept), inside=True)
    return Quantization("fp8", (named, *FP8.rules), json.dumps(raw, sort_keys=True))

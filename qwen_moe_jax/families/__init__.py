"""The families: one file each, found by the `model_type` of a config.json."""

from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.families import qwen2_moe, qwen3_5, qwen3_5_moe, qwen3_moe, qwen3_next
from qwen_moe_jax.families.family import Family

FAMILIES: tuple[Family, ...] = (
    qwen3_5_moe.FAMILY,
    qwen3_5.FAMILY,
    qwen3_next.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
)
_BY_TYPE = {
    model_type: family
    for family in FAMILIES
    for model_type in (family.model_type, family.multimodal_type)
    if model_type is not None
}


def find_family(raw: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json of either form.

    Raises:
        ConfigError: a model type that no family has.
    """
    model_type = raw.get("model_type")
    if model_type not in _BY_TYPE:
        raise ConfigError(
            f"config.json has model_type {model_type!r}; expected one of {', '.join(map(repr, _BY_TYPE))}: "
            "this library implements no other architecture."
        )
    return _BY_TYPE[model_type]

"""What config.json says of the parts beside the text model: multi-token prediction and the vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeGuard

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.families import find_family

# What a vision_config may leave out, as transformers fills it in.
_VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}

_VISION_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_vision", "qwen3_5", "qwen3_5_vision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision tower's parameters.

    Attributes:
        depth: blocks.
        hidden_size: width of a block.
        intermediate_size: width of a block's MLP.
        num_heads: attention heads of a block; they divide hidden_size.
        in_channels: of an image.
        patch_size: pixels of a patch, each way.
        spatial_merge_size: patches that are merged into one token, each way.
        temporal_patch_size: frames of a patch.
        out_hidden_size: width of the tokens that leave the tower, the text model's.
        num_position_embeddings: learned positions.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    out_hidden_size: int
    num_position_embeddings: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "VisionConfig":
        """Reads the `vision_config` of a parsed config.json.

        Raises:
            ConfigError: there is none, it is of another architecture, or a size is no positive integer.
        """
        vision = raw.get("vision_config")
        if not isinstance(vision, Mapping):
            raise ConfigError(
                "config.json has no vision_config object, which says how large the vision tower is; use the "
                "config.json that the checkpoint was published with."
            )
        kind = vision.get("model_type", _VISION_MODEL_TYPES[0])
        if kind not in _VISION_MODEL_TYPES:
            raise ConfigError(
                f"vision_config has model_type {kind!r}; expected one of {', '.join(_VISION_MODEL_TYPES)}."
            )
        if vision.get("deepstack_visual_indexes"):
            raise ConfigError(
                f"vision_config has deepstack_visual_indexes {vision['deepstack_visual_indexes']!r}; "
                "the vision tower of Qwen3.5 has one merger, behind its last block, and expects none."
            )
        sizes = {}
        for key, default in _VISION_DEFAULTS.items():
            value = default if vision.get(key) is None else vision[key]
            if not _is_positive(value):
                raise ConfigError(f"vision_config has {key} {value!r}; expected a positive integer.")
            sizes[key] = value
        if sizes["hidden_size"] % sizes["num_heads"]:
            raise ConfigError(
                f"vision_config has hidden_size {sizes['hidden_size']}, which is not a multiple of num_heads "
                f"{sizes['num_heads']}."
            )
        return cls(**sizes)


def describes_mtp(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json has multi-token prediction: it says so, or its model type always has."""
    family = find_family(raw)
    if family.mtp_layers is None:
        return False
    key, default = family.mtp_layers
    return default is not None or family.text_of(raw).get(key) is not None


def mtp_layers(raw: Mapping[str, Any]) -> int:
    """How many decoder layers multi-token prediction has, from a parsed config.json of either form.

    Raises:
        ConfigError: the model type has none; the number is absent or no positive integer; or the part has an
            embedding of its own.
    """
    family = find_family(raw)
    if family.mtp_layers is None:
        raise ConfigError(f"model_type is {family.model_type!r}, which has no multi-token prediction.")
    text = family.text_of(raw)
    key, default = family.mtp_layers
    layers = default if text.get(key) is None else text[key]
    if not _is_positive(layers):
        raise ConfigError(
            f"{key} is {layers!r}; expected the number of layers of multi-token prediction, "
            "a positive integer, as in the config.json that the checkpoint was published with."
        )
    if text.get("mtp_use_dedicated_embeddings"):
        raise ConfigError(
            "mtp_use_dedicated_embeddings is true; only multi-token prediction that shares the text model's "
            "embedding is implemented."
        )
    return layers


def _is_positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

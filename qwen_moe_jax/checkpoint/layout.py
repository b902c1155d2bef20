"""The key table: which parameters a checkpoint of a configuration holds, under which names and shapes.

A *canonical name* is a Hugging Face key without its `model.` or `model.language_model.` prefix, which is
also the module path of the parameter, e.g. `layers.0.linear_attn.in_proj_qkv.weight`.

Routed experts come in two layouts: fused (`mlp.experts.gate_up_proj` [E, 2I, H], gate rows first, and
`mlp.experts.down_proj` [E, H, I]), as the model holds them, or one matrix an expert
(`mlp.experts.J.{gate,up,down}_proj.weight`), as `save_pretrained` of transformers 5 writes them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import Any

from qwen_moe_jax.checkpoint.block_scales import BLOCK, scale_shape
from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig

_MULTIMODAL_PREFIX = "model.language_model."
_TEXT_PREFIX = "model."
_LM_HEAD = "lm_head.weight"

# Parts that a checkpoint may hold beside the text model, and what their keys begin with (see `parts.py`).
PART_PREFIXES = {"visual": "model.visual.", "mtp": "mtp."}

# Small, and read in float32: everything else is a matrix of a product or a lookup table.
_VECTOR_ENDINGS = ("norm.weight", "conv1d.weight", "A_log", "dt_bias", "_scale_inv")

# Behind the name of a float8 matrix, the name of its scales, which it is to be multiplied with.
_SCALE = "_scale_inv"

# Matrices of the layers that FP8 checkpoints keep in their float dtype.
_UNQUANTISED_ENDINGS = (
    "mlp.gate.weight",
    "mlp.shared_expert_gate.weight",
    "linear_attn.in_proj_a.weight",
    "linear_attn.in_proj_b.weight",
)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter of the text model, in the order a token meets them.

    `lm_head.weight` is absent when it is tied to the embedding. A matrix in float8 is followed by its scales.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer, kind in enumerate(config.layer_types):
        shapes |= layer_shapes(config, layer, kind)
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def layer_shapes(config: ModelConfig, layer: int, kind: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a decoder layer's parameters, with scales; `kind` as in `layer_types`."""
    hidden = config.hidden_size
    parts = {
        "input_layernorm.weight": (hidden,),
        **(_attention_shapes(config) if kind == FULL_ATTENTION else _delta_net_shapes(config)),
        "post_attention_layernorm.weight": (hidden,),
        **_moe_shapes(config),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for part, shape in parts.items():
        name = f"layers.{layer}.{part}"
        shapes[name] = shape
        if config.float8 and is_block_scaled(name):
            shapes[scale_name(name)] = _scale_shape(name, shape)
    return shapes


def _attention_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "self_attn.q_proj.weight": (2 * queries, c.hidden_size),  # per head: query, then output gate
        "self_attn.k_proj.weight": (keys, c.hidden_size),
        "self_attn.v_proj.weight": (keys, c.hidden_size),
        "self_attn.q_norm.weight": (c.head_dim,),
        "self_attn.k_norm.weight": (c.head_dim,),
        "self_attn.o_proj.weight": (c.hidden_size, queries),
    }


def _delta_net_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads = c.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkv.weight": (c.conv_channels, c.hidden_size),  # rows of Q, then K, then V
        "linear_attn.in_proj_z.weight": (c.value_dim, c.hidden_size),
        "linear_attn.in_proj_b.weight": (heads, c.hidden_size),
        "linear_attn.in_proj_a.weight": (heads, c.hidden_size),
        "linear_attn.conv1d.weight": (c.conv_channels, 1, c.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (c.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (c.hidden_size, c.value_dim),
    }


def _moe_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, routed, shared = c.num_experts, c.moe_intermediate_size, c.shared_expert_intermediate_size
    return {
        "mlp.gate.weight": (experts, c.hidden_size),  # the router
        "mlp.experts.gate_up_proj": (experts, 2 * routed, c.hidden_size),
        "mlp.experts.down_proj": (experts, c.hidden_size, routed),
        "mlp.shared_expert.gate_proj.weight": (shared, c.hidden_size),
        "mlp.shared_expert.up_proj.weight": (shared, c.hidden_size),
        "mlp.shared_expert.down_proj.weight": (c.hidden_size, shared),
        "mlp.shared_expert_gate.weight": (1, c.hidden_size),
    }


def canonical_name(hf_key: str) -> str | None:
    """The key without its prefix, in either form; None if it does not lie under the text model."""
    if hf_key == _LM_HEAD:
        return hf_key
    if skipped_family(hf_key) is not None:
        return None
    for prefix in (_MULTIMODAL_PREFIX, _TEXT_PREFIX):
        if hf_key.startswith(prefix):
            return hf_key.removeprefix(prefix)
    return None


def hf_key(name: str) -> str:
    """The key of a canonical name in a text-only checkpoint (`Qwen3_5MoeForCausalLM`)."""
    return name if name == _LM_HEAD else _TEXT_PREFIX + name


def skipped_family(hf_key: str) -> str | None:
    """The family that text generation does not use ("model.visual" or "mtp") a key belongs to, or None."""
    found = next((prefix for prefix in PART_PREFIXES.values() if hf_key.startswith(prefix)), None)
    return found.removesuffix(".") if found else None


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Which keys of a checkpoint are read, and under which names.

    Attributes:
        name: key -> canonical name, or None if there is none.
        key: canonical name -> the key that errors ask for.
        skipped: key -> the family of keys beside these that it belongs to, or None.
    """

    name: Callable[[str], str | None]
    key: Callable[[str], str]
    skipped: Callable[[str], str | None]


TEXT_KEYS = KeyMap(canonical_name, hf_key, skipped_family)


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many there are; scales are part of what is stored, and no parameters."""
    return sum(prod(shape) for name, shape in shapes.items() if not is_scale(name))


def scale_name(name: str) -> str:
    """The parameter that a float8 matrix's scales are."""
    return name + _SCALE


def is_scale(name: str) -> bool:
    """Whether a parameter is the scales of a matrix."""
    return name.endswith(_SCALE)


def matrix_name(name: str) -> str:
    """The matrix that a parameter is the scales of, or the parameter itself."""
    return name.removesuffix(_SCALE)


def _scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scale for each block; gate and up rows of an expert, matrices of their own, do not share any."""
    *stack, rows, columns = shape
    parts = 2 if name.endswith("gate_up_proj") else 1
    down, across = scale_shape((rows // parts, columns))
    return (*stack, parts * down, across)


def is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a product or a lookup table, so that it is held in the matrix dtype.

    The others (norms, convolution, A_log, dt_bias) are small and keep the precision of their file.
    """
    return not name.endswith(_VECTOR_ENDINGS)


def is_block_scaled(name: str) -> bool:
    """Whether published FP8 checkpoints hold a parameter in float8 with block scales."""
    return name.startswith("layers.") and is_matrix(name) and not name.endswith(_UNQUANTISED_ENDINGS)


def quantization_config(config: ModelConfig, *, mtp_layers: int = 0) -> dict[str, Any]:
    """config.json's entry on a checkpoint in float8, as the published models have it: modules that stay as
    they were are named one by one.

    Args:
        config: of the text model.
        mtp_layers: layers of multi-token prediction in the checkpoint.
    """
    names = [hf_key(name) for name in parameter_shapes(config) if _stays_a_matrix(name)]
    if mtp_layers:
        mtp = ["fc.weight"]
        for layer in range(mtp_layers):
            mtp += filter(_stays_a_matrix, layer_shapes(config, layer, FULL_ATTENTION))
        names += [PART_PREFIXES["mtp"] + name for name in mtp]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name.removesuffix(".weight") for name in names],
    }


def _stays_a_matrix(name: str) -> bool:
    return name.endswith(".weight") and not name.endswith("norm.weight") and not is_block_scaled(name)


def differences(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, misshapen) names of `found` against the shapes that there should be."""
    return (
        [name for name in shapes if name not in found],
        [name for name in found if name not in shapes],
        [name for name, shape in shapes.items() if name in found and tuple(found[name]) != shape],
    )


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of the file that is a part of a parameter.

    Attributes:
        name: its canonical name.
        shape: its shape in the file.
        origin: index of its first element in the parameter, which may have more, leading dimensions.
    """

    name: str
    shape: tuple[int, ...]
    origin: tuple[int, ...]

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Where it lies in the parameter: one slice a dimension, of one element in those it lacks."""
        extent = (1,) * (len(self.origin) - len(self.shape)) + self.shape
        return tuple(slice(o, o + n) for o, n in zip(self.origin, extent, strict=True))


def whole_piece(name: str, shape: tuple[int, ...]) -> Piece:
    """A parameter that is one tensor."""
    return Piece(name, shape, (0,) * len(shape))


def expert_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """What a fused expert stack is made of in the layout of one matrix an expert; [] for other parameters.

    Args:
        name: canonical name.
        shape: of the parameter, [experts, out, in], or of its scales.
    """
    if ".experts." not in name:
        return []
    stack, projection = name.rsplit(".", 1)
    projection, ending = projection.removesuffix(_SCALE), _SCALE if is_scale(name) else ""
    experts, out, width = shape
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    part_shape = (out // len(parts), width)
    return [
        Piece(f"{stack}.{expert}.{part}.weight{ending}", part_shape, (expert, i * part_shape[0], 0))
        for expert in range(experts)
        for i, part in enumerate(parts)
    ]

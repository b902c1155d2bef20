"""The key table: which parameters a checkpoint of a configuration holds, under which names and shapes.

Names are canonical, as of `names.py`.

Routed experts come in two layouts: fused (`mlp.experts.gate_up_proj` [E, 2I, H], gate rows first, and
`mlp.experts.down_proj` [E, H, I]), as the model holds them, or one matrix an expert
(`mlp.experts.J.{gate,up,down}_proj.weight`), as `save_pretrained` of transformers 5 writes them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod

import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.fused_rows import fused_name
from qwen_moe_jax.checkpoint.names import (
    LM_HEAD,
    canonical_name,
    hf_key,
    is_matrix,
    is_side,
    matrix_name,
    scale_name,
    skipped_family,
    zero_name,
)
from qwen_moe_jax.checkpoint.pieces import Piece, expert_pieces, fused_pieces, whole_piece
from qwen_moe_jax.config import FULL_ATTENTION, SPARSE, LayerKind, ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.formats.codes import CODES, MatrixFormat
from qwen_moe_jax.schemes.scheme import Quantization, Scheme

# Matrices that are never codes: those that decide between experts, and of one row.
_NEVER_CODES = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter of the text model, in the order a token meets them.

    `lm_head.weight` is absent when it is tied to the embedding. A matrix of codes has the shape of its packed
    array, and is followed by its scales and zero points.

    Raises:
        ConfigError: matrices are quantised that this library holds whole.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer, kind in enumerate(config.layers):
        shapes |= layer_shapes(config, layer, kind)
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def layer_shapes(
    config: ModelConfig, layer: int, kind: LayerKind, root: str = "model."
) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a decoder layer's parameters, as of `parameter_shapes`.

    Args:
        config: of the text model.
        layer: its index.
        kind: what it is built of.
        root: what the checkpoint's keys begin with, which the rules of a quantisation are about.
    """
    matrices = matrix_shapes(config, layer, kind)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        form = matrix_form(config, name, shape, root)
        shapes[name] = shape if form is None else form.values_shape(shape)
        if form is not None:
            shapes[scale_name(name)] = _blocks_shape(name, shape, form)
            if form.zeros:
                shapes[zero_name(name)] = _blocks_shape(name, shape, form)
    return shapes


def parameter_forms(config: ModelConfig) -> dict[str, MatrixFormat]:
    """Canonical name -> format of every matrix of the text model that is stored as codes."""
    found: dict[str, MatrixFormat] = {}
    for layer, kind in enumerate(config.layers):
        found |= layer_forms(config, layer, kind)
    return found


def layer_forms(
    config: ModelConfig, layer: int, kind: LayerKind, root: str = "model."
) -> dict[str, MatrixFormat]:
    """Canonical name -> format of a decoder layer's matrices of codes; arguments as of `layer_shapes`."""
    shapes = matrix_shapes(config, layer, kind)
    forms = {name: matrix_form(config, name, shape, root) for name, shape in shapes.items()}
    return {name: form for name, form in forms.items() if form is not None}


def matrix_form(
    config: ModelConfig, name: str, shape: tuple[int, ...], root: str = "model."
) -> MatrixFormat | None:
    """The format of a matrix or stack [..., out, in] as it is stored; None if it is not quantised."""
    scheme = matrix_scheme(config, name, root)
    if scheme is None:
        return None
    rows, columns = scheme.group
    block = (rows or shape[-2] // _halves(name), columns or shape[-1])
    return MatrixFormat(scheme.codes, block, scheme.scale_dtype or config.dtype or "bfloat16", scheme.zeros)


def matrix_scheme(config: ModelConfig, name: str, root: str = "model.") -> Scheme | None:
    """How config.json says that a matrix is stored; None if it is not quantised, or no matrix."""
    if config.quantization is None or not is_matrix(name) or not name.startswith("layers."):
        return None
    stored = fused_name(config, name) or name
    return _scheme(config.quantization, config.num_experts, stored, root)


@lru_cache(maxsize=1 << 14)
def _scheme(quantization: Quantization, experts: int, name: str, root: str) -> Scheme | None:
    looked_at = 1 if quantization.same_for_all_experts else experts
    pieces = expert_pieces(name, (looked_at, 2, 1)) or [whole_piece(name, (1, 1))]
    modules = [piece.name.removesuffix(".weight") for piece in pieces]
    schemes = {quantization.scheme(module, root): module for module in modules}
    if len(schemes) > 1:
        one, other = list(schemes.items())[:2]
        raise ConfigError(
            f"quantization_config has {one[1]} as {one[0] or 'not quantised'} and {other[1]} as "
            f"{other[0] or 'not quantised'}; the experts of a layer are held in one stack, in one format."
        )
    [found] = schemes
    if found is not None and name.endswith(_NEVER_CODES):
        raise ConfigError(
            f"quantization_config quantises {modules[0]}, which this library holds whole; name it in the "
            "list of what is not quantised."
        )
    return found


def matrix_shapes(config: ModelConfig, layer: int, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a decoder layer's parameters as they would be unquantised."""
    hidden = config.hidden_size
    parts = {
        "input_layernorm.weight": (hidden,),
        **(_attention_shapes(config) if kind.mixer == FULL_ATTENTION else _delta_net_shapes(config)),
        "post_attention_layernorm.weight": (hidden,),
        **(_moe_shapes(config) if kind.mlp == SPARSE else _mlp_shapes(config)),
    }
    return {f"layers.{layer}.{part}": shape for part, shape in parts.items()}


def _attention_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # with an output gate per head: query, then gate
    rows = {"q_proj": queries * (2 if c.attn_output_gate else 1), "k_proj": keys, "v_proj": keys}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in rows.items():
        shapes[f"self_attn.{name}.weight"] = (size, c.hidden_size)
        if c.qkv_bias:
            shapes[f"self_attn.{name}.bias"] = (size,)
    if c.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    return {**shapes, "self_attn.o_proj.weight": (c.hidden_size, queries)}


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
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, c.hidden_size),  # the router
        "mlp.experts.gate_up_proj": (experts, 2 * routed, c.hidden_size),
        "mlp.experts.down_proj": (experts, c.hidden_size, routed),
    }
    if shared:
        shapes |= _swiglu_shapes("mlp.shared_expert.", shared, c.hidden_size)
        shapes["mlp.shared_expert_gate.weight"] = (1, c.hidden_size)
    return shapes


def _mlp_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    return _swiglu_shapes("mlp.", c.intermediate_size, c.hidden_size)


def _swiglu_shapes(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Which keys of a checkpoint are read, and under which names.

    Attributes:
        name: key -> canonical name, or None if there is none.
        key: canonical name -> the key that errors ask for.
        skipped: key -> the family of keys beside these that it belongs to, or None.
        scheme: canonical name of a matrix -> how its codes are stored, or None.
        fused: canonical name, shape of a parameter -> the rows of a larger tensor that it is made of; [] for
            one that is stored by itself.
    """

    name: Callable[[str], str | None]
    key: Callable[[str], str]
    skipped: Callable[[str], str | None]
    scheme: Callable[[str], Scheme | None] = lambda name: None
    fused: Callable[[str, tuple[int, ...]], list[Piece]] = lambda name, shape: []


TEXT_KEYS = KeyMap(canonical_name, hf_key, skipped_family)


def text_keys(config: ModelConfig) -> KeyMap:
    """The text model's keys, in the formats of its configuration."""
    return dataclasses.replace(
        TEXT_KEYS,
        scheme=lambda name: matrix_scheme(config, name),
        fused=lambda name, shape: fused_pieces(config, name, shape),
    )


def count_parameters(shapes: Mapping[str, tuple[int, ...]], forms: Mapping[str, MatrixFormat]) -> int:
    """How many there are; scales and zero points are part of what is stored, and no parameters.

    Args:
        shapes, forms: as of `parameter_shapes` and `parameter_forms`.
    """
    return sum(count_elements(name, shape, forms) for name, shape in shapes.items() if not is_side(name))


def count_elements(name: str, shape: tuple[int, ...], forms: Mapping[str, MatrixFormat]) -> int:
    """Of one parameter; of codes, how many there are."""
    return prod(whole_shape(name, shape, forms))


def whole_shape(name: str, shape: tuple[int, ...], forms: Mapping[str, MatrixFormat]) -> tuple[int, ...]:
    """Of a parameter as it would be unquantised.

    Args:
        name: canonical.
        shape: as it is stored, or held.
        forms: as of `parameter_forms`.
    """
    return forms[name].matrix_shape(shape) if name in forms else shape


def stored_dtype(name: str, forms: Mapping[str, MatrixFormat], matrix: np.dtype) -> np.dtype:
    """The dtype of a parameter as a checkpoint has it: of codes, scales and zero points their own.

    Args:
        name: canonical.
        forms: as of `parameter_forms`.
        matrix: of matrices that are no codes; what is no matrix is float32.
    """
    form = forms.get(matrix_name(name))
    if form is None:
        return matrix if is_matrix(name) else np.dtype(np.float32)
    if name == scale_name(matrix_name(name)):
        return jnp.dtype(form.scale_dtype)
    return np.dtype(np.uint8) if is_side(name) else form.of_codes.dtype


def _halves(name: str) -> int:
    """Matrices behind one another in a stack's rows: gate and up rows of an expert do not share a scale."""
    return 2 if name.endswith("gate_up_proj") else 1


def _blocks_shape(name: str, shape: tuple[int, ...], form: MatrixFormat) -> tuple[int, ...]:
    """Of the scales as they are stored."""
    *stack, rows, columns = shape
    down, across = form.scales_shape((rows // _halves(name), columns))
    return (*stack, _halves(name) * down, across)


def codes_a_byte(config: ModelConfig) -> int:
    """The most that share one in any of the model's formats; 1 where none is of 4 bits."""
    schemes = () if config.quantization is None else config.quantization.schemes()
    return max((CODES[scheme.codes].packed for scheme in schemes), default=1)


# Codes as people call them; floats of 4 bits by their scales.
_WORDS = {"e4m3": "float8", "int8": "int8", "int4": "int4"}


def formats_in_words(config: ModelConfig) -> str:
    """What the layers' matrices of codes are in, "float8" or "int4, int8"; "" where there are none."""
    forms = dict.fromkeys((form.codes, form.scale_dtype) for form in parameter_forms(config).values())
    four = {"float8_e8m0fnu": "mxfp4"}
    return ", ".join(dict.fromkeys(_WORDS.get(codes) or four.get(scales, "nvfp4") for codes, scales in forms))


def held_in_words(config: ModelConfig, dtype: str) -> str:
    """What matrices are in where those that are no codes are in a dtype: "float8 and bfloat16"."""
    words = formats_in_words(config)
    return f"{words} and {dtype}" if words else dtype


def differences(
    found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, misshapen) names of `found` against the shapes that there should be."""
    return (
        [name for name in shapes if name not in found],
        [name for name in found if name not in shapes],
        [name for name, shape in shapes.items() if name in found and tuple(found[name]) != shape],
    )

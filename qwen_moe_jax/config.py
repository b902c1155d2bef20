"""The model configuration, read strictly from a Hugging Face `config.json`.

Both forms are read: text-only (`model_type: qwen3_5_moe_text`) and multimodal (`qwen3_5_moe`, with the
text model under `text_config`). A value that this library does not implement is an error that names it;
nothing is guessed from a similar one.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import CheckpointNotFoundError, ConfigError
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.schemes.read import read_quantization
from qwen_moe_jax.schemes.scheme import Quantization

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"

TEXT_MODEL_TYPE = "qwen3_5_moe_text"
MULTIMODAL_MODEL_TYPE = "qwen3_5_moe"

# What a released config.json may leave out (Qwen3.5-35B-A3B where sizes are concerned).
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 32768,
}
_DTYPES = ("float32", "bfloat16")

# Switches of this model family and its siblings, with the only value that is implemented.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "mamba_ssm_dtype": "float32",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071; interleaved MRoPE).

    Attributes:
        kind: "default" or "yarn".
        theta: base wavelength.
        partial_rotary_factor: fraction of head_dim that is rotated.
        mrope_section: frequencies for (temporal, height, width).
        factor: context extension factor (yarn); None means max_position_embeddings over
            original_max_position_embeddings.
        original_max_position_embeddings: trained context in tokens (yarn).
        attention_factor: scale of cos and sin; None derives it (yarn).
        beta_fast, beta_slow: ramp boundaries in rotations (yarn).
        mscale, mscale_all_dim: alternatives from which attention_factor derives (yarn).
        truncate: whether the ramp boundaries are rounded to whole dimensions (yarn).
    """

    kind: str = "default"
    theta: float = 1e7
    partial_rotary_factor: float = 0.25
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a Qwen3.5 MoE text model that changes what it computes.

    Sizes count elements, heads, experts, layers or tokens, as named. `layer_types` has one entry a layer,
    "linear_attention" (Gated DeltaNet) or "full_attention". `dtype` is the checkpoint's own, "float32" or
    "bfloat16", or None if config.json does not say. `quantization` says which matrices are stored in few
    bits, and how; None for none. `eos_token_ids` are all ids that end a text.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        _check_consistency(self)

    @property
    def key_dim(self) -> int:
        """Width of the flattened Gated DeltaNet queries (and keys)."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of the flattened Gated DeltaNet values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution over Q|K|V."""
        return 2 * self.key_dim + self.value_dim

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each attention head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Builds the configuration from a parsed `config.json` (either form).

        Raises:
            ConfigError: an unknown model type, rope type, activation, layer type or quantisation method,
                or sizes that contradict each other.
        """
        model_type = raw.get("model_type")
        if model_type == MULTIMODAL_MODEL_TYPE:
            inner = raw.get("text_config")
            if not isinstance(inner, Mapping):
                raise ConfigError(
                    f"config.json has model_type {model_type!r} but no text_config object; "
                    "a multimodal checkpoint describes its text model there."
                )
            if inner.get("model_type", TEXT_MODEL_TYPE) != TEXT_MODEL_TYPE:
                raise ConfigError(
                    f"text_config has model_type {inner['model_type']!r}; expected {TEXT_MODEL_TYPE!r}."
                )
            # The outer level wins where the multimodal reference reads it from there.
            text = dict(inner)
            for key in ("tie_word_embeddings", "quantization_config"):
                if raw.get(key) is not None:
                    text[key] = raw[key]
            for key in ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype"):
                if text.get(key) is None and raw.get(key) is not None:
                    text[key] = raw[key]
        elif model_type == TEXT_MODEL_TYPE:
            text = dict(raw)
        else:
            raise ConfigError(
                f"config.json has model_type {model_type!r}; expected {TEXT_MODEL_TYPE!r} or "
                f"{MULTIMODAL_MODEL_TYPE!r}: this library implements no other architecture."
            )
        return _from_text_dict(text)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads `config.json`, given its path or its folder's.

        Raises:
            CheckpointNotFoundError: no such file.
            ConfigError: not JSON, or a value that is not implemented.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointNotFoundError(
                f"{file} does not exist; a checkpoint folder must hold config.json."
            )
        return cls.from_dict(read_json_object(file, ConfigError))

    def to_dict(self) -> dict[str, Any]:
        """The text-only Hugging Face form (`model_type: qwen3_5_moe_text`); `from_dict` inverts it."""
        out: dict[str, Any] = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": TEXT_MODEL_TYPE}
        out |= {key: getattr(self, key) for key in _DEFAULTS}
        rope = self.rope
        parameters: dict[str, Any] = {
            "rope_type": rope.kind,
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.partial_rotary_factor,
            "mrope_section": list(rope.mrope_section),
            "mrope_interleaved": True,
        }
        if rope.kind == "yarn":
            for name in _YARN_KEYS:
                if getattr(rope, name) is not None:
                    parameters[name] = getattr(rope, name)
            parameters.setdefault("factor", None)
        out |= {
            "layer_types": list(self.layer_types),
            "rope_parameters": parameters,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": list(self.eos_token_ids) or None,
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        if self.dtype is not None:
            out["dtype"] = self.dtype
        if self.quantization is not None:
            out["quantization_config"] = json.loads(self.quantization.source)
        return out


_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


def _from_text_dict(text: Mapping[str, Any]) -> ModelConfig:
    for key, implemented in _FIXED.items():
        value = text.get(key)
        if value is not None and value != implemented:
            raise ConfigError(f"{key} is {value!r}; only {implemented!r} is implemented.")
    sizes = {}
    for key, default in _DEFAULTS.items():
        value = text.get(key)
        value = default if value is None else value
        if not _is_int(value) or value < 1:
            raise ConfigError(f"{key} is {value!r}; expected a positive integer.")
        sizes[key] = value

    dtype = text.get("dtype") or text.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}.")
    eos = text.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    for key, ids in (
        ("eos_token_id", eos_ids),
        *((key, (text[key],)) for key in ("bos_token_id", "pad_token_id") if text.get(key) is not None),
    ):
        if not all(_is_int(i) for i in ids):
            raise ConfigError(f"{key} is {text[key]!r}; expected a token id.")
    tied = text.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ConfigError(f"tie_word_embeddings is {tied!r}; expected true or false.")
    return ModelConfig(
        **sizes,
        layer_types=_layer_types(text, sizes["num_hidden_layers"]),
        rope=_rope(text),
        rms_norm_eps=_positive(text, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(tied),
        eos_token_ids=eos_ids,
        bos_token_id=text.get("bos_token_id"),
        pad_token_id=text.get("pad_token_id"),
        dtype=dtype,
        quantization=read_quantization(text.get("quantization_config")),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(mapping: Mapping[str, Any], key: str, default: float) -> float:
    value = mapping.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key} is {value!r}; expected a positive number.")
    return float(value)


def _layer_types(text: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    given = text.get("layer_types")
    if given is None:
        interval = text.get("full_attention_interval", 4)
        if not _is_int(interval) or interval < 1:
            raise ConfigError(f"full_attention_interval is {interval!r}; expected a positive integer.")
        return tuple(
            LINEAR_ATTENTION if (layer + 1) % interval else FULL_ATTENTION for layer in range(num_layers)
        )
    if not isinstance(given, list | tuple):
        raise ConfigError(f"layer_types is {given!r}; expected a list with one entry a layer.")
    unknown = sorted({str(kind) for kind in given} - {LINEAR_ATTENTION, FULL_ATTENTION})
    if unknown:
        raise ConfigError(
            f"layer_types holds {', '.join(map(repr, unknown))}; "
            f"expected {LINEAR_ATTENTION!r} or {FULL_ATTENTION!r}."
        )
    return tuple(given)


def _rope(text: Mapping[str, Any]) -> RopeConfig:
    """Reads `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it."""
    raw: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if text.get(key) is not None:
            raw[key] = text[key]
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}  # the reference's precedence
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError(
            f"rope_parameters is {given!r}; expected one object for all layers, of numbers and names."
        )
    raw |= given
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "mrope":  # an older name of "default" with an mrope_section
        kind = "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope_type is {kind!r}; only 'default' and 'yarn' are implemented.")
    if raw.get("mrope_interleaved", True) is not True:
        raise ConfigError(
            "mrope_interleaved is false; Qwen3.5 interleaves its MRoPE and only that is implemented."
        )
    section = raw.get("mrope_section", (11, 11, 10))
    if (
        not isinstance(section, list | tuple)
        or len(section) != 3
        or not all(_is_int(n) and n >= 0 for n in section)
    ):
        raise ConfigError(f"mrope_section is {section!r}; expected three non-negative integers.")
    yarn: dict[str, Any] = {}
    if kind == "yarn":
        yarn = {key: raw[key] for key in _YARN_KEYS if raw.get(key) is not None}
        if "original_max_position_embeddings" not in yarn:
            raise ConfigError("rope_type 'yarn' needs original_max_position_embeddings, which is missing.")
        if not isinstance(yarn.get("truncate", True), bool):
            raise ConfigError(f"truncate is {yarn['truncate']!r}; expected true or false.")
        for key in yarn.keys() - {"truncate"}:
            _positive(yarn, key, 1.0)
    return RopeConfig(
        kind=kind,
        theta=_positive(raw, "rope_theta", 1e7),
        partial_rotary_factor=_positive(raw, "partial_rotary_factor", 0.25),
        mrope_section=tuple(section),  # type: ignore[arg-type]
        **yarn,
    )


def _check_consistency(c: ModelConfig) -> None:
    if len(c.layer_types) != c.num_hidden_layers:
        raise ConfigError(
            f"layer_types has {len(c.layer_types)} entries but num_hidden_layers is {c.num_hidden_layers}."
        )
    if c.num_attention_heads % c.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {c.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{c.num_key_value_heads}."
        )
    if c.linear_num_value_heads % c.linear_num_key_heads:
        raise ConfigError(
            f"linear_num_value_heads {c.linear_num_value_heads} is not a multiple of linear_num_key_heads "
            f"{c.linear_num_key_heads}."
        )
    if c.num_experts_per_tok > c.num_experts:
        raise ConfigError(
            f"num_experts_per_tok {c.num_experts_per_tok} is larger than num_experts {c.num_experts}."
        )
    if not 0 < c.rope.partial_rotary_factor <= 1 or c.rotary_dim % 2 or c.rotary_dim == 0:
        raise ConfigError(
            f"partial_rotary_factor {c.rope.partial_rotary_factor} of head_dim {c.head_dim} gives "
            f"{c.rotary_dim} rotated dimensions; expected a positive even number up to head_dim."
        )
    out_of_range = [i for i in c.eos_token_ids if not 0 <= i < c.vocab_size]
    if out_of_range:
        raise ConfigError(f"eos_token_id {out_of_range} is outside the vocabulary of {c.vocab_size}.")

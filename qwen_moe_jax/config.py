"""The model configuration, read strictly from a Hugging Face `config.json`.

Which entries there are, and what those that are left out mean, differs by model type: `families/` says it. A
value that this library does not implement is an error that names it; nothing is guessed from a similar one.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen_moe_jax.errors import CheckpointNotFoundError, ConfigError
from qwen_moe_jax.families import find_family
from qwen_moe_jax.families.family import Family
from qwen_moe_jax.families.fields import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, SPARSE
from qwen_moe_jax.families.rope import RopeConfig
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.schemes.scheme import Quantization

__all__ = [
    "DENSE",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "SPARSE",
    "LayerKind",
    "ModelConfig",
    "RopeConfig",
]


class LayerKind(NamedTuple):
    """What a layer is built of: a token mixer, as in `layer_types`, and an MLP, as in `mlp_types`."""

    mixer: str
    mlp: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a text model that changes what it computes.

    Sizes count elements, heads, experts, layers or tokens, as named; of what the model does not have they are
    0. `dtype` is the checkpoint's own, "float32" or "bfloat16", or None if config.json does not say.
    `quantization` says which matrices are stored in few bits, and how; None for none. `eos_token_ids` are all
    ids that end a text.

    Attributes:
        model_type: of the family, in its text-only form.
        layer_types: of each layer, "linear_attention" (Gated DeltaNet) or "full_attention".
        mlp_types: of each layer, "sparse" (experts) or "dense".
        intermediate_size: inner rows of a dense MLP.
        shared_expert_intermediate_size: of the expert that every token passes through; 0 if there is none.
        norm_topk_prob: the weights of the chosen experts sum to one.
        norm_offset: added to the weights of all norms but the gated one: 1.0 where they are zero-centred.
        qk_norm: queries and keys are normed, head by head.
        qkv_bias: queries, keys and values have biases.
        attn_output_gate: attention's output is gated, by rows of `q_proj` behind each head's query.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    intermediate_size: int = 0
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    mlp_types: tuple[str, ...]
    norm_topk_prob: bool
    norm_offset: float
    qk_norm: bool
    qkv_bias: bool
    attn_output_gate: bool
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        _check_consistency(self)

    @property
    def family(self) -> Family:
        """How its files are read and written."""
        return find_family({"model_type": self.model_type})

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """What each layer is built of."""
        return tuple(map(LayerKind, self.layer_types, self.mlp_types))

    @property
    def mtp_kind(self) -> LayerKind:
        """What the layers of multi-token prediction are built of."""
        return LayerKind(FULL_ATTENTION, SPARSE if self.num_experts else DENSE)

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

    def with_layers(self, kinds: Sequence[LayerKind]) -> "ModelConfig":
        """The same with other layers."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(kinds),
            layer_types=tuple(kind.mixer for kind in kinds),
            mlp_types=tuple(kind.mlp for kind in kinds),
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Builds the configuration from a parsed `config.json` (text-only or multimodal).

        Raises:
            ConfigError: an unknown model type, rope type, activation, layer type or quantisation method,
                or sizes that contradict each other.
        """
        return cls(**find_family(raw).fields(raw))

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
        """The text-only Hugging Face form; `from_dict` inverts it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        out = self.family.written(fields)
        if self.dtype is not None:
            out["dtype"] = self.dtype
        if self.quantization is not None:
            out["quantization_config"] = json.loads(self.quantization.source)
        return out


def _check_consistency(c: ModelConfig) -> None:
    for name in ("layer_types", "mlp_types"):
        kinds = getattr(c, name)
        if len(kinds) != c.num_hidden_layers:
            raise ConfigError(
                f"{name} has {len(kinds)} entries but num_hidden_layers is {c.num_hidden_layers}."
            )
    if c.num_attention_heads % c.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads {c.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{c.num_key_value_heads}."
        )
    if c.linear_num_key_heads and c.linear_num_value_heads % c.linear_num_key_heads:
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

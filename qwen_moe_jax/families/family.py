"""What a family is: one model type, and what of it differs from the others."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.families.fields import dtype_name, positive, positive_int, switch, token_ids
from qwen_moe_jax.families.rope import RopeConfig, read_rope, written_rope
from qwen_moe_jax.schemes.read import read_quantization

# What the multimodal reference reads from the outer level, and what it falls back to there.
_OUTER = ("tie_word_embeddings", "quantization_config")
_ELSE_OUTER = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type's config.json is read and written, and how its files differ from the modules.

    Attributes:
        model_type: of the text-only form.
        multimodal_type: of the form that has the text model under `text_config`; None if there is none.
        title: in reports.
        architecture: the class of transformers that loads what is written.
        sizes: fields that are positive integers -> what a config.json that leaves one out means.
        aliases: other names that a config.json may give a field.
        fixed: switches -> the only value that is implemented.
        features: fields that no config.json of the family changes.
        rope: of a config.json that says nothing of it.
        read: (text object, sizes) -> the fields that are left.
        write: fields by name -> the entries that `read` takes them from.
        mtp_layers: (key, layers if it is absent) of multi-token prediction; None if the family has none.
        fused_delta_net: its files hold projections of Gated DeltaNet fused, as of `checkpoint.fused_rows`.
    """

    model_type: str
    multimodal_type: str | None = None
    title: str
    architecture: str
    sizes: Mapping[str, int]
    fixed: Mapping[str, Any]
    features: Mapping[str, Any]
    rope: RopeConfig
    read: Callable[[Mapping[str, Any], Mapping[str, int]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    mtp_layers: tuple[str, int | None] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused_delta_net: bool = False

    def text_of(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The text model's object of a parsed config.json of either form.

        Raises:
            ConfigError: a multimodal one without it, or with that of another architecture.
        """
        if raw.get("model_type") == self.model_type:
            return self._with_names(raw)
        inner = raw.get("text_config")
        if not isinstance(inner, Mapping):
            raise ConfigError(
                f"config.json has model_type {self.multimodal_type!r} but no text_config object; "
                "a multimodal checkpoint describes its text model there."
            )
        if inner.get("model_type", self.model_type) != self.model_type:
            raise ConfigError(
                f"text_config has model_type {inner['model_type']!r}; expected {self.model_type!r}."
            )
        text = dict(inner)
        text |= {key: raw[key] for key in _OUTER if raw.get(key) is not None}
        text |= {key: raw[key] for key in _ELSE_OUTER if text.get(key) is None and raw.get(key) is not None}
        return self._with_names(text)

    def _with_names(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The same, every field under its own name.

        Raises:
            ConfigError: two names of a field with two values.
        """
        found = dict(text)
        for alias, name in self.aliases.items():
            value = found.pop(alias, None)
            if value is None:
                continue
            if found.setdefault(name, value) != value:
                raise ConfigError(f"{alias} is {value!r} and {name} {found[name]!r}, which mean the same.")
        return found

    def fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `ModelConfig`, from a parsed config.json of either form.

        Raises:
            ConfigError: a value that is not implemented, or none.
        """
        text = self.text_of(raw)
        for key, implemented in self.fixed.items():
            value = text.get(key)
            if value is not None and value != implemented:
                raise ConfigError(f"{key} is {value!r}; only {implemented!r} is implemented.")
        sizes = {key: positive_int(text, key, default) for key, default in self.sizes.items()}
        common = {
            "model_type": self.model_type,
            "rope": read_rope(text, self.rope),
            "rms_norm_eps": positive(text, "rms_norm_eps", 1e-6),
            "tie_word_embeddings": switch(text, "tie_word_embeddings", False),
            "dtype": dtype_name(text),
            "quantization": read_quantization(text.get("quantization_config")),
        }
        return {**sizes, **self.features, **common, **token_ids(text), **self.read(text, sizes)}

    def written(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The text-only config.json, without dtype and quantisation; `fields` inverts it."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{key: fields[key] for key in self.sizes},
            **self.write(fields),
            "rope_parameters": written_rope(fields["rope"]),
            "rms_norm_eps": fields["rms_norm_eps"],
            "hidden_act": "silu",
            "tie_word_embeddings": fields["tie_word_embeddings"],
            "eos_token_id": list(fields["eos_token_ids"]) or None,
            "bos_token_id": fields["bos_token_id"],
            "pad_token_id": fields["pad_token_id"],
        }

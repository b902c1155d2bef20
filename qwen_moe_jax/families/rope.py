"""What config.json says of rotary position embedding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.families.fields import is_int, positive

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071; interleaved MRoPE).

    Attributes:
        kind: "default" or "yarn".
        theta: base wavelength.
        partial_rotary_factor: fraction of head_dim that is rotated.
        mrope_section: frequencies for (temporal, height, width); None where a token has one position only.
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
    mrope_section: tuple[int, int, int] | None = (11, 11, 10)
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


# Of whole heads, with one position a token; the base that the reference falls back to.
PLAIN_ROPE = RopeConfig(theta=1e4, partial_rotary_factor=1.0, mrope_section=None)


def read_rope(text: Mapping[str, Any], default: RopeConfig) -> RopeConfig:
    """Reads `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it.

    Args:
        text: the text model's object.
        default: of the family, for what is left out; where its mrope_section is None, positions are single.

    Raises:
        ConfigError: what is not implemented, or no number.
    """
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
    yarn: dict[str, Any] = {}
    if kind == "yarn":
        yarn = {key: raw[key] for key in _YARN_KEYS if raw.get(key) is not None}
        if "original_max_position_embeddings" not in yarn:
            raise ConfigError("rope_type 'yarn' needs original_max_position_embeddings, which is missing.")
        if not isinstance(yarn.get("truncate", True), bool):
            raise ConfigError(f"truncate is {yarn['truncate']!r}; expected true or false.")
        for key in yarn.keys() - {"truncate"}:
            positive(yarn, key, 1.0)
    return RopeConfig(
        kind=kind,
        theta=positive(raw, "rope_theta", default.theta),
        partial_rotary_factor=positive(raw, "partial_rotary_factor", default.partial_rotary_factor),
        mrope_section=_section(raw, default.mrope_section),
        **yarn,
    )


def _section(raw: Mapping[str, Any], default: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    if default is None:
        if raw.get("mrope_section") is not None:
            raise ConfigError(
                f"mrope_section is {raw['mrope_section']!r}; this model type has one position a token, and "
                "expects none."
            )
        return None
    if raw.get("mrope_interleaved", True) is not True:
        raise ConfigError(
            "mrope_interleaved is false; Qwen3.5 interleaves its MRoPE and only that is implemented."
        )
    section = raw.get("mrope_section", default)
    if (
        not isinstance(section, list | tuple)
        or len(section) != 3
        or not all(is_int(n) and n >= 0 for n in section)
    ):
        raise ConfigError(f"mrope_section is {section!r}; expected three non-negative integers.")
    return tuple(section)  # type: ignore[return-value]


def written_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of a config.json; `read_rope` inverts it."""
    out: dict[str, Any] = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.partial_rotary_factor,
    }
    if rope.mrope_section is not None:
        out |= {"mrope_section": list(rope.mrope_section), "mrope_interleaved": True}
    if rope.kind == "yarn":
        out |= {name: getattr(rope, name) for name in _YARN_KEYS if getattr(rope, name) is not None}
        out.setdefault("factor", None)
    return out

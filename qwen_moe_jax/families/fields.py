"""Reading single fields of a config.json, strictly."""

import math
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"

# Kinds of MLPs: routed experts, or one MLP that every token passes through.
SPARSE = "sparse"
DENSE = "dense"

_DTYPES = ("float32", "bfloat16")


def is_int(value: Any) -> bool:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive_int(text: Mapping[str, Any], key: str, default: int) -> int:
    """A size; absent or null is the default."""
    value = default if text.get(key) is None else text[key]
    if not is_int(value) or value < 1:
        raise ConfigError(f"{key} is {value!r}; expected a positive integer.")
    return value


def positive(mapping: Mapping[str, Any], key: str, default: float) -> float:
    """A finite positive number; absent is the default."""
    value = mapping.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key} is {value!r}; expected a positive number.")
    return float(value)


def switch(text: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; absent or null is the default."""
    value = default if text.get(key) is None else text[key]
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; expected true or false.")
    return value


def dtype_name(text: Mapping[str, Any]) -> str | None:
    """The checkpoint's own dtype, or None if it does not say."""
    dtype = text.get("dtype") or text.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}.")
    return dtype


def token_ids(text: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin, end and fill a text: fields `eos_token_ids`, `bos_token_id`, `pad_token_id`."""
    eos = text.get("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    single = {key: text.get(key) for key in ("bos_token_id", "pad_token_id")}
    given = {"eos_token_id": ends} | {key: (i,) for key, i in single.items() if i is not None}
    for key, ids in given.items():
        if not all(map(is_int, ids)):
            raise ConfigError(f"{key} is {text[key]!r}; expected a token id.")
    return {"eos_token_ids": ends, **single}


def layer_types(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Token mixers: `layer_types`, or full attention in each `full_attention_interval`-th layer."""
    given = text.get("layer_types")
    if given is None:
        interval = text.get("full_attention_interval", 4)
        if not is_int(interval) or interval < 1:
            raise ConfigError(f"full_attention_interval is {interval!r}; expected a positive integer.")
        return tuple(
            LINEAR_ATTENTION if (layer + 1) % interval else FULL_ATTENTION for layer in range(layers)
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

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


def attention_layers(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Token mixers of a family that has full attention only."""
    given = text.get("layer_types")
    wanted = (FULL_ATTENTION,) * layers
    if given is not None and (not isinstance(given, list | tuple) or tuple(given) != wanted):
        raise ConfigError(
            f"layer_types is {given!r}; expected {FULL_ATTENTION!r} for each of the {layers} layers."
        )
    return wanted


def head_dim(text: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Width of an attention head: as given, or what the hidden size gives each."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if text.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    return positive_int(text, "head_dim", max(1, hidden // heads))


def whole_heads(text: Mapping[str, Any]) -> None:
    """Raises ConfigError where a share of each head is rotated: these families rotate all of it."""
    for where in (text, text.get("rope_parameters"), text.get("rope_scaling")):
        share = where.get("partial_rotary_factor") if isinstance(where, Mapping) else None
        if share is not None and share != 1:
            raise ConfigError(
                f"partial_rotary_factor is {share!r}; this model type rotates whole heads, and expects 1.0."
            )


def attention_only(text: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of heads, layers and routing of a family with full attention in each layer."""
    whole_heads(text)
    return {
        "head_dim": head_dim(text, sizes),
        "layer_types": attention_layers(text, sizes["num_hidden_layers"]),
        **routing(text, sizes, renormalised=False),
    }


def routing(text: Mapping[str, Any], sizes: Mapping[str, int], *, renormalised: bool) -> dict[str, Any]:
    """The fields `mlp_types` and `norm_topk_prob`.

    Experts are in each `decoder_sparse_step`-th layer, unless `mlp_only_layers` names it.

    Args:
        text: the text model's object.
        sizes: read before.
        renormalised: what a config.json without `norm_topk_prob` means.
    """
    layers = sizes["num_hidden_layers"]
    step = positive_int(text, "decoder_sparse_step", 1)
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or not all(is_int(i) and 0 <= i < layers for i in dense):
        raise ConfigError(f"mlp_only_layers is {dense!r}; expected indices of the {layers} layers.")
    found = tuple(
        SPARSE if layer not in dense and (layer + 1) % step == 0 else DENSE for layer in range(layers)
    )
    if SPARSE not in found:
        raise ConfigError(
            f"decoder_sparse_step {step} and mlp_only_layers {list(dense)} leave no layer with experts; "
            "expected one at least."
        )
    return {"mlp_types": found, "norm_topk_prob": switch(text, "norm_topk_prob", renormalised)}


def written_routing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that `routing` reads."""
    dense = [layer for layer, kind in enumerate(fields["mlp_types"]) if kind == DENSE]
    return {
        "norm_topk_prob": fields["norm_topk_prob"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }

"""Quantisations by name: what `quantize` writes, and what `plan` and `compile` look at without files."""

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.schemes.compressed import read_compressed
from qwen_moe_jax.schemes.fp8 import FP8
from qwen_moe_jax.schemes.scheme import Quantization, Rule

FORMATS = ("fp8", "int8", "int4", "mxfp4")

# Names that mean them in options and reports.
DTYPES = {"bfloat16": None, "float8": "fp8", "int8": "int8", "int4": "int4", "mxfp4": "mxfp4"}

_GROUPS = {"int8": 128, "int4": 128, "mxfp4": 32}

_EXPERTS = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
_ALL = (
    _EXPERTS,
    r"re:.*\.mlp\.shared_expert\.(gate|up|down)_proj$",
    r"re:.*\.mlp\.(gate|up|down)_proj$",
    r"re:.*\.self_attn\.[qkvo]_proj$",
    r"re:.*\.linear_attn\.(in_proj_qkvz?|in_proj_z|out_proj)$",
)


def preset(name: str, *, experts_only: bool = False, group: int | None = None) -> Quantization:
    """A quantisation of the layers' matrices.

    Args:
        name: one of `FORMATS`.
        experts_only: of the routed experts and nothing else.
        group: columns that share a scale, for int8 and int4; None means 128.

    Raises:
        InputError: an unknown name, or a group that the format does not have.
    """
    if name not in FORMATS:
        raise InputError(f"format is {name!r}; expected one of {', '.join(FORMATS)}.")
    if name == "fp8" and group is not None:
        raise InputError("fp8 has blocks of 128 x 128; a group size is for int8 and int4.")
    if name == "fp8" and not experts_only:
        return FP8
    if name == "fp8":
        others = Rule((r"(?!.*\.mlp\.experts\.)",), None)
        return Quantization("fp8", (others, *FP8.rules), FP8.source)
    columns = _GROUPS[name] if group is None else group
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 16 or columns % 16:
        raise InputError(f"group is {group!r}; expected a multiple of 16.")
    if name == "mxfp4" and columns != 32:
        raise InputError(f"group is {group}; mxfp4 has groups of 32.")
    weights = {
        "num_bits": 8 if name == "int8" else 4,
        "type": "float" if name == "mxfp4" else "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": columns,
        "dynamic": False,
    }
    form = "mxfp4-pack-quantized" if name == "mxfp4" else "pack-quantized"
    raw = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {
            "group_0": {"targets": [_EXPERTS] if experts_only else list(_ALL), "weights": weights}
        },
        "ignore": [],
    }
    return read_compressed(raw)


def of_dtype(name: str, *, experts: int) -> Quantization | None:
    """What a dtype of `DTYPES` means: int4 and mxfp4 are of the routed experts, as most publish them.

    Args:
        name: the dtype.
        experts: that the model has; where there are none, int4 and mxfp4 are of all the layers' matrices.

    Raises:
        InputError: another name.
    """
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; expected one of {', '.join(map(repr, DTYPES))}.")
    form = DTYPES[name]
    if form is None:
        return None
    return preset(form, experts_only=experts > 0 and form in ("int4", "mxfp4")).with_scales_in("bfloat16")


def dtype_of(quantization: Quantization | None) -> str:
    """The name in `DTYPES` that comes nearest to a quantisation."""
    if quantization is None:
        return "bfloat16"
    codes = {scheme.codes for scheme in quantization.schemes()}
    return {"e4m3": "float8", "int8": "int8", "int4": "int4", "e2m1": "mxfp4"}[min(codes)]

"""`quant_method: quark` (AMD Quark 0.13), of which MXFP4 is implemented."""

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.schemes.fields import names_of, object_of
from qwen_moe_jax.schemes.scheme import CLASS, Quantization, Rule, Scheme


def read_quark(raw: Mapping[str, Any]) -> Quantization:
    """Reads `global_quant_config`, `layer_quant_config` and `exclude`, whose names may hold `*`.

    What it says of activations is not followed: weights are multiplied out, and activations are not
    quantised.

    Raises:
        ConfigError: a variant that is not implemented, by name.
    """
    export = object_of("export", raw.get("export"))
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise ConfigError(
            f"quantization_config has weight_format {export['weight_format']!r}; expected 'real_quantized'."
        )
    rules = [Rule(tuple(map(_pattern, names_of("exclude", raw.get("exclude")))), None)]
    for name, layer in object_of("layer_quant_config", raw.get("layer_quant_config")).items():
        rules.append(Rule((_pattern(name),), _scheme(name, layer)))
    if raw.get("layer_type_quant_config"):
        raise ConfigError("quantization_config has a layer_type_quant_config, which is not implemented.")
    if raw.get("global_quant_config"):
        rules.append(Rule((CLASS,), _scheme("global_quant_config", raw["global_quant_config"])))
    kept = tuple(rule for rule in rules if rule.patterns)
    return Quantization("quark", kept, json.dumps(raw, sort_keys=True))


def _pattern(name: str) -> str:
    # a module's own name, or that of what it lies in
    return fnmatch.translate(name).removesuffix(r"\Z").removesuffix("\\z") + r"(\..*)?\Z"


def _scheme(name: str, layer: Any) -> Scheme | None:
    weight = object_of(name, layer).get("weight")
    if weight is None:
        return None
    if isinstance(weight, list):
        if len(weight) != 1:
            raise ConfigError(f"quantization_config's {name} quantises weights {len(weight)} times over.")
        weight = weight[0]
    weight = object_of(f"{name}'s weight", weight)
    dtype, size = str(weight.get("dtype")).removeprefix("Dtype."), weight.get("group_size")
    if dtype not in ("fp4", "mx") or (dtype == "mx" and weight.get("mx_element_dtype") not in ("fp4",)):
        raise ConfigError(
            f"quantization_config's {name} has weights in {dtype}; of Quark's formats MXFP4 is implemented "
            "(fp4 with scales of e8m0 in groups of 32)."
        )
    scale = weight.get("scale_format", "e8m0")
    if size != 32 or scale != "e8m0":
        raise ConfigError(
            f"quantization_config's {name} has groups of {size!r} with scales in {scale!r}; MXFP4 has 32 and "
            "'e8m0'."
        )
    return Scheme("e2m1", (1, 32), "quark", scale_dtype="float8_e8m0fnu")

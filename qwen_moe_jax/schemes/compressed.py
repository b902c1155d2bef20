"""`quant_method: compressed-tensors` (vLLM's library of that name, 0.20; LLM Compressor writes it)."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.schemes.fields import names_of, object_of, one_of, pattern_of, size_of
from qwen_moe_jax.schemes.scheme import CLASS, Quantization, Rule, Scheme

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
)


def read_compressed(raw: Mapping[str, Any]) -> Quantization:
    """Reads `config_groups`, their `targets`, and `ignore`.

    What a checkpoint says of activations is not followed: weights are multiplied out, and activations are not
    quantised.

    Raises:
        ConfigError: a variant that is not implemented, by name.
    """
    groups = object_of("config_groups", raw.get("config_groups"))
    if not groups:
        raise ConfigError("quantization_config has no config_groups, which are to say what is quantised.")
    for key in ("sparsity_config", "transform_config"):
        if raw.get(key):
            raise ConfigError(f"quantization_config has a {key}, which is not implemented; expected none.")
    rules = [_rule(names_of("ignore", raw.get("ignore")), None)]
    found: list[tuple[int, Rule]] = []
    for name, group in groups.items():
        group = object_of(f"a group {name}", group)
        scheme = _scheme(name, group, group.get("format") or raw.get("format"))
        targets = names_of(f"{name}'s targets", group.get("targets"))
        # an exact name counts before a pattern, and a pattern before a class
        for rank, wanted in enumerate((_is_name, _is_pattern, _is_class)):
            those = [target for target in targets if wanted(target)]
            if those:
                found.append((rank, _rule(those, scheme)))
    rules += [rule for _, rule in sorted(found, key=lambda pair: pair[0])]
    kept = tuple(rule for rule in rules if rule.patterns or rule.names)
    return Quantization("compressed-tensors", kept, json.dumps(raw, sort_keys=True))


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_class(target: str) -> bool:
    return not _is_pattern(target) and "." not in target and target[:1].isupper()


def _is_name(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _rule(targets: Iterable[str], scheme: Scheme | None) -> Rule:
    names = frozenset(filter(_is_name, targets))
    return Rule(tuple(_pattern(t) for t in targets if t not in names), scheme, names)


def _pattern(target: str) -> str:
    if _is_class(target):
        if target != "Linear":
            raise ConfigError(f"quantization_config targets the class {target!r}; expected 'Linear'.")
        return CLASS
    return pattern_of(target.removeprefix("re:"))


def _scheme(name: str, group: Mapping[str, Any], form: Any) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ConfigError(f"quantization_config's {name} has weights {weights!r}; expected an object.")
    one_of(f"{name}'s format", form, _FORMATS)
    bits = one_of(f"{name}'s num_bits", weights.get("num_bits"), (4, 8))
    kind = one_of(f"{name}'s type", weights.get("type", "int"), ("int", "float"))
    strategy = weights.get("strategy")
    if weights.get("actorder") not in [None, False, "weight", "static"]:
        raise ConfigError(
            f"quantization_config's {name} has actorder {weights['actorder']!r}, which reorders the columns "
            "of each matrix; only None, 'weight' and 'static' are implemented, which do not."
        )
    if weights.get("dynamic"):
        raise ConfigError(f"quantization_config's {name} has dynamic weights; expected stored ones.")
    rows_columns = _group(name, weights, strategy)
    symmetric = weights.get("symmetric", True) is not False
    four_bit_floats = bits == 4 and kind == "float"
    if form == "mxfp4-pack-quantized":
        _expect(name, four_bit_floats and rows_columns == (1, 32), "4-bit floats in groups of 32")
        return Scheme("e2m1", (1, 32), "mxfp4", scale_dtype="float8_e8m0fnu")
    if form == "nvfp4-pack-quantized":
        _expect(name, four_bit_floats and rows_columns == (1, 16), "4-bit floats in groups of 16")
        return Scheme("e2m1", (1, 16), "nvfp4", scale_dtype="float32")
    if form == "pack-quantized":
        _expect(name, kind == "int" and rows_columns[0] == 1, "4 or 8 bit integers by group")
        return Scheme(f"int{bits}", rows_columns, "packed", zeros=not symmetric)
    if kind == "int":
        _expect(name, bits == 8, "8-bit integers")
        return Scheme("int8", rows_columns, "integers", zeros=not symmetric)
    _expect(name, bits == 8 and kind == "float" and symmetric, "8-bit floats")
    return Scheme("e4m3", rows_columns, "floats")


def _group(name: str, weights: Mapping[str, Any], strategy: Any) -> tuple[int, int]:
    if strategy in ["group", "tensor_group"]:
        size = weights.get("group_size")
        return 1, size_of(f"{name}'s group_size", size)
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str):  # older releases wrote "128x128"
            block = [int(n) for n in block.split("x")] if re.fullmatch(r"\d+x\d+", block) else None
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise ConfigError(
                f"quantization_config's {name} has block_structure {block!r}; expected two sizes."
            )
        rows, columns = (size_of(f"{name}'s block_structure", size) for size in block)
        return rows, columns
    if strategy in ["channel", "tensor"]:
        return (1, 0) if strategy == "channel" else (0, 0)
    raise ConfigError(
        f"quantization_config's {name} has strategy {strategy!r}; expected group, tensor_group, block, "
        "channel or tensor."
    )


def _expect(name: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ConfigError(f"quantization_config's {name} does not fit its format; expected {wanted}.")

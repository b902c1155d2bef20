"""Integers in GPTQ's and AWQ's layouts: `quant_method` gptq, auto-round and awq.

GPTQModel 7.7 (`quantization/config.py`), AutoRound 0.16 (`inference/convert_model.py`) and AutoAWQ 0.2.9
(`utils/packing_utils.py`) are the sources.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.schemes.fields import names_of, object_of, one_of, pattern_of, size_of
from qwen_moe_jax.schemes.scheme import Quantization, Rule, Scheme


def read_gptq(raw: Mapping[str, Any]) -> Quantization:
    """GPTQ, 4 or 8 bits; `dynamic` says what is otherwise: "-:" excludes, "+:" or nothing overrides.

    Whether zero points are stored less one (version 1) is seen from them: see `checkpoint.packing`.

    Raises:
        ConfigError: a variant that is not implemented, by name.
    """
    rules = []
    for pattern, override in object_of("dynamic", raw.get("dynamic")).items():
        plain = pattern_of(pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:"):
            rules.append(Rule((plain,), None))
        else:
            override = object_of(f"for {pattern!r}", override)
            rules.append(Rule((plain,), _gptq_scheme({**raw, **override})))
    rules.append(Rule((r"lm_head\Z",), _gptq_scheme(raw) if raw.get("lm_head") else None))
    rules.append(_inside(raw, _gptq_scheme(raw), ["model.layers", "model.language_model.layers"]))
    return Quantization("gptq", tuple(rules), json.dumps(raw, sort_keys=True))


def read_auto_round(raw: Mapping[str, Any]) -> Quantization:
    """AutoRound in GPTQ's or AWQ's packing; `extra_config` has bits by layer, 16 and more for none.

    Raises:
        ConfigError: a variant that is not implemented, by name.
    """
    packing = str(raw.get("packing_format", "auto_round:auto_gptq")).removeprefix("auto_round:")
    makers = {"auto_gptq": _gptq_scheme, "gptq": _gptq_scheme, "auto_awq": _awq_scheme, "awq": _awq_scheme}
    if packing not in makers:
        raise ConfigError(
            f"packing_format is {raw.get('packing_format')!r}; implemented are auto_round:auto_gptq and "
            "auto_round:auto_awq."
        )
    make = makers[packing]
    exact, patterns = [], []
    for name, override in object_of("extra_config", raw.get("extra_config")).items():
        override = object_of(f"for {name!r}", override)
        bits = override.get("bits", raw.get("bits"))
        scheme = None if isinstance(bits, int) and bits >= 16 else make({**raw, **override})
        if re.fullmatch(r"[\w.]+", name):
            exact.append(Rule((), scheme, frozenset([name])))
        else:
            patterns.append(Rule((f".*?(?:{pattern_of(name)})",), scheme))
    rules = (*exact, *patterns, *_not_converted(raw), _inside(raw, make(raw), []))
    return Quantization("auto-round", rules, json.dumps(raw, sort_keys=True))


def read_awq(raw: Mapping[str, Any]) -> Quantization:
    """AWQ, 4 bits, in the "gemm" packing; `modules_to_not_convert` are parts of names.

    Raises:
        ConfigError: a variant that is not implemented, by name.
    """
    rules = (*_not_converted(raw), _inside(raw, _awq_scheme(raw), []))
    return Quantization("awq", rules, json.dumps(raw, sort_keys=True))


def _gptq_scheme(raw: Mapping[str, Any]) -> Scheme:
    bits = one_of("bits", raw.get("bits"), (4, 8))
    columns = size_of("group_size", raw.get("group_size", 128))
    packing = one_of("checkpoint_format", raw.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2"))
    return Scheme(f"int{bits}", (1, columns), packing, zeros=raw.get("sym", True) is False)


def _awq_scheme(raw: Mapping[str, Any]) -> Scheme:
    one_of("bits", raw.get("bits", raw.get("w_bit")), (4,))
    one_of("version", str(raw.get("version", "gemm")).lower(), ("gemm",))
    columns = size_of("group_size", raw.get("group_size", raw.get("q_group_size", 128)))
    return Scheme("int4", (1, columns), "awq", zeros=True)


def _not_converted(raw: Mapping[str, Any]) -> list[Rule]:
    names = names_of("modules_to_not_convert", raw.get("modules_to_not_convert"))
    found = tuple(f".*?{re.escape(name)}" for name in names)
    return [Rule(found, None)] if found else []


def _inside(raw: Mapping[str, Any], scheme: Scheme, blocks: list[str]) -> Rule:
    """The rule of what is quantised unless another says otherwise: linear layers inside the blocks named."""
    given = raw.get("block_name_to_quantize") or blocks
    names = given.split(",") if isinstance(given, str) else names_of("block_name_to_quantize", given)
    if not names:
        return Rule((r"(.*\.)?layers\.\d+\.(?!mlp\.gate\Z)",), scheme)
    return Rule(tuple(rf"{re.escape(name.strip())}\.\d+\.(?!mlp\.gate\Z)" for name in names), scheme)

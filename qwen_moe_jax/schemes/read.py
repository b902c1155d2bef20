"""config.json's `quantization_config`, by its method."""

from collections.abc import Callable, Mapping
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.schemes.compressed import read_compressed
from qwen_moe_jax.schemes.fp8 import read_fp8
from qwen_moe_jax.schemes.integers import read_auto_round, read_awq, read_gptq
from qwen_moe_jax.schemes.quark import read_quark
from qwen_moe_jax.schemes.scheme import Quantization

_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed,
    "gptq": read_gptq,
    "auto-round": read_auto_round,
    "awq": read_awq,
    "quark": read_quark,
}

# What others would take.
_NEEDED = {
    "bitsandbytes": "a reader of its nested absmax tables",
    "modelopt": "a reader of its hf_quant_config.json; LLM Compressor writes NVFP4 as compressed-tensors",
    "gguf": "a reader of GGUF files",
    "mxfp4": "a reader of gpt-oss's blocks and scales",
    "torchao": "a reader of torchao's tensor subclasses",
    "exl2": "a reader of mixed bit widths",
    "hqq": "a reader of HQQ's packing",
}


def read_quantization(raw: Any) -> Quantization | None:
    """What `quantization_config` says; None for a checkpoint that is not quantised.

    Raises:
        ConfigError: not an object, an unknown method, or a variant that is not implemented.
    """
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"quantization_config is {raw!r}; expected an object.")
    method = raw.get("quant_method")
    if isinstance(method, str) and method in _READERS:
        return _READERS[method](raw)
    needed = f"; it would need {_NEEDED[method]}" if isinstance(method, str) and method in _NEEDED else ""
    raise ConfigError(
        f"quantization_config has quant_method {method!r}; implemented are {', '.join(_READERS)}{needed}."
    )

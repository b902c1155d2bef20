"""The configurations of the released models, to plan and compile for without a checkpoint at hand.

Sources. Defaults of transformers 5.23.0, which are a model's: Qwen3.5-35B-A3B, Qwen3.5-9B, Qwen3-Next-80B-A3B
and Qwen1.5-MoE-A2.7B, with the rotary base, the most positions and the ends of a text of their releases.
Training recipes of THUDM/slime (`scripts/models`): Qwen3.5-0.8B and 27B, Qwen3-30B-A3B, 235B-A22B and
Coder-480B-A35B, Qwen3-Next-80B-A3B. A test of NVIDIA/TensorRT-LLM that repeats the file: Qwen2-57B-A14B.
*Reported*, from public descriptions: Qwen3.5-2B, 4B, 122B-A10B and 397B-A17B. None was read from its
checkpoint; each has as many parameters as its name says. So a checkpoint's own config.json always wins
(`find_config`), and loading a checkpoint never looks here.
"""

import dataclasses
import re
from pathlib import Path

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.schemes.presets import of_dtype

_FOLDER = Path(__file__).parent
_NAMES = (
    "qwen3.5-0.8b",
    "qwen3.5-2b",
    "qwen3.5-4b",
    "qwen3.5-9b",
    "qwen1.5-moe-a2.7b",
    "qwen3.5-27b",
    "qwen3-30b-a3b",
    "qwen3.5-35b-a3b",
    "qwen2-57b-a14b",
    "qwen3-next-80b-a3b",
    "qwen3.5-122b-a10b",
    "qwen3-235b-a22b",
    "qwen3.5-397b-a17b",
    "qwen3-coder-480b-a35b",
)


def released() -> tuple[str, ...]:
    """The names, smallest first."""
    return _NAMES


def released_config(name: str) -> ModelConfig:
    """The configuration of a released model.

    Args:
        name: one of `released()`, in any case; "397b" or "397B-A17B" is enough, and an owner before it does
            not matter ("Qwen/Qwen3.5-397B-A17B").

    Raises:
        InputError: there is no such model.
    """
    wanted = str(name).lower().rsplit("/", 1)[-1]
    for full in _NAMES:
        _, _, short = full.partition("-")
        if wanted in (full, short, short_name(full)):
            return ModelConfig.from_file(_FOLDER / f"{full}.json")
    raise InputError(
        f"model is {name!r}; expected one of {', '.join(_NAMES)} (or {', '.join(map(short_name, _NAMES))})."
    )


def short_name(full: str) -> str:
    """The size in a released model's name: "397b"."""
    return next(part for part in full.split("-")[1:] if re.fullmatch(r"a?[\d.]+b", part))


def find_config(path_or_name: str | Path, *, dtype: str | None = None) -> ModelConfig:
    """The configuration of a checkpoint, or else of the released model of that name.

    Args:
        path_or_name: a folder with config.json or such a file, which wins; else as of `released_config`.
        dtype: that the layers' matrices are to be stored in, a key of `schemes.presets.DTYPES`, whatever
            config.json says; None means as it says.

    Raises:
        InputError: neither a file or folder nor a name.
        CheckpointNotFoundError: a folder that has no config.json and is not called as a released model.
        ConfigError: a configuration that is not implemented.
    """
    path = Path(path_or_name)
    if path.is_file() or (path / "config.json").is_file():
        config = ModelConfig.from_file(path)
    else:
        try:
            config = released_config(str(path_or_name))
        except InputError:
            if path.is_dir():
                # says which file is missing
                return ModelConfig.from_file(path)
            raise InputError(
                f"model is {str(path_or_name)!r}, which is no folder or file; expected a folder with "
                f"config.json, or one of {', '.join(_NAMES)}."
            ) from None
    if config.quantization is not None:
        config = dataclasses.replace(config, quantization=config.quantization.with_scales_in("bfloat16"))
    if dtype is None:
        return config
    return dataclasses.replace(config, quantization=of_dtype(dtype, experts=config.num_experts))

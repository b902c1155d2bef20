"""The configurations of the released models, to plan and compile for without a checkpoint at hand.

Sources: 35B-A3B, the defaults of transformers' `Qwen3_5MoeTextConfig` (5.23.0), which are this model's, with
the rotary base, the most positions and the ends of a text of its release. 122B-A10B and 397B-A17B,
*reported*: sizes from public descriptions of the checkpoints, not read from their files. So a checkpoint's
own config.json always wins (`find_config`), and loading a checkpoint never looks here.
"""

import dataclasses
from pathlib import Path

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.schemes.presets import of_dtype

_FOLDER = Path(__file__).parent
_NAMES = ("qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b")


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
        short = full.removeprefix("qwen3.5-")
        if wanted in (full, short, short.split("-")[0]):
            return ModelConfig.from_file(_FOLDER / f"{full}.json")
    raise InputError(f"model is {name!r}; expected one of {', '.join(_NAMES)} (or 35b, 122b, 397b).")


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
    return config if dtype is None else dataclasses.replace(config, quantization=of_dtype(dtype))

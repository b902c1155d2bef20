"""What a checkpoint's generation_config.json says of how text is generated, where a call says nothing."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.generation.options import SAMPLING_OPTIONS, GenerationConfig
from qwen_moe_jax.json_files import read_json_object

_TAKEN = (*SAMPLING_OPTIONS, "do_sample", "max_new_tokens", "min_new_tokens")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# transformers' options that change the text and are not implemented here, with what switches each off.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "length_penalty": (1.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({},),
}


def read_defaults(folder: Path) -> dict[str, Any]:
    """Options of `GenerationConfig` that a checkpoint sets; none without the file.

    Options that change the text and are not implemented are named in one warning.

    Raises:
        CheckpointError: the file is damaged, or holds a value that is none.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    stored = read_json_object(file, CheckpointError)
    ignored = [name for name, off in _OFF.items() if stored.get(name) not in (None, *off)]
    if ignored:
        warnings.warn(
            f"{file} sets {', '.join(ignored)}, which is not implemented and ignored.", stacklevel=2
        )
    taken = (*_TAKEN, *_PENALTIES)
    found: dict[str, Any] = {name: stored[name] for name in taken if stored.get(name) is not None}
    try:
        GenerationConfig(**{**found, "do_sample": True})
    except (InputError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return found


def with_defaults(
    defaults: Mapping[str, Any], config: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """What a call asks for.

    Args:
        defaults: of the checkpoint. They hold where no `config` is given; those of sampling only where tokens
            are drawn.
        config: takes their place.
        options: override both.

    Raises:
        InputError: as of `GenerationConfig.override`.
    """
    if config is not None:
        return config.override(**options)
    asked = GenerationConfig.expand(options)
    samples = asked.get("do_sample", defaults.get("do_sample", False))
    own = {name: value for name, value in defaults.items() if samples or name not in SAMPLING_OPTIONS}
    return GenerationConfig().override(**own | asked)

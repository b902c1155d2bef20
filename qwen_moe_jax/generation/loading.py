"""From a path to a filled decoder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.layout import is_matrix
from qwen_moe_jax.checkpoint.orbax import is_orbax, read_orbax
from qwen_moe_jax.checkpoint.reader import checkpoint_dtype, read_parameters
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError, InputError
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, named_parameters, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy

COMPUTE_DTYPES = ("float32", "bfloat16")


def resolve_folder(name: str | Path) -> Path:
    """A local checkpoint folder, or the local copy of a hub id where the hub can be reached.

    Raises:
        CheckpointNotFoundError: neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"{name} is a file; expected a checkpoint folder (with config.json).")
    parts = str(name).split("/")
    if isinstance(name, str) and len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
        return _download(name)
    raise CheckpointNotFoundError(f"{name} does not exist; expected a checkpoint folder (with config.json).")


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointNotFoundError(
            f"{hub_id} is not a local folder, and huggingface_hub is not installed to look it up as a hub "
            'id; give a folder or `pip install "qwen-moe-jax[hub]"`.'
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub client raises many unrelated types for "no such" and "no network"
        raise CheckpointNotFoundError(
            f"{hub_id} is not a local folder, and the hub did not give it ({type(error).__name__}); "
            "give the path of a checkpoint folder."
        ) from error


def compute_dtype(requested: Any, folder: Path, config: ModelConfig) -> jnp.dtype:
    """The dtype to compute in: the one asked for, or with "auto" the checkpoint's own.

    Raises:
        InputError: anything but float32, bfloat16 or "auto".
    """
    if isinstance(requested, str) and requested == "auto":
        own = config.dtype if is_orbax(folder) else checkpoint_dtype(folder)
        return jnp.dtype(own or "float32")
    try:
        dtype = jnp.dtype(requested)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in COMPUTE_DTYPES:
        raise InputError(
            f"dtype is {requested!r}; expected jnp.float32, jnp.bfloat16 or 'auto' (the checkpoint's own)."
        )
    return dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A decoder and what was found beside its weights.

    Attributes:
        decoder: filled.
        eos_token_ids: every id that ends a text, from config.json and generation_config.json.
        skipped: families of tensors that the checkpoint holds and text generation does not use.
    """

    decoder: Decoder
    eos_token_ids: tuple[int, ...]
    skipped: dict[str, int]


def load_decoder(
    folder: Path, config: ModelConfig, compute: jnp.dtype, backend: str, progress: bool
) -> Loaded:
    """Reads a checkpoint in Hugging Face or Orbax layout into a decoder.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or does not fit its configuration.
    """
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, backend))
    decoder = abstract_decoder(config, policy, backend)
    expected = named_parameters(decoder)
    if is_orbax(folder):
        parameters, skipped = read_orbax(folder, expected, progress=progress), {}
    else:
        parameters, report = read_parameters(folder, expected, progress=progress)
        skipped = dict(report.skipped)
    if policy.matrix != compute:
        # A wider checkpoint is rounded to the dtype that was asked for; held values stay exact.
        for name, value in parameters.items():
            if is_matrix(name):
                parameters[name] = _round_to(value, compute)
    return Loaded(
        decoder=with_parameters(decoder, parameters),
        eos_token_ids=_eos_ids(folder, config),
        skipped=skipped,
    )


@jax.jit
def _representable(value: jax.Array) -> jax.Array:
    # bfloat16 is the upper half of a float32
    return ((jax.lax.bitcast_convert_type(value, jnp.uint32) & 0xFFFF) == 0).all()


def _round_to(value: jax.Array, compute: jnp.dtype) -> jax.Array:
    if compute != jnp.bfloat16 or bool(_representable(value)):
        return value
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    ids = list(config.eos_token_ids)
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} is not a JSON object ({error}).") from None
        ids += given if isinstance(given, list) else [] if given is None else [given]
    bad = [i for i in ids if not isinstance(i, (int, np.integer)) or not 0 <= i < config.vocab_size]
    if bad:
        raise CheckpointError(
            f"{file} names eos_token_id {bad}, outside the vocabulary of {config.vocab_size}."
        )
    return tuple(dict.fromkeys(ids))

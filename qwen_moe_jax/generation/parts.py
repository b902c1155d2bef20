"""Multi-token prediction, from a folder to a filled module."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen_moe_jax.checkpoint.layout import matrix_name
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
from qwen_moe_jax.checkpoint.parts import is_part_matrix, mtp_shapes, part_keys, read_part
from qwen_moe_jax.checkpoint.reader import read_targets
from qwen_moe_jax.checkpoint.safetensors_files import stored_tensors
from qwen_moe_jax.checkpoint.targets import Target
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.mtp import MtpHead, abstract_mtp
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.part_configs import mtp_layers


def load_mtp(
    folder: Path, config: ModelConfig, compute: jnp.dtype, kernels: Kernels, *, progress: bool = False
) -> MtpHead:
    """Reads multi-token prediction onto the default device.

    Args:
        folder: in Hugging Face layout.
        config: the text model's.
        compute: the dtype to compute in; a wider checkpoint is rounded to it.
        kernels: what it is compiled for.
        progress: show a bar.

    Raises:
        CheckpointError, ConfigError: as of `read_part` and `MtpHead`.
    """
    # Read first: of a checkpoint without the part, config.json need not say anything about it.
    values, blocks = read_part(folder, "mtp", dtype=compute, progress=progress)
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    layers = stored_mtp_layers(folder)
    head = abstract_mtp(config, layers, policy, kernels, blocks)
    for name, value in values.items():
        if is_part_matrix(value.shape) and matrix_name(name) not in blocks:
            values[name] = value.astype(policy.matrix)  # as wide or wider: exact
    return with_parameters(head, values)


def stored_mtp_layers(folder: Path) -> int:
    """How many layers of multi-token prediction config.json says there are.

    Raises:
        ConfigError: as of `mtp_layers`.
    """
    return mtp_layers(read_json_object(folder / "config.json", ConfigError))


def holds_mtp(folder: Path) -> bool:
    """Whether a checkpoint holds multi-token prediction that can be read from it."""
    if is_orbax(folder):
        return False
    keys = part_keys("mtp")
    return any(keys.name(key) is not None for key in stored_tensors(folder))


def read_mtp_targets(
    folder: Path, targets: Mapping[str, Target], config: ModelConfig, layers: int, progress: bool
) -> tuple[dict[str, jax.Array], int]:
    """Reads multi-token prediction onto a mesh.

    Args:
        folder: in Hugging Face layout.
        targets: canonical name, without `MTP` -> what it is read as.
        config: the text model's.
        layers: of multi-token prediction.
        progress: show a bar.

    Returns:
        (name -> array, bytes read).

    Raises:
        CheckpointError: keys, shapes, dtypes or values do not fit.
    """
    shapes = mtp_shapes(config, layers)
    parameters, report = read_targets(folder, targets, shapes, keys=part_keys("mtp"), progress=progress)
    return parameters, report.read_bytes

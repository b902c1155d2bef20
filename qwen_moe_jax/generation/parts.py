"""Multi-token prediction, from a folder to a filled module."""

from pathlib import Path

import jax.numpy as jnp

from qwen_moe_jax.checkpoint.names import matrix_name
from qwen_moe_jax.checkpoint.parts import is_part_matrix, read_part, stored_mtp_layers
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.mtp import MtpHead, abstract_mtp
from qwen_moe_jax.model.params import DtypePolicy


def load_mtp(
    folder: Path, config: ModelConfig, compute: jnp.dtype, kernels: Kernels, *, progress: bool = False
) -> MtpHead:
    """Reads multi-token prediction onto the default device.

    Args:
        folder: of the checkpoint.
        config: the text model's.
        compute: the dtype to compute in; a wider checkpoint is rounded to it.
        kernels: what it is compiled for.
        progress: show a bar.

    Raises:
        CheckpointError, ConfigError: as of `read_part` and `MtpHead`.
    """
    # Read first: of a checkpoint without the part, config.json need not say anything about it.
    values, forms = read_part(folder, "mtp", config=config, dtype=compute, progress=progress)
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    layers = stored_mtp_layers(folder)
    head = abstract_mtp(config, layers, policy, kernels, forms)
    for name, value in values.items():
        if is_part_matrix(value.shape) and matrix_name(name) not in forms:
            values[name] = value.astype(policy.matrix)  # as wide or wider: exact
    return with_parameters(head, values)

"""From a path to a filled decoder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.layout import (
    parameter_forms,
    parameter_shapes,
    stored_dtype,
    text_keys,
    whole_shape,
)
from qwen_moe_jax.checkpoint.names import is_matrix, is_side
from qwen_moe_jax.checkpoint.orbax import read_orbax_targets
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax, refuse_unfinished
from qwen_moe_jax.checkpoint.parts import mtp_shapes, read_part_targets, stored_mtp_layers
from qwen_moe_jax.checkpoint.reader import checkpoint_dtype, float_dtype, read_targets
from qwen_moe_jax.checkpoint.scale_targets import Forms, with_scales
from qwen_moe_jax.checkpoint.targets import Target, give_back, whole
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.engine.forward import Forward, OneDeviceForward
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError
from qwen_moe_jax.generation.parts import load_mtp
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, named_parameters, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.mtp import MTP
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.forward import MeshForward, layout_drafter
from qwen_moe_jax.parallel.layout import Layout


def resolve_folder(name: str | Path) -> Path:
    """A local checkpoint folder, or the local copy of a hub id where the hub can be reached.

    Raises:
        CheckpointNotFoundError: neither.
        CheckpointError: a folder whose conversion or save was not finished.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_unfinished(path)
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
    return float_dtype(requested)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model's functions with its parameters, and what was found beside its weights.

    Attributes:
        forward: on one device or a mesh.
        eos_token_ids: every id that ends a text, from config.json and generation_config.json.
        skipped: families of tensors that the checkpoint holds and text generation does not use.
        read_bytes: bytes of weights that this process read from files.
    """

    forward: Forward
    eos_token_ids: tuple[int, ...]
    skipped: dict[str, int]
    read_bytes: int


def load_forward(
    folder: Path,
    config: ModelConfig,
    compute: jnp.dtype,
    kernels: Kernels,
    progress: bool,
    layout: Layout | None = None,
    draft_tokens: int = 0,
    *,
    exact: bool = False,
) -> Loaded:
    """Reads a checkpoint in Hugging Face or Orbax layout.

    Args:
        folder: of the checkpoint.
        config: read from it.
        compute: the dtype to compute in.
        kernels: what it is compiled for.
        progress: show a bar.
        layout: None means the default device.
        draft_tokens: that multi-token prediction drafts at most for a step; 0 leaves it out.
        exact: verify drafts token by token; of a mesh, its layout says so.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or does not fit its configuration.
    """
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    if layout is None:
        decoder, targets = whole_decoder(config, policy, kernels)
        parameters, skipped, read_bytes = read_weights(folder, config, policy, targets, progress)
        drafter = load_mtp(folder, config, compute, kernels, progress=progress) if draft_tokens else None
        forward: Forward = OneDeviceForward(
            with_parameters(decoder, parameters), kernels, drafter, draft_tokens, exact=exact
        )
    else:
        targets = layout.targets(policy)
        parameters, skipped, read_bytes = read_weights(folder, config, policy, targets, progress)
        head = None
        if draft_tokens:
            layers = stored_mtp_layers(folder)
            head, drafter_targets = layout_drafter(layout, layers, policy, kernels)
            shapes = mtp_shapes(config, layers)
            own, more_bytes = read_part_targets(
                folder, "mtp", config, drafter_targets, shapes, progress=progress
            )
            parameters |= {MTP + name: value for name, value in own.items()}
            read_bytes += more_bytes
        forward = MeshForward(layout, policy, kernels, parameters, head, draft_tokens)
    if draft_tokens:
        skipped.pop("mtp", None)
    return Loaded(
        forward=forward,
        eos_token_ids=_eos_ids(folder, config),
        skipped=skipped,
        read_bytes=read_bytes,
    )


def whole_decoder(
    config: ModelConfig, policy: DtypePolicy, kernels: Kernels
) -> tuple[Decoder, dict[str, Target]]:
    """The abstract decoder of one device, and what its parameters are read as."""
    decoder = abstract_decoder(config, policy, kernels)
    targets = {name: whole(name, struct) for name, struct in named_parameters(decoder).items()}
    targets, forms = with_scales(targets, parameter_shapes(config), parameter_forms(config))
    if forms:
        decoder = abstract_decoder(config, policy, kernels, forms=forms)
    return decoder, targets


def with_stored_scales(
    shapes: Mapping[str, tuple[int, ...]], forms: Forms, parameters: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """One device's parameters with scales and zero points as a checkpoint has them, a block each.

    Args:
        shapes, forms: as of `checkpoint.layout.parameter_shapes` and `parameter_forms`.
        parameters: by these names, scales and zero points held for granules.
    """
    held = {
        name: whole(name, jax.ShapeDtypeStruct(whole_shape(name, s, forms), jnp.float32))
        for name, s in shapes.items()
        if not is_side(name)
    }
    targets = with_scales(held, shapes, forms)[0]
    scales = {
        n: np.zeros(s, stored_dtype(n, forms, np.dtype(np.float32))) for n, s in shapes.items() if is_side(n)
    }
    for name in scales:
        give_back(targets[name], parameters[name], scales)
    return {**parameters, **scales}


def read_weights(
    folder: Path,
    config: ModelConfig,
    policy: DtypePolicy,
    targets: Mapping[str, Target],
    progress: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, int], int]:
    """Reads targets, with the values that `policy` asks for.

    Returns:
        (name -> array, skipped families, bytes of weights read).
    """
    shapes = parameter_shapes(config)
    if is_orbax(folder):
        forms = parameter_forms(config)
        parameters, report = read_orbax_targets(folder, targets, shapes, forms, progress=progress)
    else:
        parameters, report = read_targets(folder, targets, shapes, keys=text_keys(config), progress=progress)
    wide = any(d.itemsize > policy.compute.itemsize for name, d in report.dtypes.items() if is_matrix(name))
    if wide and policy.matrix != policy.compute:
        # A wider checkpoint is rounded to the dtype that was asked for; held values stay exact.
        for name, value in parameters.items():
            if is_matrix(name) and value.dtype == policy.matrix:
                parameters[name] = _rounded(value, policy.compute)
    return parameters, dict(report.skipped), report.read_bytes


def _rounded(value: jax.Array, compute: jnp.dtype) -> jax.Array:
    """float32 values rounded to those of the compute dtype, where they lie."""
    info = jnp.finfo(compute)
    return jax.lax.reduce_precision(value, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def _eos_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    ids = list(config.eos_token_ids)
    file = folder / "generation_config.json"
    if file.is_file():
        given = read_json_object(file, CheckpointError).get("eos_token_id")
        ids += given if isinstance(given, list) else [] if given is None else [given]
    bad = [i for i in ids if not isinstance(i, (int, np.integer)) or not 0 <= i < config.vocab_size]
    if bad:
        raise CheckpointError(
            f"{file} names eos_token_id {bad}, outside the vocabulary of {config.vocab_size}."
        )
    return tuple(dict.fromkeys(ids))

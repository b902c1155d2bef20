"""The parts that a checkpoint may hold beside the text model: their key tables, and reading them.

"mtp" is multi-token prediction (keys `mtp.*`), "visual" the vision tower (`model.visual.*`). A part's
canonical names are its keys without that prefix. Text generation uses neither; it skips them and says so.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.layout import (
    KeyMap,
    layer_forms,
    layer_shapes,
    matrix_scheme,
    parameter_forms,
    parameter_shapes,
    text_keys,
    whole_shape,
)
from qwen_moe_jax.checkpoint.names import PART_PREFIXES
from qwen_moe_jax.checkpoint.orbax import read_orbax_targets, stored_arrays
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax, stored_names
from qwen_moe_jax.checkpoint.packing_checks import Check
from qwen_moe_jax.checkpoint.reader import (
    Source,
    check_tied_head,
    checkpoint_dtype,
    float_dtype,
    match_tensors,
    read_targets,
)
from qwen_moe_jax.checkpoint.safetensors_files import stored_tensors
from qwen_moe_jax.checkpoint.scale_targets import Forms, with_scales
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.checkpoint.targets import Target, whole
from qwen_moe_jax.checkpoint.writer import FLOATS
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError, InputError
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.part_configs import VisionConfig, describes_mtp, mtp_layers

_WORDS = {"mtp": "multi-token prediction", "visual": "vision tower"}


def mtp_shapes(config: ModelConfig, layers: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter of multi-token prediction, in the order a token meets them.

    Its layers are decoder layers of the text model, with full attention; experts and scales
    are as in `layout`.

    Args:
        config: the text model's.
        layers: `mtp_num_hidden_layers` of config.json.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "fc.weight": (hidden, 2 * hidden),  # columns of the embedding, then of the hidden state
    }
    for layer in range(layers):
        shapes |= layer_shapes(config, layer, config.mtp_kind, PART_PREFIXES["mtp"])
    return {**shapes, "norm.weight": (hidden,)}


def mtp_forms(config: ModelConfig, layers: int) -> Forms:
    """Canonical name -> format of every matrix of multi-token prediction that is stored as codes."""
    found: Forms = {}
    for layer in range(layers):
        found |= layer_forms(config, layer, config.mtp_kind, PART_PREFIXES["mtp"])
    return found


def visual_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter of the vision tower, in the order a patch meets them."""
    width, merged = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    block = {
        **_norm("norm1", width),
        **_affine("attn.qkv", 3 * width, width),  # rows of Q, then K, then V
        **_affine("attn.proj", width, width),
        **_norm("norm2", width),
        **_affine("mlp.linear_fc1", config.intermediate_size, width),
        **_affine("mlp.linear_fc2", width, config.intermediate_size),
    }
    return {
        **_affine("patch_embed.proj", width, *patch),
        "pos_embed.weight": (config.num_position_embeddings, width),
        **{f"blocks.{b}.{name}": shape for b in range(config.depth) for name, shape in block.items()},
        **_norm("merger.norm", width),  # before patches are merged
        **_affine("merger.linear_fc1", merged, merged),
        **_affine("merger.linear_fc2", config.out_hidden_size, merged),
    }


def _affine(name: str, out: int, *inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *inputs), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def part_keys(part: str, config: ModelConfig | None = None) -> KeyMap:
    """A part's keys; everything outside of it is skipped.

    Args:
        part: "mtp" or "visual".
        config: of the text model, for the formats of the part's matrices; None where only names matter.

    Raises:
        InputError: no such part.
    """
    if part not in PART_PREFIXES:
        raise InputError(f"part is {part!r}; expected {' or '.join(map(repr, PART_PREFIXES))}.")
    prefix = PART_PREFIXES[part]
    return KeyMap(
        name=lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None,
        key=lambda name: prefix + name,
        skipped=lambda key: None if key.startswith(prefix) else "the rest",
        scheme=lambda name: None if config is None else matrix_scheme(config, name, prefix),
    )


def read_part(
    folder: str | Path,
    part: str,
    *,
    config: ModelConfig | None = None,
    dtype: Any = "auto",
    progress: bool = False,
) -> tuple[dict[str, jax.Array], Forms]:
    """Reads a part of a checkpoint onto the default device, strictly.

    Args:
        folder: with config.json and safetensors files.
        part: "mtp" or "visual".
        config: of the text model, as of `read_config`; None reads it.
        dtype: what matrices, lookup tables and the patch convolution are held in: jnp.float32, jnp.bfloat16
            (a float32 file is rounded to nearest even), or "auto" for the dtype that most of the part is
            stored in. Norms and biases are float32.
        progress: show a progress bar on standard error.

    Returns:
        (canonical name -> array, as of `mtp_shapes` (experts fused, however they are stored) or
        `visual_shapes`; granules). Matrices that are stored in float8 stay so, with their scales held for
        granules, as of `with_scales`.

    Raises:
        CheckpointNotFoundError: the folder, its config.json or a file of weights is missing.
        CheckpointError: the checkpoint does not hold the part (in Orbax layout it never holds the vision
            tower); a file is damaged; or keys, shapes, dtypes or values do not fit (all are named).
        ConfigError: config.json does not describe the part, or something that is not implemented.
        InputError: no such part, or another dtype.
    """
    folder, keys = Path(folder), part_keys(part)
    config = config or read_config(folder)
    requested = None if isinstance(dtype, str) and dtype == "auto" else float_dtype(dtype)
    if not holds_part(folder, part):
        raise CheckpointError(
            f"{folder} holds no {_WORDS[part]} (no key begins with {keys.key('')}); read it from the "
            "published checkpoint."
        )
    shapes = part_shapes(folder, part, config)
    forms = part_forms(folder, part, config)
    matrix = requested or _part_dtype(folder, keys)
    targets = {
        name: whole(
            name,
            jax.ShapeDtypeStruct(
                whole_shape(name, shape, forms),
                matrix if is_part_matrix(shape) else jnp.float32,
            ),
        )
        for name, shape in shapes.items()
    }
    targets, granules = with_scales(targets, shapes, forms)
    return read_part_targets(folder, part, config, targets, shapes, progress=progress)[0], granules


def read_part_targets(
    folder: Path,
    part: str,
    config: ModelConfig,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    progress: bool = False,
) -> tuple[dict[str, jax.Array], int]:
    """Reads targets of a part: (canonical name -> array, bytes read); arguments as of `read_targets`.

    Raises:
        CheckpointError: keys, shapes, dtypes or values do not fit.
    """
    if is_orbax(folder):
        forms = part_forms(folder, part, config)
        read, report = read_orbax_targets(folder, targets, shapes, forms, mtp=True, progress=progress)
    else:
        read, report = read_targets(folder, targets, shapes, keys=part_keys(part, config), progress=progress)
    return read, report.read_bytes


def holds_part(folder: Path, part: str) -> bool:
    """Whether a checkpoint holds a part; Orbax layout has multi-token prediction at most."""
    if is_orbax(folder):
        return part == "mtp" and any(name.startswith(PART_PREFIXES[part]) for name in stored_names(folder))
    keys = part_keys(part)
    return any(keys.name(key) is not None for key in stored_tensors(folder))


def _part_dtype(folder: Path, keys: KeyMap) -> np.dtype:
    """The dtype that a part's matrices are stored in."""
    if not is_orbax(folder):
        return jnp.dtype(checkpoint_dtype(folder, keys))
    arrays = stored_arrays(folder, mtp=True).values()
    return max(
        (array.dtype for array in arrays if array.ndim > 1 and array.dtype in FLOATS),
        key=lambda d: d.itemsize,
    )


@dataclasses.dataclass(frozen=True)
class WholeSource:
    """All of a checkpoint that goes from file to file: the text model and multi-token prediction.

    Attributes:
        shapes: name -> shape; names of multi-token prediction begin with its prefix.
        sources: name -> its tensors.
        mtp_layers: layers of multi-token prediction; 0 where the checkpoint holds none or does not describe
            it.
        skipped: families of tensors that are left out -> tensors.
        forms: name -> format of every matrix of codes.
        checks: tensors that say again what is known.
    """

    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, Source]
    mtp_layers: int
    skipped: dict[str, int]
    forms: Forms
    checks: tuple[Check, ...]


def whole_source(folder: Path, config: ModelConfig) -> WholeSource:
    """Finds the tensors of a Hugging Face checkpoint, looking at headers only.

    Raises:
        CheckpointError: keys, shapes or dtypes do not fit.
        ConfigError: multi-token prediction that is not implemented.
    """
    shapes, tensors = parameter_shapes(config), stored_tensors(folder)
    match = match_tensors(folder, tensors, shapes, text_keys(config))
    check_tied_head(folder, match)
    sources, skipped = dict(match.sources), dict(match.skipped)
    forms, checks = parameter_forms(config), match.checks
    layers = stored_mtp_layers(folder) if "mtp" in skipped else 0
    if layers:
        prefix, mtp = PART_PREFIXES["mtp"], mtp_shapes(config, layers)
        found = match_tensors(folder, tensors, mtp, part_keys("mtp", config))
        shapes |= {prefix + name: shape for name, shape in mtp.items()}
        sources |= {prefix + name: tensors for name, tensors in found.sources.items()}
        forms |= {prefix + name: form for name, form in mtp_forms(config, layers).items()}
        checks += found.checks
        del skipped["mtp"]
    return WholeSource(shapes, sources, layers, skipped, forms, checks)


def stored_mtp_layers(folder: str | Path) -> int:
    """How many layers of multi-token prediction config.json says there are; 0 if it says nothing of it.

    Raises:
        ConfigError: as of `mtp_layers`.
    """
    raw = read_json_object(Path(folder) / "config.json", ConfigError)
    return mtp_layers(raw) if describes_mtp(raw) else 0


def is_part_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of a part is held in the matrix dtype; norms and biases, in float32, are not."""
    return len(shape) > 1


def part_forms(folder: str | Path, part: str, config: ModelConfig) -> Forms:
    """Canonical name -> format of a part's matrices of codes; arguments as of `part_shapes`."""
    if part != "mtp":
        return {}
    return mtp_forms(config, mtp_layers(read_json_object(Path(folder) / "config.json", ConfigError)))


def part_shapes(folder: str | Path, part: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a part ("mtp" or "visual"), by the folder's config.json.

    Args:
        folder: of the checkpoint.
        part: of it.
        config: of the text model, as of `read_config`.

    Raises:
        CheckpointNotFoundError: no config.json.
        ConfigError: it does not describe the part, or contradicts itself.
    """
    raw = read_json_object(Path(folder) / "config.json", ConfigError)
    if part == "mtp":
        return mtp_shapes(config, mtp_layers(raw))
    vision = VisionConfig.from_dict(raw)
    if vision.out_hidden_size != config.hidden_size:
        raise ConfigError(
            f"vision_config has out_hidden_size {vision.out_hidden_size}, but the text model, which "
            f"is to take the tower's output, has hidden_size {config.hidden_size}."
        )
    return visual_shapes(vision)

"""The parts that a checkpoint may hold beside the text model: their key tables, and reading them.

"mtp" is multi-token prediction (keys `mtp.*`), "visual" the vision tower (`model.visual.*`). A part's
canonical names are its keys without that prefix. Text generation uses neither; it skips them and says so.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.checkpoint.layout import PART_PREFIXES, KeyMap, layer_shapes
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
from qwen_moe_jax.checkpoint.reader import checkpoint_dtype, float_dtype, read_targets
from qwen_moe_jax.checkpoint.safetensors_files import stored_tensors
from qwen_moe_jax.checkpoint.scale_targets import Blocks, with_scales
from qwen_moe_jax.checkpoint.targets import whole
from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError, InputError
from qwen_moe_jax.json_files import read_json_object
from qwen_moe_jax.part_configs import VisionConfig, mtp_layers

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
        shapes |= layer_shapes(config, layer, FULL_ATTENTION)
    return {**shapes, "norm.weight": (hidden,)}


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


def part_keys(part: str) -> KeyMap:
    """A part's keys; everything outside of it is skipped.

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
    )


def read_part(
    folder: str | Path, part: str, *, dtype: Any = "auto", progress: bool = False
) -> tuple[dict[str, jax.Array], Blocks]:
    """Reads a part of a Hugging Face checkpoint onto the default device, strictly.

    Args:
        folder: with config.json and safetensors files.
        part: "mtp" or "visual".
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
        CheckpointError: the checkpoint does not hold the part, or is in Orbax layout; a file is damaged; or
            keys, shapes, dtypes or values do not fit (all are named).
        ConfigError: config.json does not describe the part, or something that is not implemented.
        InputError: no such part, or another dtype.
    """
    folder, keys = Path(folder), part_keys(part)
    requested = None if isinstance(dtype, str) and dtype == "auto" else float_dtype(dtype)
    if is_orbax(folder):
        raise CheckpointError(
            f"{folder} is in Orbax layout, which holds the text model only; read the {_WORDS[part]} from the "
            "Hugging Face checkpoint that it was converted from."
        )
    tensors = {key: t for key, t in stored_tensors(folder).items() if keys.name(key) is not None}
    if not tensors:
        raise CheckpointError(
            f"{folder} holds no {_WORDS[part]} (no key begins with {keys.key('')}); read it from the "
            "published checkpoint."
        )
    shapes = part_shapes(folder, part)
    matrix = requested or jnp.dtype(checkpoint_dtype(folder, keys))
    targets = {
        name: whole(name, jax.ShapeDtypeStruct(shape, matrix if is_part_matrix(shape) else jnp.float32))
        for name, shape in shapes.items()
    }
    targets, granules = with_scales(targets, shapes)
    return read_targets(folder, targets, shapes, keys=keys, progress=progress)[0], granules


def is_part_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of a part is held in the matrix dtype; norms and biases, in float32, are not."""
    return len(shape) > 1


def part_shapes(folder: str | Path, part: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a part ("mtp" or "visual"), by the folder's config.json.

    Raises:
        CheckpointNotFoundError: no config.json.
        ConfigError: it does not describe the part, or contradicts itself.
    """
    config = ModelConfig.from_file(folder)
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

"""How a quantised model is written: FP8 in Qwen's layout, all else as compressed-tensors has it.

Experts are written one by one, as published quantised checkpoints have them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen_moe_jax.checkpoint.fused_rows import fused_members, fused_name
from qwen_moe_jax.checkpoint.layout import layer_shapes, matrix_scheme, parameter_shapes
from qwen_moe_jax.checkpoint.names import PART_PREFIXES, hf_key, is_matrix, matrix_name
from qwen_moe_jax.checkpoint.packing import PACKINGS, part_of, stored_name
from qwen_moe_jax.checkpoint.pieces import FileTensor, file_tensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.schemes.fp8 import BLOCK
from qwen_moe_jax.schemes.scheme import Scheme

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor of a file.

    Attributes:
        name: canonical.
        dtype: in the file.
        shape: in the file.
        boxes: (parameter, box of it) that it is made of, behind one another in its rows; () for what is the
            same whatever parameters hold.
        convert: these rows, as the parameters have them -> what the file gets.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    boxes: tuple[tuple[str, tuple[slice, ...]], ...]
    convert: Callable[[Array], Array]


def written_scheme(scheme: Scheme) -> Scheme:
    """The scheme that a matrix is written in: its own, in the packing that is written."""
    if scheme.packing in ("fp8", "nvfp4"):
        return scheme
    packing = {"int4": "packed", "int8": "packed", "e2m1": "mxfp4", "e4m3": "floats"}[scheme.codes]
    return dataclasses.replace(scheme, packing=packing)


def written_tensors(
    config: ModelConfig, name: str, shape: tuple[int, ...], dtype: np.dtype, root: str = "model."
) -> Iterator[Written]:
    """What a parameter becomes; nothing where a tensor of an earlier parameter holds it.

    Args:
        config: of the text model.
        name: canonical.
        shape: of the parameter as `parameter_shapes` has it.
        dtype: that it has in the file if it is no code.
        root: "model." or what the keys of a part begin with.

    Raises:
        CheckpointError: a format that is read only, or rows that do not fill whole 32-bit words, of which the
            format is made.
    """
    scheme = matrix_scheme(config, matrix_name(name), root)
    if scheme is None:
        for tensor in file_tensors(config, name, shape, split_experts=False):
            yield Written(tensor.name, dtype, tensor.shape, tensor.boxes, np.asarray)
        return
    scheme = written_scheme(scheme)
    if scheme.packing == "nvfp4":
        raise CheckpointError(
            f"{name} is in NVFP4, which is read, and not written; quantise the model it was made of to mxfp4."
        )
    names, part = PACKINGS[scheme.packing].names, part_of(name)
    for tensor in file_tensors(config, name, shape, split_experts=True):
        stored = stored_name(tensor.name, names[part])
        yield _written(stored, tensor, part, scheme, dtype)
        if part == "codes" and scheme.packing == "packed":
            sizes = np.array([tensor.shape[0], tensor.shape[1] * CODES[scheme.codes].packed], np.int64)
            says = stored_name(tensor.name, "weight_shape")
            yield Written(says, sizes.dtype, (2,), (), lambda _, sizes=sizes: sizes)


def _written(name: str, tensor: FileTensor, part: str, scheme: Scheme, dtype: np.dtype) -> Written:
    rows, columns = tensor.shape
    if part == "scales":
        held = np.dtype(np.uint8) if scheme.packing == "mxfp4" else dtype
        return Written(name, held, tensor.shape, tensor.boxes, lambda scales: scales)
    if part == "codes":
        codes = CODES[scheme.codes]
        if scheme.packing != "packed":
            return Written(name, codes.dtype, tensor.shape, tensor.boxes, lambda codes: codes)
        _require_words(name, columns * codes.packed, codes.bits)
        shape = (rows, columns // 4)
        return Written(name, np.dtype(np.int32), shape, tensor.boxes, lambda codes: codes)
    bits = CODES[scheme.codes].bits
    _require_words(name, rows, bits)
    return Written(
        name,
        np.dtype(np.int32),
        (rows * bits // 32, columns),
        tensor.boxes,
        lambda zeros: packed_along_rows(zeros, bits),
    )


def packed_along_rows(values: Array, bits: int) -> Array:
    """uint8 [rows, columns] of `bits` bits each -> int32 [rows * bits / 32, columns], first rows lowest."""
    each = 32 // bits
    words = values.astype(np.uint32).reshape(-1, each, values.shape[1])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    return np.bitwise_or.reduce(words << shifts, axis=1).view(np.int32)


def _require_words(name: str, count: int, bits: int) -> None:
    if count * bits % 32:
        raise CheckpointError(
            f"{name} has {count} codes of {bits} bits in a row, and compressed-tensors packs {32 // bits} "
            "into a word; only multiples of that are written."
        )


def quantization_config(config: ModelConfig, *, mtp_layers: int = 0) -> dict[str, Any]:
    """config.json's entry on a quantised checkpoint as it is written.

    Modules that stay as they were are named one by one, as the published FP8 models have it.

    Args:
        config: of the text model.
        mtp_layers: layers of multi-token prediction in the checkpoint.
    """
    plain: list[str] = []
    modules: dict[Scheme, list[str]] = {}
    for root, name in _matrices(config, mtp_layers):
        if name != fused_members(config, name)[0]:
            continue
        scheme = matrix_scheme(config, name, root) if name.startswith("layers.") else None
        stored = fused_name(config, name) or name
        key = hf_key(stored) if root == "model." else root + stored
        if scheme is None:
            plain += [key.removesuffix(".weight")] if key.endswith(".weight") else []
        else:
            modules.setdefault(written_scheme(scheme), []).append(key.removesuffix(".weight"))
    if all(scheme.packing == "fp8" for scheme in modules):
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": plain,
        }
    groups = {
        f"group_{i}": _group(scheme, [pattern for name in names for pattern in _targets(name)])
        for i, (scheme, names) in enumerate(modules.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }


def _matrices(config: ModelConfig, mtp_layers: int) -> Iterator[tuple[str, str]]:
    """(root, canonical name) of every matrix, quantised or not."""
    for name in parameter_shapes(config):
        if is_matrix(name):
            yield "model.", name
    prefix = PART_PREFIXES["mtp"]
    for name in ["fc.weight"] if mtp_layers else []:
        yield prefix, name
    for layer in range(mtp_layers):
        for name in layer_shapes(config, layer, config.mtp_kind, prefix):
            if is_matrix(name):
                yield prefix, name


def _targets(name: str) -> list[str]:
    """Patterns of the modules of a matrix, which a stack of experts has many of."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [name]
    stack, projection = name.rsplit(".", 1)
    parts = "(gate|up)_proj" if projection == "gate_up_proj" else projection
    return [rf"re:{stack.replace('.', chr(92) + '.')}\.\d+\.{parts}$"]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    rows, columns = scheme.group
    forms = {
        "packed": "pack-quantized",
        "mxfp4": "mxfp4-pack-quantized",
        "nvfp4": "nvfp4-pack-quantized",
        "floats": "float-quantized",
        "fp8": "float-quantized",
    }
    weights: dict[str, Any] = {
        "num_bits": CODES[scheme.codes].bits,
        "type": "int" if scheme.codes.startswith("int") else "float",
        "symmetric": not scheme.zeros,
        "dynamic": False,
    }
    if rows > 1:
        weights |= {"strategy": "block", "block_structure": [rows, columns]}
    elif rows == 1:
        named = "tensor_group" if scheme.packing == "nvfp4" else "group"
        weights |= {"strategy": named, "group_size": columns} if columns else {"strategy": "channel"}
    else:
        weights |= {"strategy": "tensor"}
    return {
        "format": forms[scheme.packing],
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }

"""Writes a checkpoint in the Hugging Face layout, which `transformers` loads.

Experts are written fused, as released bfloat16 checkpoints have them; quantised ones one by one, as those
have them. Tensors go to the file one at a time in
bounded pieces, so that writing needs next to no memory beside the parameters.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.fused_rows import fused_members
from qwen_moe_jax.checkpoint.layout import differences, parameter_shapes
from qwen_moe_jax.checkpoint.names import (
    PART_PREFIXES,
    hf_key,
    is_matrix,
    is_side,
    matrix_name,
    scale_name,
    zero_name,
)
from qwen_moe_jax.checkpoint.safetensors_files import INDEX_FILE, READABLE_DTYPES, SINGLE_FILE, abbreviate
from qwen_moe_jax.checkpoint.written import Written, quantization_config, written_tensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, InputError

# What belongs to a checkpoint besides weights and config.json.
EXTRA_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

# Where the arrays of a checkpoint in Orbax layout lie.
ORBAX_FOLDER = "orbax"
# The same while it is written, see `orbax_folder`.
ORBAX_PART = "orbax.part"

# (key, dtype, shape) of a tensor in a file
Entry = tuple[str, np.dtype, tuple[int, ...]]
Box = tuple[slice, ...]
T = TypeVar("T")

# Dtypes of everything but codes and their scales.
FLOATS = (np.dtype(np.float32), np.dtype(jnp.bfloat16))
_FORMAT_NAMES = {dtype: name for name, dtype in READABLE_DTYPES.items()}
_PIECE = 1 << 20  # elements converted and written at once


def write_safetensors(
    folder: str | Path,
    parameters: Mapping[str, jax.Array],
    config: ModelConfig,
    *,
    dtype: Any,
    max_shard_bytes: int = 4 << 30,
    extra_files_from: str | Path | None = None,
    mtp: Mapping[str, jax.Array] | None = None,
) -> None:
    """Writes weights, config.json and the files beside them; an earlier checkpoint there is replaced.

    Matrices are written in `dtype`, into which they must go exactly (a bfloat16 model may hold bfloat16
    values in float32). So are the small parameters, except those that need float32 and then keep it.

    Args:
        folder: created if it does not exist.
        parameters: canonical name -> array, exactly those of `config`.
        config: written with `dtype` as its own.
        dtype: the model's compute dtype, float32 or bfloat16.
        max_shard_bytes: a tensor that is larger gets a file of its own.
        extra_files_from: folder whose tokenizer, chat template and generation_config.json are copied.
        mtp: parameters of multi-token prediction, as of `parts.mtp_shapes` with one layer; None for none.

    Raises:
        CheckpointError: parameters that do not fit the configuration, a matrix that `dtype` cannot hold, or a
            folder with a checkpoint in Orbax layout.
    """
    check_parameters(parameters, config)
    folder = Path(folder)
    refuse_second_layout(folder, ORBAX_FOLDER, ORBAX_PART)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    values: dict[str, tuple[Mapping[str, jax.Array], Written]] = {}
    prefix = PART_PREFIXES["mtp"]
    for root, held, key_of in (("model.", parameters, hf_key), (prefix, mtp or {}, prefix.__add__)):
        dtypes = stored_dtypes(held, np.dtype(dtype))
        for name, value in held.items():
            widest = max((dtypes[n] for n in fused_members(config, name)), key=lambda d: d.itemsize)
            for tensor in written_tensors(config, name, tuple(value.shape), widest, root):
                key = key_of(tensor.name)
                entries.append((key, tensor.dtype, tensor.shape))
                values[key] = held, tensor
    parts = into_shards(entries, lambda entry: entries_bytes([entry]), max_shard_bytes)
    shards = dict(zip(shard_names(len(parts)), parts, strict=True))
    # Written under other names first, so that a checkpoint is never replaced by half of one.
    for file, members in shards.items():
        _write_file(folder / f"{file}.part", members, values)
    for stale in (folder / SINGLE_FILE, folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)
    for file in shards:
        (folder / f"{file}.part").replace(folder / file)
    write_index(folder, shards)
    write_side_files(folder, config, np.dtype(dtype), extra_files_from, mtp_layers=1 if mtp else 0)


def shard_names(count: int) -> list[str]:
    """The files of a checkpoint in so many parts."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def require_new_folder(folder: Path) -> None:
    """Raises InputError unless the folder does not exist yet or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give a new one.")


def refuse_second_layout(folder: Path, *names: str) -> None:
    """Raises CheckpointError if the folder holds one of these, the marks of another checkpoint layout."""
    found = [name for name in names if (folder / name).exists()]
    if found:
        raise CheckpointError(
            f"{folder} already holds a checkpoint in another layout ({found[0]}), and both would be "
            "ambiguous; choose another folder."
        )


def check_parameters(parameters: Mapping[str, jax.Array], config: ModelConfig) -> None:
    """Raises CheckpointError unless names and shapes are exactly those of the configuration."""
    shapes = parameter_shapes(config)
    missing, unexpected, misshapen = differences({n: value.shape for n, value in parameters.items()}, shapes)
    wrong = [f"{name} {list(parameters[name].shape)} instead of {list(shapes[name])}" for name in misshapen]
    problems = [
        f"{what} {abbreviate(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("wrong shapes", wrong))
        if found
    ]
    if problems:
        raise CheckpointError(f"The parameters do not fit the configuration: {'; '.join(problems)}.")


def stored_dtypes(parameters: Mapping[str, jax.Array], dtype: np.dtype) -> dict[str, np.dtype]:
    """Name -> the dtype it is written in: `dtype`, float32 if it is small and needs it, or that of codes.

    Raises:
        CheckpointError: a `dtype` that is neither float32 nor bfloat16, or matrices that it cannot hold.
    """
    if dtype not in FLOATS:
        raise CheckpointError(f"A checkpoint cannot be written in {dtype}; expected float32 or bfloat16.")
    codes = {matrix_name(name) for name in parameters if is_side(name)}
    exact = {name: name in codes or _goes_exactly(value, dtype) for name, value in parameters.items()}
    lossy = [name for name, fits in exact.items() if not fits and is_matrix(name)]
    if lossy:
        raise CheckpointError(
            f"{abbreviate(lossy)} cannot be written in {dtype} without rounding; write float32 instead."
        )
    found = {name: dtype if fits else np.dtype(np.float32) for name, fits in exact.items()}
    for matrix in codes:  # as they are held, but for float32 scales that go into less
        sides = [name for name in (scale_name(matrix), zero_name(matrix)) if name in parameters]
        for name in (matrix, *sides):
            if parameters[name].dtype != np.float32:
                found[name] = np.dtype(parameters[name].dtype)
    return found


def write_side_files(
    folder: Path,
    config: ModelConfig,
    dtype: np.dtype,
    extra_files_from: str | Path | None,
    *,
    mtp_layers: int = 0,
) -> None:
    """Copies what else belongs to a checkpoint, then writes config.json.

    Args:
        folder: of the checkpoint.
        config: of the text model.
        dtype: it computes in.
        extra_files_from: folder of the other files; None for none.
        mtp_layers: layers of multi-token prediction that the checkpoint holds.
    """
    if extra_files_from is not None and Path(extra_files_from).resolve() != folder.resolve():
        for name in EXTRA_FILES:
            if (Path(extra_files_from) / name).is_file():
                shutil.copyfile(Path(extra_files_from) / name, folder / name)
    written = dataclasses.replace(config, dtype=dtype.name).to_dict()
    if mtp_layers:
        written["mtp_num_hidden_layers"] = mtp_layers
    if config.quantization is not None:
        written["quantization_config"] = quantization_config(config, mtp_layers=mtp_layers)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _pieces(value: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    flat = np.asarray(value).reshape(-1)  # no copy on CPU
    for first in range(0, flat.size, _PIECE):
        yield flat[first : first + _PIECE]


def _goes_exactly(value: jax.Array, dtype: np.dtype) -> bool:
    if value.dtype in (dtype, jnp.bfloat16):
        return True
    return all(np.array_equal(piece.astype(dtype).astype(piece.dtype), piece) for piece in _pieces(value))


def into_shards(items: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Items in their order, cut where a file would exceed `limit` bytes; a larger one is alone in one."""
    shards: list[list[T]] = [[]]
    room = limit
    for item in items:
        if size(item) > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size(item)
    return shards


def write_index(folder: Path, shards: Mapping[str, list[Entry]]) -> None:
    """The index of a checkpoint of these files; a single one needs none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(map(entries_bytes, shards.values()))},
        "weight_map": {key: file for file, entries in shards.items() for key, _, _ in entries},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def entries_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of tensors in a file."""
    return sum(prod(shape) * dtype.itemsize for _, dtype, shape in entries)


def encode_header(entries: Iterable[Entry]) -> bytes:
    """What a file begins with whose tensors (key, dtype, shape) lie behind it in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
    end = 0
    for key, dtype, shape in entries:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    return len(encoded).to_bytes(8, "little") + encoded


def _write_file(
    file: Path,
    entries: list[Entry],
    values: Mapping[str, tuple[Mapping[str, jax.Array], Written]],
) -> None:
    with file.open("wb") as stream:
        stream.write(encode_header(entries))
        for key, dtype, _ in entries:
            held, tensor = values[key]
            for piece in _pieces(tensor.convert(_rows(held, tensor.boxes))):
                if piece.dtype.itemsize != 1:
                    piece = piece.astype(dtype, copy=False)
                stream.write(piece.view(np.uint8).data)


def _rows(held: Mapping[str, jax.Array], boxes: tuple[tuple[str, Box], ...]) -> np.ndarray:
    """Boxes of parameters, behind one another; a single one, which is a run of its array, is not copied."""
    parts = [np.asarray(held[name])[box] for name, box in boxes]
    rows = [part.reshape(-1, *part.shape[-1:]) for part in parts]
    return rows[0] if len(rows) == 1 else np.concatenate(rows or [np.empty((0, 0))])

"""From a Hugging Face checkpoint to one in Orbax layout, file to file, a layer in memory at a time.

What is written is what is stored: the same values in the same dtypes, one array a parameter, experts stacked.
Multi-token prediction goes along where config.json describes it.
A conversion that was killed goes on where it was when it is started again.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import stored_dtype
from qwen_moe_jax.checkpoint.names import is_matrix, matrix_name
from qwen_moe_jax.checkpoint.orbax_folder import (
    begin,
    finish,
    groups_of,
    has_plan,
    is_orbax,
    read_manifest,
    refuse_unfinished,
    write_group,
)
from qwen_moe_jax.checkpoint.packing import PackedTensor
from qwen_moe_jax.checkpoint.packing_checks import check_packing
from qwen_moe_jax.checkpoint.parts import whole_source
from qwen_moe_jax.checkpoint.read_box import OpenFiles
from qwen_moe_jax.checkpoint.reader import Source, read_source, source_dtype
from qwen_moe_jax.checkpoint.safetensors_files import StoredTensor, abbreviate
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.checkpoint.writer import (
    ORBAX_FOLDER,
    ORBAX_PART,
    require_new_folder,
    write_side_files,
)
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.formats.codes import MatrixFormat

# Bytes of each tensor that tell a checkpoint from another one of the same model.
_SAMPLE = 1024


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What was written.

    Attributes:
        config: of the model.
        written_bytes: of all parameters, those of earlier runs included.
        kept_bytes: of them, what earlier runs had written.
        skipped: families of tensors that text generation does not use, and that were left out -> tensors.
    """

    config: ModelConfig
    written_bytes: int
    kept_bytes: int
    skipped: dict[str, int]


def convert_checkpoint(
    source: str | Path, destination: str | Path, *, progress: bool = False
) -> ConvertReport:
    """Writes a checkpoint in Orbax layout, or goes on with one that an earlier call did not finish.

    Until it is whole it lies under `orbax.part/`, which is loaded by nothing. Groups that are there already
    are neither read nor written again.

    Args:
        source: a checkpoint in Hugging Face layout.
        destination: a new or empty folder, or one with an unfinished conversion of the same source.
        progress: show a bar on standard error.

    Raises:
        InputError: the destination holds something else.
        CheckpointError: the source is damaged, in Orbax layout, does not fit its configuration, or is not
            the one that the unfinished conversion began with.
    """
    source, destination = Path(source), Path(destination)
    refuse_unfinished(source)
    config = read_config(source)
    if is_orbax(source):
        raise CheckpointError(f"{source} is in Orbax layout already; give a Hugging Face checkpoint.")
    found = whole_source(source, config)
    check_packing(source, found.checks)
    shapes, sources = found.shapes, found.sources
    forms = found.forms
    dtypes = {
        name: stored_dtype(name, forms, np.dtype(np.float32))
        if matrix_name(name) in forms
        else source_dtype(tensors)
        for name, tensors in sources.items()
    }
    sizes = {name: prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    groups = groups_of(shapes)
    identity = _identity(source, sources)

    part = destination / ORBAX_PART
    if (destination / ORBAX_FOLDER).exists():
        raise InputError(f"{destination} holds a checkpoint in Orbax layout already; give a new folder.")
    if has_plan(destination):
        _check_same(destination, source, identity)
    else:
        if not _is_abandoned(destination):
            require_new_folder(destination)
        part = begin(destination, groups, identity)
    there = {group for group in groups if (part / group).is_dir()}
    kept = sum(sizes[name] for group in there for name in groups[group])
    total = sum(sizes.values())
    with tqdm(
        total=total, initial=kept, unit="B", unit_scale=True, desc="Converting", disable=not progress
    ) as bar:
        for group, names in groups.items():
            if group in there:
                continue
            arrays = {}
            for name in names:
                arrays[name] = np.empty(shapes[name], dtypes[name])
                _read(sources[name], arrays[name])
                bar.update(sizes[name])
            write_group(part, group, arrays, dtypes)
            del arrays  # before the next ones are allocated
    write_side_files(
        destination, config, _model_dtype(dtypes, sizes, forms), source, mtp_layers=found.mtp_layers
    )
    finish(destination)
    return ConvertReport(config, total, kept, found.skipped)


def _is_abandoned(destination: Path) -> bool:
    """Whether there is nothing but an unfinished checkpoint that did not get as far as its manifest."""
    names = [path.name for path in destination.iterdir()] if destination.is_dir() else []
    return names == [ORBAX_PART]


def _read(source: Source, out: np.ndarray) -> None:
    with OpenFiles() as files:
        damaged, _ = read_source(source, tuple(slice(0, n) for n in out.shape), out, files)
    if damaged:
        raise CheckpointError(
            f"{source[0][1].file.parent} holds NaN or infinite values in {abbreviate(damaged)}; the weights "
            "are damaged."
        )


def _identity(folder: Path, sources: dict[str, Source]) -> dict[str, Any]:
    """What tells one source from another: each file's size, and a digest of its tensors and samples of them.

    Two trainings of one model have equal names, shapes and sizes; their values differ nearly everywhere. The
    folder is kept to be named, and may change.
    """
    by_file: dict[Path, list[StoredTensor | PackedTensor]] = defaultdict(list)
    for tensors in sources.values():
        for _, tensor in tensors:
            by_file[tensor.file].append(tensor)
    files = {file.name: [file.stat().st_size, _digest(file, by_file[file])] for file in sorted(by_file)}
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {"folder": str(folder.resolve()), "files": files, "config": config}


def _digest(file: Path, tensors: list[StoredTensor | PackedTensor]) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            length = min(_SAMPLE, tensor.nbytes)
            stream.seek(tensor.offset + (tensor.nbytes - length) // 2)
            digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape} {length}\n".encode())
            digest.update(stream.read(length))
    return digest.hexdigest()


def _check_same(destination: Path, source: Path, identity: dict[str, Any]) -> None:
    begun = read_manifest(destination / ORBAX_PART, destination)[1]
    if begun is None:
        raise InputError(f"{destination} holds an interrupted save, not a conversion; give a new folder.")
    old, new = begun.get("files", {}), identity["files"]
    differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if begun.get("config") != identity["config"]:
        differ.append("config.json")
    if differ:
        raise CheckpointError(
            f"{destination} is an unfinished conversion of {begun.get('folder')}, from which {source} "
            f"differs in {abbreviate(differ)}; give that checkpoint, or a new folder."
        )


def _model_dtype(
    dtypes: dict[str, np.dtype], sizes: dict[str, int], forms: Mapping[str, MatrixFormat]
) -> np.dtype:
    """The dtype that most of the matrices' bytes have, of those that a model computes in."""
    weight: dict[np.dtype, int] = defaultdict(int)
    for name, dtype in dtypes.items():
        if is_matrix(name) and name not in forms:
            weight[dtype] += sizes[name]
    return max(weight, key=lambda dtype: weight[dtype])

"""Checkpoints in Orbax layout, which restore straight into any sharding.

Arrays are written by Orbax and read with tensorstore, on which Orbax stands: only the boxes that this
process's devices hold, from files mapped into memory while they are read. The orbax package is imported when
something is written: it takes as long as the rest of this library.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import differences, stored_dtype
from qwen_moe_jax.checkpoint.names import PART_PREFIXES, matrix_name
from qwen_moe_jax.checkpoint.orbax_folder import (
    begin,
    finish,
    groups_of,
    is_orbax,
    read_manifest,
    refuse_unfinished,
    write_group,
)
from qwen_moe_jax.checkpoint.reader import ReadReport
from qwen_moe_jax.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, abbreviate, all_finite
from qwen_moe_jax.checkpoint.targets import Box, Target, place, whole
from qwen_moe_jax.checkpoint.writer import (
    FLOATS,
    ORBAX_FOLDER,
    check_parameters,
    refuse_second_layout,
    stored_dtypes,
    write_side_files,
)
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError
from qwen_moe_jax.formats.codes import MatrixFormat

T = TypeVar("T")

# What names of multi-token prediction begin with.
_MTP = PART_PREFIXES["mtp"]

# Targets that are read at once: one is checked or put on its device while the other is read.
_READERS = 2

# Bytes read at once: many, since a read maps and unmaps its file; few where they are converted on the way,
# so that they are in the caches still.
_PIECE_BYTES = 64 << 20
_CONVERTED_BYTES = 2 << 20


def save_orbax(
    folder: str | Path,
    parameters: Mapping[str, jax.Array],
    config: ModelConfig,
    *,
    dtype: Any,
    extra_files_from: str | Path | None = None,
    mtp: Mapping[str, jax.Array] | None = None,
) -> None:
    """Writes parameters, config.json and the files beside them; an earlier Orbax checkpoint is replaced.

    The earlier one stays until the new one is whole. Dtypes on disk are those of `write_safetensors`.

    Args:
        folder: created if it does not exist.
        parameters: canonical name -> array (of any sharding, of this process), exactly those of `config`.
        config: written with `dtype` as its own.
        dtype: the model's compute dtype, float32 or bfloat16.
        extra_files_from: folder whose tokenizer, chat template and generation_config.json are copied.
        mtp: parameters of multi-token prediction, as of `parts.mtp_shapes` with one layer; None for none.

    Raises:
        CheckpointError: parameters that do not fit the configuration, a matrix that `dtype` cannot hold, or a
            folder with a checkpoint in Hugging Face layout.
    """
    check_parameters(parameters, config)
    parameters = {**parameters, **{_MTP + name: value for name, value in (mtp or {}).items()}}
    folder = Path(folder)
    refuse_second_layout(folder, SINGLE_FILE, INDEX_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = stored_dtypes(parameters, np.dtype(dtype))
    groups = groups_of(parameters)
    part = begin(folder, groups, None)
    for group, names in groups.items():
        write_group(part, group, {name: parameters[name] for name in names}, dtypes)
    write_side_files(folder, config, np.dtype(dtype), extra_files_from, mtp_layers=1 if mtp else 0)
    finish(folder)


def read_orbax(
    folder: str | Path, expected: Mapping[str, jax.ShapeDtypeStruct], *, progress: bool = False
) -> dict[str, jax.Array]:
    """Reads parameters that are held as they are stored; see `read_orbax_targets`.

    Args:
        folder: as there.
        expected: canonical name -> shape, held dtype and a sharding, or None for the default device.
        progress: as there.
    """
    targets = {name: whole(name, struct) for name, struct in expected.items()}
    shapes = {name: tuple(struct.shape) for name, struct in expected.items()}
    return read_orbax_targets(folder, targets, shapes, {}, progress=progress)[0]


def read_orbax_targets(
    folder: str | Path,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, MatrixFormat],
    *,
    mtp: bool = False,
    progress: bool = False,
) -> tuple[dict[str, jax.Array], ReadReport]:
    """Reads every target, two at a time, and of each what this process's devices hold of it.

    The mesh it was saved from does not matter. See `reader.read_targets`, whose Orbax counterpart this is.

    Args:
        folder: as written by `save_orbax` or `convert_checkpoint`.
        targets: name -> what is held and what it is made of.
        shapes: canonical name -> shape of every parameter that the checkpoint has to hold.
        forms: canonical name -> format of every matrix that it holds as codes.
        mtp: read multi-token prediction instead of the text model.
        progress: show a progress bar on standard error.

    Returns:
        (name -> array, in the order of `targets`; what else was found). The bytes read are those of the boxes
        that were asked for; a disk gives whole pages.

    Raises:
        CheckpointNotFoundError: no Orbax checkpoint in the folder.
        CheckpointError: it is unfinished or damaged, or keys, shapes or values do not fit (all are named).
    """
    folder = Path(folder)
    opened = _open_arrays(folder)
    arrays = _of_part(opened, mtp)
    stored = {name: _struct(array) for name, array in arrays.items()}
    check_arrays(folder, stored, shapes, forms)
    lock = threading.Lock()
    read_bytes = 0
    rounded: set[str] = set()

    with tqdm(unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:

        def fetch(name: str, box: Box, out: np.ndarray) -> list[str]:
            nonlocal read_bytes
            try:
                finite = _read_box(arrays[name], box, out)
            except Exception as error:  # tensorstore raises built-in types of many kinds
                raise _damaged(folder, error) from error
            count = out.size * stored[name].dtype.itemsize
            with lock:
                read_bytes += count
                bar.update(count)
                if stored[name].dtype.itemsize > out.dtype.itemsize:
                    rounded.add(name)
            return [] if finite else [name]

        read: dict[str, jax.Array] = {}
        damaged: list[str] = []
        for name, (array, not_finite) in _placed(targets, fetch):
            read[name] = array
            damaged += not_finite
    if damaged:
        names = abbreviate(list(dict.fromkeys(damaged)))
        raise CheckpointError(f"{folder} holds NaN or infinite values in {names}; the weights are damaged.")
    report = ReadReport(
        file_bytes=sum(array.size * array.dtype.itemsize for array in stored.values()),
        read_bytes=read_bytes,
        skipped={"mtp": len(opened) - len(arrays)} if not mtp and len(opened) > len(arrays) else {},
        rounded=tuple(name for name in stored if name in rounded),
        dtypes={name: np.dtype(array.dtype) for name, array in stored.items()},
    )
    return read, report


def _placed(targets: Mapping[str, Target], fetch: Any) -> Iterator[tuple[str, tuple[jax.Array, list[str]]]]:
    """What `place` gives for each target, in their order, a few being read ahead."""
    pending: deque[tuple[str, Future[tuple[jax.Array, list[str]]]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for name, target in targets.items():
                pending.append((name, pool.submit(place, target, fetch)))
                if len(pending) > _READERS:
                    first, future = pending.popleft()
                    yield first, future.result()
            for name, future in pending:
                yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_box(array: Any, box: Box, out: np.ndarray) -> bool:
    """Fills `out` with a box of a stored array, converting on the way; whether it is finite in `out`."""
    import tensorstore as ts

    stored = array.dtype.numpy_dtype
    direct = stored == out.dtype
    scratch = None if direct else np.empty(min(out.size, _CONVERTED_BYTES // stored.itemsize), stored)
    finite = True
    for inside in _pieces(out.shape, (_PIECE_BYTES if direct else _CONVERTED_BYTES) // stored.itemsize):
        target = out[inside]
        source = array[
            tuple(slice(b.start + s.start, b.start + s.stop) for b, s in zip(box, inside, strict=True))
        ]
        if scratch is None:
            _copy(ts, source, target)
            piece = np.ascontiguousarray(target)
        else:
            piece = scratch[: target.size].reshape(target.shape)
            _copy(ts, source, piece)
            with np.errstate(over="ignore"):
                np.copyto(target, piece, casting="unsafe")
            # The narrower of the two shows every infinity and NaN (a float32 value may overflow bfloat16).
            if target.itemsize < piece.itemsize:
                piece = np.ascontiguousarray(target)
        finite = finite and all_finite(piece)
    return finite


def _copy(ts: Any, source: Any, target: np.ndarray) -> None:
    ts.array(target).write(source.translate_to[(0,) * target.ndim]).result()  # into the array's own memory


def _pieces(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """A box of this shape in boxes of at most `limit` elements, each together in a row-major array."""
    # dimensions before this one are taken one by one, those behind it whole
    cut = next((d for d in range(len(shape)) if prod(shape[d + 1 :]) <= limit), 0)
    if not shape:
        yield ()
        return
    step = max(1, limit // max(1, prod(shape[cut + 1 :])))
    for lead in itertools.product(*map(range, shape[:cut])):
        for first in range(0, shape[cut], step):
            yield (
                *(slice(i, i + 1) for i in lead),
                slice(first, min(first + step, shape[cut])),
                *(slice(0, n) for n in shape[cut + 1 :]),
            )


def stored_arrays(folder: str | Path, *, mtp: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Canonical name -> shape and dtype of every array in a checkpoint in Orbax layout; reads no weights.

    Args:
        folder: of the checkpoint.
        mtp: of multi-token prediction (none if it holds none) instead of the text model.

    Raises:
        CheckpointNotFoundError: no Orbax checkpoint in the folder.
        CheckpointError: it is unfinished or damaged.
    """
    return {name: _struct(array) for name, array in _of_part(_open_arrays(Path(folder)), mtp).items()}


def _of_part(arrays: Mapping[str, T], mtp: bool) -> dict[str, T]:
    """Those of multi-token prediction or of the text model, by canonical name."""
    return {name.removeprefix(_MTP): array for name, array in arrays.items() if name.startswith(_MTP) == mtp}


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)


def _open_arrays(folder: Path) -> dict[str, Any]:
    """Canonical name -> tensorstore.TensorStore, of every array that the manifest names."""
    import tensorstore as ts

    if not is_orbax(folder):
        raise CheckpointNotFoundError(
            f"{folder} holds no {ORBAX_FOLDER} folder; expected a checkpoint in Orbax layout."
        )
    refuse_unfinished(folder)
    orbax = folder.resolve() / ORBAX_FOLDER
    groups, _ = read_manifest(orbax, folder)
    # Mapped files give slices without reading the rest of an array, and without a copy on the way.
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    opened = {
        name: ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{orbax / group / name}/"},
                "fill_missing_data_reads": False,  # a lost file is an error, not zeros
            },
            open=True,
            read=True,
            context=context,
        )
        for group, names in groups.items()
        for name in names
    }
    try:
        return {name: future.result() for name, future in opened.items()}
    except Exception as error:  # tensorstore raises built-in types of many kinds
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    first_line = str(error).partition("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{folder / ORBAX_FOLDER} is not a readable Orbax checkpoint ({first_line}); copy it again."
    )


def check_arrays(
    folder: str | Path,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    shapes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, MatrixFormat],
) -> None:
    """Raises CheckpointError, naming everything, unless the arrays are those expected."""
    missing, unexpected, misshapen = differences({n: array.shape for n, array in stored.items()}, shapes)
    wrong = [f"{name} is {list(stored[name].shape)} instead of {list(shapes[name])}" for name in misshapen]
    other = [
        f"{name} is {array.dtype.name}"
        for name, array in stored.items()
        if name in shapes and array.dtype not in _dtypes_of(name, forms)
    ]
    problems = [
        f"{what}: {abbreviate(found)}"
        for what, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("wrong shapes", wrong),
            ("wrong dtypes", other),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(problems)}.")


def _dtypes_of(name: str, forms: Mapping[str, MatrixFormat]) -> tuple[np.dtype, ...]:
    """Dtypes that an array may have: of codes and their scales the format's own."""
    return (stored_dtype(name, forms, FLOATS[0]),) if matrix_name(name) in forms else FLOATS

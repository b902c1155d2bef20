"""Checkpoints in Orbax layout, which restore straight into any sharding.

A folder holds config.json and the tokenizer files beside `orbax/`, where each parameter is an array under its
canonical name. The orbax package is imported when it is used: it takes as long as the rest of this library.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import differences
from qwen_moe_jax.checkpoint.reader import ReadReport
from qwen_moe_jax.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, abbreviate, all_finite
from qwen_moe_jax.checkpoint.targets import Box, Target, place
from qwen_moe_jax.checkpoint.writer import (
    ORBAX_FOLDER,
    check_parameters,
    refuse_second_layout,
    stored_dtypes,
    write_side_files,
)
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError


def is_orbax(folder: str | Path) -> bool:
    """Whether the folder holds a checkpoint in Orbax layout."""
    return (Path(folder) / ORBAX_FOLDER).is_dir()


def save_orbax(
    folder: str | Path,
    parameters: Mapping[str, jax.Array],
    config: ModelConfig,
    *,
    dtype: Any,
    extra_files_from: str | Path | None = None,
) -> None:
    """Writes parameters, config.json and the files beside them; an earlier Orbax checkpoint is replaced.

    Dtypes on disk are those of `write_safetensors`.

    Args:
        folder: created if it does not exist.
        parameters: canonical name -> array (of any sharding), exactly those of `config`.
        config: written with `dtype` as its own.
        dtype: the model's compute dtype, float32 or bfloat16.
        extra_files_from: folder whose tokenizer, chat template and generation_config.json are copied.

    Raises:
        CheckpointError: parameters that do not fit the configuration, a matrix that `dtype` cannot hold, or a
            folder with a checkpoint in Hugging Face layout.
    """
    import orbax.checkpoint as ocp

    check_parameters(parameters, config)
    folder = Path(folder).resolve()  # Orbax takes absolute paths only
    refuse_second_layout(folder, SINGLE_FILE, INDEX_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = stored_dtypes(parameters, np.dtype(dtype))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            folder / ORBAX_FOLDER,
            ocp.args.PyTreeSave(
                dict(parameters), save_args={name: ocp.SaveArgs(dtype=dtypes[name]) for name in parameters}
            ),
            force=True,
        )
    write_side_files(folder, config, np.dtype(dtype), extra_files_from)


def read_orbax(
    folder: str | Path, expected: Mapping[str, jax.ShapeDtypeStruct], *, progress: bool = False
) -> dict[str, jax.Array]:
    """Reads every expected parameter, a layer at a time, into the sharding its struct names.

    Args:
        folder: as written by `save_orbax`.
        expected: canonical name -> shape, held dtype and a sharding, or None for the default device.
        progress: show a progress bar on standard error.

    Raises:
        CheckpointNotFoundError: no Orbax checkpoint in the folder.
        CheckpointError: it is damaged, or keys, shapes or values do not fit (all are named).
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).resolve()
    if not is_orbax(folder):
        raise CheckpointNotFoundError(
            f"{folder} holds no {ORBAX_FOLDER} folder; expected a checkpoint in Orbax layout."
        )
    default = jnp.zeros(()).sharding
    read: dict[str, jax.Array] = {}
    total = sum(struct.size * struct.dtype.itemsize for struct in expected.values())
    with (
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar,
    ):
        shapes = {name: tuple(struct.shape) for name, struct in expected.items()}
        check_arrays(folder, _metadata(checkpointer, folder), shapes)
        for _, group in itertools.groupby(expected, key=_layer):
            structs = {name: expected[name] for name in group}
            args = {
                name: ocp.ArrayRestoreArgs(
                    sharding=struct.sharding or default, global_shape=struct.shape, dtype=struct.dtype
                )
                for name, struct in structs.items()
            }
            try:
                arrays = checkpointer.restore(
                    folder / ORBAX_FOLDER,
                    ocp.args.PyTreeRestore(structs, restore_args=args, partial_restore=True),
                )
            except Exception as error:  # tensorstore raises built-in types of many kinds
                raise _damaged(folder, error) from error
            read |= arrays
            bar.update(sum(array.nbytes for array in arrays.values()))
    not_finite = [name for name, value in read.items() if not _all_finite(value)]
    if not_finite:
        raise _not_finite(folder, not_finite)
    return {name: read[name] for name in expected}


def read_orbax_targets(
    folder: str | Path,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    progress: bool = False,
) -> tuple[dict[str, jax.Array], ReadReport]:
    """Reads targets; see `reader.read_targets`, whose Orbax counterpart this is.

    Parameters that are held as they are stored are restored straight into their sharding. Others come through
    the host, one layer at a time, whole, in every process.
    """
    stored = stored_arrays(folder)
    total = sum(array.size * array.dtype.itemsize for array in stored.values())
    report = ReadReport(
        file_bytes=total,
        read_bytes=total,
        skipped={},
        rounded=(),
        dtypes={name: np.dtype(array.dtype) for name, array in stored.items()},
    )
    if targets.keys() == shapes.keys() and all(target.as_stored for target in targets.values()):
        expected = {name: target.struct for name, target in targets.items()}
        return read_orbax(folder, expected, progress=progress), report

    check_arrays(folder, stored, shapes)
    read: dict[str, jax.Array] = {}
    damaged: list[str] = []
    hosts: dict[str, np.ndarray] = {}

    def fetch(name: str, box: Box, out: np.ndarray) -> list[str]:
        if _layer(name) != _layer(next(iter(hosts), "")):
            hosts.clear()
            hosts.update(
                _restore_layer(folder, {n: s for n, s in stored.items() if _layer(n) == _layer(name)})
            )
            bar.update(sum(host.nbytes for host in hosts.values()))
        with np.errstate(over="ignore"):
            out[...] = hosts[name][box]
        finite = all_finite(np.ascontiguousarray(out))
        return [] if finite else [name]

    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for name, target in targets.items():
            read[name], not_finite = place(target, fetch)
            damaged += not_finite
    if damaged:
        raise _not_finite(folder, list(dict.fromkeys(damaged)))
    return read, report


def _restore_layer(folder: str | Path, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    path = Path(folder).resolve() / ORBAX_FOLDER
    args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=array.dtype) for name, array in arrays.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(
                path, ocp.args.PyTreeRestore(dict(arrays), restore_args=args, partial_restore=True)
            )
        except Exception as error:  # tensorstore raises built-in types of many kinds
            raise _damaged(path.parent, error) from error


def _not_finite(folder: str | Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds NaN or infinite values in {abbreviate(names)}; the weights are damaged."
    )


def stored_arrays(folder: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Canonical name -> shape and dtype of every array in a checkpoint in Orbax layout; reads no weights.

    Raises:
        CheckpointError: it is damaged.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return _metadata(checkpointer, Path(folder).resolve())


def _metadata(checkpointer: Any, folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    try:
        tree = checkpointer.metadata(folder / ORBAX_FOLDER).item_metadata.tree
        return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tree.items()}
    except Exception as error:  # as above
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    first_line = str(error).partition("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{folder / ORBAX_FOLDER} is not a readable Orbax checkpoint ({first_line}); copy it again."
    )


def check_arrays(
    folder: str | Path, stored: Mapping[str, jax.ShapeDtypeStruct], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises CheckpointError, naming everything, unless the arrays are those expected."""
    missing, unexpected, misshapen = differences({n: array.shape for n, array in stored.items()}, shapes)
    wrong = [f"{name} is {list(stored[name].shape)} instead of {list(shapes[name])}" for name in misshapen]
    problems = [
        f"{what}: {abbreviate(found)}"
        for what, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("wrong shapes", wrong),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(problems)}.")


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else name


def _all_finite(value: jax.Array) -> bool:
    # On the host, where a shard on CPU is seen without a copy: compiling this for every shape takes longer.
    shards = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    return all(all_finite(np.asarray(shard.data)) for shard in shards)

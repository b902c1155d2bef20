"""The Orbax layout on disk: one Orbax checkpoint a group of parameters, and when all of them are there.

    folder/config.json, tokenizer files
    folder/orbax/manifest.json   {"groups": {group: [canonical names]}, "source": what it was converted from}
    folder/orbax/layers.0/       an Orbax PyTree checkpoint: {canonical name: array}

A layer is a group; so are the embedding, the last norm, the head and multi-token prediction, whose names
begin with `mtp.`. Groups are written under `orbax.part/`, each under another name until it is on the disk,
and the folder gets its real name when everything is there. So whatever moment a writer dies at, `orbax/` is
whole or absent, and a group under its real name is whole.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.checkpoint.writer import ORBAX_FOLDER, ORBAX_PART
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.json_files import read_json_object

MANIFEST = "manifest.json"

# What a group is called until it is on the disk; Orbax' own temporary names begin with it.
_SAVING = ".saving"

Groups = dict[str, list[str]]  # group -> canonical names, in the model's order


def groups_of(names: Iterable[str]) -> Groups:
    """Parameters by the unit they are written in: `layers.N`, or the name's first part."""

    def group(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]

    return {key: list(members) for key, members in itertools.groupby(names, key=group)}


def is_orbax(folder: str | Path) -> bool:
    """Whether the folder holds a checkpoint in Orbax layout, or one that is not finished."""
    folder = Path(folder)
    return (folder / ORBAX_FOLDER).is_dir() or (folder / ORBAX_PART).is_dir()


def stored_names(folder: Path) -> list[str]:
    """The names of all arrays in a whole checkpoint, by its manifest; no array is opened.

    Raises:
        CheckpointError: it is unfinished or damaged.
    """
    refuse_unfinished(folder)
    return [name for names in read_manifest(folder / ORBAX_FOLDER, folder)[0].values() for name in names]


def refuse_unfinished(folder: str | Path) -> None:
    """Raises CheckpointError if the folder's Orbax checkpoint is not whole; passes any other folder."""
    folder = Path(folder)
    if (folder / ORBAX_FOLDER / MANIFEST).is_file():
        return
    if (folder / ORBAX_FOLDER).is_dir():
        raise CheckpointError(
            f"{folder / ORBAX_FOLDER} lacks {MANIFEST}, without which it is an interrupted save or copy, or "
            "another program's; save or copy it again."
        )
    if not (folder / ORBAX_PART).is_dir():
        return
    source = (read_manifest(folder / ORBAX_PART, folder)[1] or {}) if has_plan(folder) else {}
    if "folder" in source:
        raise CheckpointError(
            f"{folder} is an unfinished conversion; run `qwen-moe-jax convert {source['folder']} {folder}` "
            "again to finish it."
        )
    raise CheckpointError(
        f"{folder} holds an interrupted save in Orbax layout ({ORBAX_PART}); save or convert it again."
    )


def has_plan(folder: Path) -> bool:
    """Whether an unfinished checkpoint has got so far that it says what it will hold."""
    return (folder / ORBAX_PART / MANIFEST).is_file()


def read_manifest(orbax: Path, folder: Path) -> tuple[Groups, dict[str, Any] | None]:
    """(groups, what it was converted from, if it was).

    Args:
        orbax: with the manifest.
        folder: named in errors.

    Raises:
        CheckpointError: it is damaged.
    """
    found = read_json_object(orbax / MANIFEST, CheckpointError)
    groups, source = found.get("groups"), found.get("source")
    if not (
        isinstance(groups, dict)
        and all(
            _plain(g) and isinstance(names, list) and all(map(_plain, names)) for g, names in groups.items()
        )
        and isinstance(source, dict | None)
    ):
        raise CheckpointError(f"{folder} has a damaged {orbax.name}/{MANIFEST}; copy it again.")
    return groups, source


def _plain(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and name not in (".", "..") and not set(name) & set("/\\:\0")


def begin(folder: Path, groups: Groups, source: dict[str, Any] | None) -> Path:
    """An empty unfinished checkpoint in place of an earlier unfinished one; returns where its groups go."""
    part = folder / ORBAX_PART
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    manifest = part / f"{MANIFEST}.part"
    manifest.write_text(json.dumps({"groups": groups, "source": source}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    manifest.replace(part / MANIFEST)
    _sync(part)
    _sync(folder)
    return part


def write_group(
    part: Path,
    group: str,
    arrays: Mapping[str, np.ndarray | jax.Array],
    dtypes: Mapping[str, np.dtype],
) -> None:
    """Writes one group as an Orbax checkpoint; it has its real name once it is on the disk.

    Arrays are neither compressed (weights shrink by a fifth, and restoring would take several times as long)
    nor packed into common files (where their values need not be aligned, and could not be used as they lie).

    Args:
        part: of the unfinished checkpoint.
        group: as of `groups_of`.
        arrays: canonical name -> array, which is written without a copy unless its dtype changes.
        dtypes: canonical name -> dtype on disk.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    for stale in part.glob(f"{group}{_SAVING}*"):
        shutil.rmtree(stale)
    saving = part.resolve() / f"{group}{_SAVING}"  # Orbax takes absolute paths only
    handlers = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=handlers
    )
    with ocp.Checkpointer(handler) as checkpointer, _without_packing_warning():
        save_args = {name: ocp.SaveArgs(dtype=dtypes[name]) for name in arrays}
        checkpointer.save(saving, ocp.args.PyTreeSave(dict(arrays), save_args=save_args))
    for path in saving.rglob("*"):
        _sync(path)
    _sync(saving)
    saving.rename(part / group)
    _sync(part)


@contextlib.contextmanager
def _without_packing_warning() -> Iterator[None]:
    """Orbax warns at every save that there are no common files to merge."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def finish(folder: Path) -> None:
    """Makes the unfinished checkpoint the folder's checkpoint; an earlier one is replaced.

    Everything else that belongs to the folder should be there already.
    """
    part, whole, old = folder / ORBAX_PART, folder / ORBAX_FOLDER, folder / f"{ORBAX_FOLDER}.old"
    if whole.exists():
        if old.exists():
            shutil.rmtree(old)
        whole.rename(old)
    part.rename(whole)
    _sync(folder)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

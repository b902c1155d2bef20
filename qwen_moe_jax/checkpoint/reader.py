"""Reads a Hugging Face checkpoint into the parameters a model expects, strictly."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import TEXT_KEYS, KeyMap
from qwen_moe_jax.checkpoint.names import is_matrix, matrix_name
from qwen_moe_jax.checkpoint.packing import (
    PACKINGS,
    PackedTensor,
    Packing,
    as_array,
    stored_as,
    stored_name,
)
from qwen_moe_jax.checkpoint.packing_checks import Check, check_packing, kind_of
from qwen_moe_jax.checkpoint.pieces import Piece, expert_pieces, whole_piece
from qwen_moe_jax.checkpoint.read_box import OpenFiles, iter_float32, read_boxes, read_packed
from qwen_moe_jax.checkpoint.safetensors_files import (
    READABLE_DTYPES,
    StoredTensor,
    abbreviate,
    stored_tensors,
)
from qwen_moe_jax.checkpoint.targets import Box, Target, Transfers, place, whole
from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.schemes.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What reading found besides the parameters.

    Attributes:
        file_bytes: bytes of all parameters in the files.
        read_bytes: bytes of them that this process read: what its devices hold, each slice once.
        skipped: families of tensors that were not asked for ("model.visual", "mtp") -> number of tensors.
        rounded: parameters of float32 files that are held in bfloat16.
        dtypes: stored parameter -> the widest dtype that any of its tensors is stored in.
    """

    file_bytes: int
    read_bytes: int
    skipped: dict[str, int]
    rounded: tuple[str, ...]
    dtypes: dict[str, np.dtype]


# Dtypes of everything but codes and their scales.
_FLOATS = ("F32", "BF16")

_ANY_FLOATS = ("F64", "F32", "F16", "BF16")

# Reading is a copy out of the page cache where files lie there, else waiting for a disk.
_THREADS = min(16, 2 * (os.cpu_count() or 1))

# A parameter's tensors in the files, with the place of each in the parameter.
Source = list[tuple[Piece, StoredTensor | PackedTensor]]


@dataclasses.dataclass(frozen=True)
class Match:
    """Which tensors of a checkpoint make up the parameters.

    Attributes:
        sources: canonical name -> its tensors.
        skipped: as in `ReadReport`.
        tied_head: an `lm_head` that is stored although the configuration ties it to the embedding.
        checks: tensors that say again what is known, each with what to compare it with.
    """

    sources: dict[str, Source]
    skipped: dict[str, int]
    tied_head: StoredTensor | None
    checks: tuple[Check, ...] = ()


def read_parameters(
    folder: str | Path, expected: Mapping[str, jax.ShapeDtypeStruct], *, progress: bool = False
) -> tuple[dict[str, jax.Array], ReadReport]:
    """Reads parameters that are held as they are stored; see `read_targets`.

    Args:
        folder: as there.
        expected: canonical name -> shape, held dtype (float32 or bfloat16), and a sharding or None for the
            default device.
        progress: as there.
    """
    return read_targets(
        folder,
        {name: whole(name, struct) for name, struct in expected.items()},
        {name: tuple(struct.shape) for name, struct in expected.items()},
        progress=progress,
    )


def read_targets(
    folder: str | Path,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keys: KeyMap = TEXT_KEYS,
    progress: bool = False,
) -> tuple[dict[str, jax.Array], ReadReport]:
    """Reads every target, and of each what this process's devices hold of it.

    Several threads read a slice while the one before is on its way to its device; memory beside what the
    devices hold is at most two slices.

    bfloat16 held as float32 is exact; float32 held as bfloat16 is rounded to nearest even and reported.
    Codes are held as codes.
    Both prefixes and both layouts of experts are read (see `layout`). A tied checkpoint may hold an `lm_head`
    equal to its embedding.

    Args:
        folder: with `model.safetensors`, or shards and their index.
        targets: name -> what is held and what it is made of.
        shapes: canonical name -> shape of every parameter that the checkpoint has to hold.
        keys: which of the checkpoint's keys these are; the text model's by default.
        progress: show a progress bar on standard error.

    Returns:
        (name -> array, in the order of `targets`; what else was found).

    Raises:
        CheckpointNotFoundError: the folder or a file is missing.
        CheckpointError: a file is damaged, or keys, shapes, dtypes or values do not fit (all are named).
    """
    match = match_tensors(folder, stored_tensors(folder), shapes, keys)
    check_tied_head(folder, match)
    check_packing(folder, match.checks)
    sources = match.sources
    read: dict[str, jax.Array] = {}
    damaged: list[str] = []
    read_bytes = 0
    dtypes = {name: source_dtype(source) for name, source in sources.items()}
    rounded: list[str] = []

    share = None if jax.process_count() > 1 else sum(map(_stored_bytes, sources.values()))
    with (
        tqdm(total=share, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar,
        OpenFiles() as files,
        ThreadPoolExecutor(_THREADS) as threads,
    ):

        def fetch(name: str, box: Box, out: np.ndarray) -> list[str]:
            nonlocal read_bytes
            not_finite, count = read_source(sources[name], box, out, files, threads)
            read_bytes += count
            bar.update(count)
            if dtypes[name].itemsize > out.dtype.itemsize:
                rounded.append(name)
            return not_finite

        # in the order of the files, so that a disk reads forward
        transfers = Transfers()
        for name in sorted(targets, key=lambda name: _position(sources[name])):
            read[name], not_finite = place(targets[name], fetch, transfers)
            damaged += not_finite
        transfers.finish()
    if damaged:
        where = abbreviate(list(dict.fromkeys(damaged)))
        raise CheckpointError(f"{folder} holds NaN or infinite values in {where}; the weights are damaged.")
    report = ReadReport(
        file_bytes=sum(map(_stored_bytes, sources.values())),
        read_bytes=read_bytes,
        skipped=match.skipped,
        rounded=tuple(dict.fromkeys(rounded)),
        dtypes=dtypes,
    )
    return {name: read[name] for name in targets}, report


def check_tied_head(folder: str | Path, match: Match) -> None:
    """Reads a stored `lm_head` that the configuration ties to the embedding.

    Raises:
        CheckpointError: it is another matrix.
    """
    if match.tied_head is not None and not _equal(
        match.tied_head, match.sources["embed_tokens.weight"][0][1]
    ):
        raise CheckpointError(
            f"{folder} holds an lm_head.weight that differs from the embedding, to which config.json ties it "
            "(tie_word_embeddings is true)."
        )


def checkpoint_dtype(folder: str | Path, keys: KeyMap = TEXT_KEYS) -> str:
    """The dtype that most of the matrices' bytes are stored in, "float32" or "bfloat16"; headers only.

    Codes and their scales do not count: what is beside them says what to compute in.

    Raises:
        CheckpointError: as `stored_tensors`; or it is another dtype, or there are no matrices.
    """
    weight: Counter[str] = Counter()
    for key, tensor in stored_tensors(folder).items():
        name = keys.name(key)
        if name is not None and is_matrix(name) and tensor.dtype in _ANY_FLOATS and len(tensor.shape) > 1:
            weight[tensor.dtype] += tensor.nbytes
    if not weight:
        raise CheckpointError(
            f"{folder} holds no text model; expected keys such as {TEXT_KEYS.key('embed_tokens.weight')}."
        )
    dtype = weight.most_common(1)[0][0]
    if dtype not in _FLOATS:
        raise CheckpointError(f"{folder} is stored in {dtype}; only F32 and BF16 weights can be loaded.")
    return READABLE_DTYPES[dtype].name


def float_dtype(requested: Any) -> np.dtype:
    """The dtype of a request, float32 or bfloat16.

    Raises:
        InputError: anything else.
    """
    try:
        dtype = jnp.dtype(requested)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in ("float32", "bfloat16"):
        raise InputError(
            f"dtype is {requested!r}; expected jnp.float32, jnp.bfloat16 or 'auto' (the checkpoint's own)."
        )
    return dtype


def match_tensors(
    folder: str | Path,
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    keys: KeyMap = TEXT_KEYS,
) -> Match:
    """Finds each parameter's tensors, looking at headers only.

    Args:
        folder: named in errors.
        tensors: of the folder, as of `stored_tensors`.
        shapes: canonical name -> shape of every expected parameter.
        keys: as of `read_targets`.

    Raises:
        CheckpointError: names everything that does not fit at once.
    """
    skipped: Counter[str] = Counter()
    by_name: dict[str, StoredTensor] = {}
    unexpected, twice = [], []
    for key, tensor in tensors.items():
        family, name = keys.skipped(key), keys.name(key)
        if family is not None:
            skipped[family] += 1
        elif name is None:
            unexpected.append(key)
        elif name in by_name:
            twice.append(f"{by_name[name].key} and {key}")
        else:
            by_name[name] = tensor

    sources: dict[str, Source] = {}
    missing, misshapen, unreadable = [], [], []
    unused = dict(by_name)
    checks: list[Check] = []
    for name, shape in shapes.items():
        sources[name] = []
        scheme = keys.scheme(matrix_name(name))
        found = stored_as(name, scheme)
        for piece in _pieces(name, shape, by_name, found.name, keys):
            stored = found.name(piece.name)
            tensor = by_name.get(stored)
            if tensor is None:
                missing.append(keys.key(stored))
                continue
            unused.pop(stored, None)  # what is fused is met more than once
            wanted = found.layout.file_shapes(piece.tensor_shape)
            if tensor.shape not in wanted:
                misshapen.append(f"{tensor.key} is {list(tensor.shape)} instead of {list(wanted[0])}")
                continue
            if tensor.dtype not in found.layout.dtypes:
                expected = " or ".join(found.layout.dtypes)
                unreadable.append(f"{tensor.key} is {tensor.dtype} instead of {expected}")
                continue
            source = as_array(tensor, found.layout, piece.tensor_shape)
            if scheme is not None and found.part == "codes":
                checks += _checks(piece, scheme, PACKINGS[scheme.packing], unused)
            divisor = found.divisor(piece.name)
            if divisor is not None and isinstance(source, PackedTensor):
                one = by_name.get(divisor)
                unused.pop(divisor, None)
                if one is None or one.dtype != "F32" or one.nbytes != 4:
                    missing.append(keys.key(divisor))
                source = dataclasses.replace(source, divisor=one)
            sources[name].append((piece, source))
    tied_head = unused.pop("lm_head.weight", None) if "embed_tokens.weight" in shapes else None
    unexpected += [tensor.key for tensor in unused.values()]

    problems = [
        f"{what}: {abbreviate(found)}"
        for what, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("keys under both prefixes", twice),
            ("wrong shapes", misshapen),
            ("wrong dtypes", unreadable),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(problems)}.")
    return Match(sources, dict(skipped), tied_head, tuple(checks))


def _checks(
    piece: Piece, scheme: Scheme, packing: Packing, unused: dict[str, StoredTensor]
) -> Iterator[Check]:
    """Takes the tensors beside a matrix of codes: gives what is to be compared, and drops what is about
    activations."""
    *rows, columns = piece.tensor_shape
    shape = (*rows, columns * CODES[scheme.codes].packed)
    for ending in packing.checks:
        if ending == "qzeros" and scheme.zeros:
            continue
        tensor = unused.pop(stored_name(piece.name, ending), None)
        if tensor is not None:
            yield Check(tensor, kind_of(ending), shape, scheme)
    for ending in packing.ignored:
        unused.pop(stored_name(piece.name, ending), None)


def _pieces(
    name: str,
    shape: tuple[int, ...],
    stored: Mapping[str, StoredTensor],
    name_of: Callable[[str], str],
    keys: KeyMap,
) -> list[Piece]:
    """The tensors that make up a parameter: itself, rows of a fused one or, in some files, one an expert."""
    fused = keys.fused(name, shape)
    if fused:
        return fused
    split = expert_pieces(name, shape)
    if name_of(name) not in stored and any(name_of(piece.name) in stored for piece in split):
        return split
    return [whole_piece(name, shape)]


def _equal(a: StoredTensor, b: StoredTensor | PackedTensor) -> bool:
    if isinstance(b, PackedTensor) or a.shape != b.shape or a.dtype not in _FLOATS:
        return False
    return all(np.array_equal(x, y) for x, y in zip(iter_float32(a), iter_float32(b), strict=True))


def _stored_bytes(source: Source) -> int:
    return sum(tensor.nbytes * piece.shape[0] // piece.tensor_shape[0] for piece, tensor in source)


def _position(source: Source) -> tuple[str, int]:
    first = source[0][1]
    return str(first.file), first.offset


def source_dtype(source: Source) -> np.dtype:
    """The widest dtype that any tensor of a parameter is stored in."""
    return max((READABLE_DTYPES[tensor.dtype] for _, tensor in source), key=lambda dtype: dtype.itemsize)


def read_source(
    source: Source,
    box: Box,
    out: np.ndarray,
    files: OpenFiles,
    threads: Executor | None = None,
) -> tuple[list[str], int]:
    """Fills `out` with a box of a parameter: (keys of tensors with NaN or infinite values, bytes read)."""
    parts, damaged, read = [], [], 0
    for tensor, part, view in _parts(source, box, out):
        if isinstance(tensor, PackedTensor):
            raw, not_finite = read_packed(tensor, part, view, files, threads)
            damaged += not_finite
            read += raw
        else:
            parts.append((tensor, part, view))
            read += view.size * READABLE_DTYPES[tensor.dtype].itemsize
    return damaged + read_boxes(parts, files, threads), read


def _parts(
    source: Source, box: Box, out: np.ndarray
) -> Iterator[tuple[StoredTensor | PackedTensor, Box, np.ndarray]]:
    """The tensors that a box of a parameter is in: (tensor, box within it, where that goes)."""
    for piece, tensor in source:
        # leading dimensions that the tensor lacks are the piece's own place in the parameter
        if piece.box[0].stop <= box[0].start or piece.box[0].start >= box[0].stop:
            continue
        extra = len(piece.origin) - len(piece.shape)
        common = tuple(
            slice(max(s.start, p.start), min(s.stop, p.stop)) for s, p in zip(box, piece.box, strict=True)
        )
        if any(s.start >= s.stop for s in common):
            continue
        begin = list(piece.origin)
        begin[extra] -= piece.first
        inside = tuple(slice(s.start - o, s.stop - o) for s, o in zip(common, begin, strict=True))
        place = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(common, box, strict=True))
        yield tensor, inside[extra:], out[place][(0,) * extra]

"""Boxes of stored tensors, read into memory: the one place where weights are read.

Boxes are cut into pieces that fit into a processor's caches, which several threads copy, convert and look
through for NaN at once. They are copied out of a map of the file, which out of the page cache takes half the
time of reading into fresh memory; its pages are given back at once, so that they do not stay resident beside
what they were copied to.
"""

import dataclasses
import itertools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from qwen_moe_jax.checkpoint.packing import PackedTensor
from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, StoredTensor, all_finite
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.kernels.cpu.build import copy_finite

Box = tuple[slice, ...]
# tensor, box of it, destination of the box's shape
Part = tuple[StoredTensor, Box, np.ndarray]

# Bytes of a piece, as stored: small enough for the caches, large enough that a call's cost vanishes.
_PIECE = 1 << 20
# Bytes that a thread takes at once.
_JOB = 1 << 23
# Dtypes that the C++ copy knows the infinities of.
_COPIED = tuple(READABLE_DTYPES[name] for name in ("F32", "BF16", "F8_E4M3"))
# Elements of a piece of a whole tensor.
_ELEMENTS = 1 << 18


class OpenFiles:
    """Files that are being read, each opened once; a context that closes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, OpenFile] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()  # unmapped with the last view of it

    def __getitem__(self, path: Path) -> "OpenFile":
        with self._lock:
            if path not in self._open:
                descriptor = os.open(path, os.O_RDONLY)
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                self._open[path] = OpenFile(descriptor, mapped, np.frombuffer(mapped, np.uint8))
            return self._open[path]


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A file and its map."""

    descriptor: int
    mapped: mmap.mmap
    content: np.ndarray

    def give_pages_back(self, begin: int, end: int) -> None:
        """What was looked at is not needed again."""
        begin -= begin % mmap.PAGESIZE
        self.mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def read_boxes(parts: Iterable[Part], files: OpenFiles, threads: Executor | None = None) -> list[str]:
    """Reads boxes of stored tensors, and nothing else of them, converting to their destination's dtype.

    Args:
        parts: tensors in one of `READABLE_DTYPES`; a slice with start and stop for each of their
            dimensions; the destination, of any strides, in a float dtype that goes with theirs, or for codes
            the same.
        files: that stay open from call to call.
        threads: that share the work; None means this one alone.

    Returns:
        Keys of tensors with elements that are not finite in their destination (a float32 value may overflow
        bfloat16).

    Raises:
        CheckpointError: a file has become shorter than its header says.
    """

    def work(job: list[tuple[Part, Box]]) -> list[str]:
        return _read_job(job, files)

    jobs = _jobs(parts)
    found = map(work, jobs) if threads is None else threads.map(work, list(jobs))
    return list(dict.fromkeys(key for keys in found for key in keys))


def read_box(tensor: StoredTensor, box: Box, out: np.ndarray) -> bool:
    """One box, as `read_boxes`: whether every element is finite."""
    with OpenFiles() as files:
        return not read_boxes([(tensor, box, out)], files)


def read_whole(tensor: StoredTensor, files: OpenFiles) -> np.ndarray:
    """A small tensor of any dtype that NumPy has."""
    out = np.empty(tensor.shape, READABLE_DTYPES[tensor.dtype])
    read_boxes([(tensor, tuple(slice(0, n) for n in tensor.shape), out)], files)
    return out


def read_packed(
    tensor: PackedTensor, box: Box, out: np.ndarray, files: OpenFiles, threads: Executor | None = None
) -> tuple[int, list[str]]:
    """Fills `out` with a box of an array that has to be unpacked: (bytes read, keys that are not finite)."""
    layout = tensor.layout
    assert layout.file_box is not None
    assert layout.unpack is not None
    place = layout.file_box(box)
    raw = np.empty(tuple(s.stop - s.start for s in place), READABLE_DTYPES[tensor.tensor.dtype])
    damaged = read_boxes([(tensor.tensor, place, raw)], files, threads)
    values = layout.unpack(raw, box)
    if tensor.divisor is not None:
        divisor = read_whole(tensor.divisor, files)
        if not np.isfinite(divisor).all() or (divisor == 0).any():
            damaged.append(tensor.divisor.key)
        values = values / divisor.reshape(())
    out[...] = values
    return raw.nbytes, damaged


def _jobs(parts: Iterable[Part]) -> Iterator[list[tuple[Part, Box]]]:
    """Pieces in lists of about _JOB bytes."""
    job: list[tuple[Part, Box]] = []
    room = _JOB
    for part in parts:
        itemsize = READABLE_DTYPES[part[0].dtype].itemsize
        for piece in _pieces(part[1], itemsize):
            job.append((part, piece))
            room -= prod(s.stop - s.start for s in piece) * itemsize
            if room <= 0:
                yield job
                job, room = [], _JOB
    if job:
        yield job


def _read_job(job: list[tuple[Part, Box]], files: OpenFiles) -> list[str]:
    damaged = []
    looked_at: dict[Path, tuple[int, int]] = {}

    def give_pages_back() -> None:
        for path, window in looked_at.items():
            files[path].give_pages_back(*window)
        looked_at.clear()

    for (tensor, box, out), piece in job:
        file = files[tensor.file]
        place = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(piece, box, strict=True))
        first, span = _extent(tensor, piece)
        window = tensor.offset + first, tensor.offset + first + span
        # a mapped page behind the end of a file cannot be read, so the end is looked at anew
        if tensor.file not in looked_at and os.fstat(file.descriptor).st_size < file.content.size:
            raise CheckpointError(f"{tensor.file} ended inside {tensor.key}: it changed while being read.")
        begin, end = looked_at.get(tensor.file, window)
        looked_at[tensor.file] = min(begin, window[0]), max(end, window[1])
        if not _copy(file.content[slice(*window)], tensor, out[place]):
            damaged.append(tensor.key)
        if sum(end - begin for begin, end in looked_at.values()) >= _PIECE:
            give_pages_back()
    give_pages_back()
    return damaged


def _extent(tensor: StoredTensor, box: Box) -> tuple[int, int]:
    """(byte of the first element within the tensor, bytes up to the end of the last one)."""
    stride = READABLE_DTYPES[tensor.dtype].itemsize
    first, last = 0, 0
    for s, size in zip(reversed(box), reversed(tensor.shape), strict=True):
        first += s.start * stride
        last += (s.stop - 1) * stride
        stride *= size
    return first, last + READABLE_DTYPES[tensor.dtype].itemsize - first


def _copy(content: np.ndarray, tensor: StoredTensor, target: np.ndarray) -> bool:
    """Elements out of bytes of a file, which begin with the first one: whether all are finite."""
    stored = READABLE_DTYPES[tensor.dtype]
    strides = [stored.itemsize * prod(tensor.shape[d + 1 :]) for d in range(target.ndim)]
    values = np.lib.stride_tricks.as_strided(content.view(stored), target.shape, strides, writeable=False)
    if stored == target.dtype:
        if stored in _COPIED and values.flags.c_contiguous and target.flags.c_contiguous:
            finite = copy_finite(target, values)
            if finite is not None:
                return finite
        # as plain integers: NumPy copies elements of other packages' dtypes one by one
        plain = np.dtype(f"u{stored.itemsize}")
        np.copyto(target.view(plain), values.view(plain))
    else:
        with np.errstate(over="ignore"):
            np.copyto(target, values, casting="unsafe")
    # The narrower of the two shows every infinity and NaN, and takes the least time to look at.
    narrow = values if stored.itemsize < target.dtype.itemsize else target
    return all_finite(np.ascontiguousarray(narrow))


def iter_float32(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """The tensor's values in order, as short float32 arrays."""
    flat = StoredTensor(
        tensor.file, tensor.key, tensor.dtype, (prod(tensor.shape),), tensor.offset, tensor.nbytes
    )
    for first in range(0, flat.shape[0], _ELEMENTS):
        piece = np.empty(min(_ELEMENTS, flat.shape[0] - first), np.float32)
        read_box(flat, (slice(first, first + piece.size),), piece)
        yield piece


def _pieces(box: Box, itemsize: int) -> Iterator[Box]:
    """The box in parts of at most _PIECE bytes, in the order of the file."""
    sizes = [s.stop - s.start for s in box]
    total = prod(sizes) * itemsize
    if 0 < total <= _PIECE:
        yield box
    if total <= _PIECE:
        return
    # dimensions in front of `cut` are taken one index at a time, `cut` in ranges, those behind it whole
    cut = next((d for d in range(len(sizes)) if prod(sizes[d + 1 :]) * itemsize <= _PIECE), 0)
    step = max(1, _PIECE // (prod(sizes[cut + 1 :]) * itemsize))
    for lead in itertools.product(*(range(s.start, s.stop) for s in box[:cut])):
        for start in range(box[cut].start, box[cut].stop, step):
            yield (
                *(slice(i, i + 1) for i in lead),
                slice(start, min(start + step, box[cut].stop)),
                *box[cut + 1 :],
            )

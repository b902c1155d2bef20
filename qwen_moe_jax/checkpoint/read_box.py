"""Boxes of stored tensors, read into memory: the one place where weights are read.

Boxes are cut into pieces that fit into a processor's caches, which several threads read, convert and look
through for NaN at once. What lies together in the file is read straight to where it belongs. Where a box has
only a short run of each row, the runs are copied out of a map of the file, whose pages are given back at
once, so that they do not stay resident beside what they were copied to.
"""

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

from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, StoredTensor, all_finite
from qwen_moe_jax.errors import CheckpointError

Box = tuple[slice, ...]
# tensor, box of it, destination of the box's shape
Part = tuple[StoredTensor, Box, np.ndarray]

# Bytes of a piece, as stored: small enough for the caches, large enough that a call's cost vanishes.
_PIECE = 1 << 20
# Bytes that a thread takes at once.
_JOB = 1 << 23
# A run shorter than this is copied out of the map.
_SHORT_RUN = 1 << 14
# Elements of a piece of a whole tensor.
_ELEMENTS = 1 << 18


class OpenFiles:
    """Files that are being read, each opened once; a context that closes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, tuple[mmap.mmap, np.ndarray]] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maps.clear()  # unmapped with the last view of it
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, file: Path) -> int:
        """To read from."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def map(self, file: Path) -> tuple[mmap.mmap, np.ndarray]:
        """A map of the file, and its bytes."""
        descriptor = self.descriptor(file)
        with self._lock:
            if file not in self._maps:
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                self._maps[file] = mapped, np.frombuffer(mapped, np.uint8)
            return self._maps[file]


def read_boxes(parts: Iterable[Part], files: OpenFiles, threads: Executor | None = None) -> list[str]:
    """Reads boxes of stored tensors, and nothing else of them, converting to their destination's dtype.

    Args:
        parts: tensors in float32, bfloat16 or float8_e4m3fn; a slice with start and stop for each of their
            dimensions; the destination, of any strides, in float32 or bfloat16, or for float8 the same.
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
    touched: dict[Path, tuple[int, int]] = {}
    for (tensor, box, out), piece in job:
        finite, window = _read_piece(files, tensor, box, piece, out)
        if not finite:
            damaged.append(tensor.key)
        if window is not None:
            begin, end = touched.get(tensor.file, window)
            touched[tensor.file] = min(begin, window[0]), max(end, window[1])
    for file, (begin, end) in touched.items():
        begin -= begin % mmap.PAGESIZE
        files.map(file)[0].madvise(mmap.MADV_DONTNEED, begin, end - begin)
    return damaged


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


def _read_piece(
    files: OpenFiles, tensor: StoredTensor, box: Box, piece: Box, out: np.ndarray
) -> tuple[bool, tuple[int, int] | None]:
    """Reads a piece of a box: (whether it is finite, bytes of the file's map that were looked at)."""
    target = out[tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(piece, box, strict=True))]
    stored = READABLE_DTYPES[tensor.dtype]
    if stored == target.dtype and target.flags.c_contiguous:
        values = target
    else:
        values = np.empty(target.shape, stored)
    first, run, span = _extent(tensor, piece)
    window = None
    if run == span:
        _fill(files, values.reshape(-1).view(np.uint8), tensor, first * stored.itemsize)
    elif run * stored.itemsize >= _SHORT_RUN:
        for start, part in _runs(tensor, piece, values, run):
            _fill(files, part.view(np.uint8), tensor, start * stored.itemsize)
    else:
        begin = tensor.offset + first * stored.itemsize
        window = begin, begin + span * stored.itemsize
        _copy_out_of_map(files, tensor, values, window)
    if values is not target:
        with np.errstate(over="ignore"):
            np.copyto(target, values, casting="unsafe")
    # The narrower of the two shows every infinity and NaN, and takes the least time to look at.
    narrow = values if stored.itemsize <= target.dtype.itemsize else target
    return all_finite(np.ascontiguousarray(narrow)), window


def _extent(tensor: StoredTensor, box: Box) -> tuple[int, int, int]:
    """(flat index of the first element, elements that lie together from it on, elements up to the last)."""
    strides = [prod(tensor.shape[d + 1 :]) for d in range(len(box))]
    first = sum(s.start * stride for s, stride in zip(box, strides, strict=True))
    last = sum((s.stop - 1) * stride for s, stride in zip(box, strides, strict=True))
    divided = max((d for d, s in enumerate(box) if s.stop - s.start < tensor.shape[d]), default=0)
    run = prod(s.stop - s.start for s in box[divided:])
    return first, run, last + 1 - first


def _runs(tensor: StoredTensor, box: Box, values: np.ndarray, run: int) -> Iterator[tuple[int, np.ndarray]]:
    """(flat index in the tensor, where it goes) of each run of a box."""
    flat = values.reshape(-1)
    divided = next(d for d in range(len(box)) if prod(s.stop - s.start for s in box[d:]) == run)
    strides = [prod(tensor.shape[d + 1 :]) for d in range(len(box))]
    inside = sum(s.start * stride for s, stride in zip(box[divided:], strides[divided:], strict=True))
    for number, lead in enumerate(itertools.product(*(range(s.start, s.stop) for s in box[:divided]))):
        start = sum(i * stride for i, stride in zip(lead, strides, strict=False)) + inside
        yield start, flat[number * run : (number + 1) * run]


def _copy_out_of_map(
    files: OpenFiles, tensor: StoredTensor, values: np.ndarray, window: tuple[int, int]
) -> None:
    begin, end = window
    # a mapped page behind the end of a file cannot be read, so the end is looked at anew
    if os.fstat(files.descriptor(tensor.file)).st_size < end:
        raise _ended(tensor)
    flat = files.map(tensor.file)[1][begin:end].view(values.dtype)
    strides = [prod(tensor.shape[d + 1 :]) * values.itemsize for d in range(values.ndim)]
    np.copyto(values, np.lib.stride_tricks.as_strided(flat, values.shape, strides, writeable=False))


def _fill(files: OpenFiles, buffer: np.ndarray, tensor: StoredTensor, offset: int) -> None:
    descriptor = files.descriptor(tensor.file)
    view, place = memoryview(buffer.data), tensor.offset + offset
    while view:
        count = os.preadv(descriptor, [view], place)
        if not count:
            raise _ended(tensor)
        view, place = view[count:], place + count


def _ended(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file} ended inside {tensor.key}: it changed while being read.")

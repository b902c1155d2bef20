"""Boxes of stored tensors, read into memory: the one place where weights are read.

A box is cut into pieces that fit into a processor's caches, which several threads read, convert and look
through for NaN at once. What lies together in the file is read straight to where it belongs. Where a box has
only a short run of each row, a window of the file is mapped and the runs copied out of it; the window is
closed at once, so that its pages do not stay resident beside what they were copied to.
"""

import itertools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from math import prod

import numpy as np

from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, StoredTensor, all_finite
from qwen_moe_jax.errors import CheckpointError

Box = tuple[slice, ...]

# Bytes of a piece, as stored: small enough for the caches, large enough that a call's cost vanishes.
_PIECE = 1 << 20
# Pieces that a thread takes at once.
_JOB = 8
# A run shorter than this is copied out of a mapped window.
_SHORT_RUN = 1 << 14
# Elements of a piece of a whole tensor.
_ELEMENTS = 1 << 18


def read_box(tensor: StoredTensor, box: Box, out: np.ndarray, threads: Executor | None = None) -> bool:
    """Reads a box of a stored tensor, and nothing else of it, converting to `out`'s dtype on the way.

    Args:
        tensor: float32, bfloat16 or float8_e4m3fn.
        box: a slice with start and stop for each of its dimensions.
        out: of the box's shape and any strides; float32 or bfloat16, or for float8 the same.
        threads: that share the work; None means this one alone.

    Returns:
        Whether every element is finite in `out` (a float32 value may overflow bfloat16).

    Raises:
        CheckpointError: the file has become shorter than its header says.
    """
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:

        def work(pieces: list[Box]) -> bool:
            return all([_read_piece(descriptor, tensor, box, piece, out) for piece in pieces])

        pieces = list(_pieces(box, READABLE_DTYPES[tensor.dtype].itemsize))
        jobs = [pieces[first : first + _JOB] for first in range(0, len(pieces), _JOB)]
        if threads is None or len(jobs) == 1:
            return all([work(job) for job in jobs])
        return all(list(threads.map(work, jobs)))
    finally:
        os.close(descriptor)


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
    if not prod(sizes):
        return
    # dimensions in front of `cut` are taken one index at a time, `cut` in ranges, those behind it whole
    cut = next((d for d in range(len(sizes)) if prod(sizes[d + 1 :]) * itemsize <= _PIECE), 0)
    if not box:
        yield ()
        return
    step = max(1, _PIECE // (prod(sizes[cut + 1 :]) * itemsize))
    for lead in itertools.product(*(range(s.start, s.stop) for s in box[:cut])):
        for start in range(box[cut].start, box[cut].stop, step):
            yield (
                *(slice(i, i + 1) for i in lead),
                slice(start, min(start + step, box[cut].stop)),
                *box[cut + 1 :],
            )


def _read_piece(descriptor: int, tensor: StoredTensor, box: Box, piece: Box, out: np.ndarray) -> bool:
    target = out[tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(piece, box, strict=True))]
    stored = READABLE_DTYPES[tensor.dtype]
    if stored == target.dtype and target.flags.c_contiguous:
        values = target
    else:
        values = np.empty(target.shape, stored)
    first, run, span = _extent(tensor, piece)
    if run == span:
        _fill(descriptor, values.reshape(-1).view(np.uint8), tensor, first * stored.itemsize)
    elif run * stored.itemsize >= _SHORT_RUN:
        for start, part in _runs(tensor, piece, values, run):
            _fill(descriptor, part.view(np.uint8), tensor, start * stored.itemsize)
    else:
        _copy_out_of_window(descriptor, tensor, piece, values, first, span)
    if values is not target:
        with np.errstate(over="ignore"):
            np.copyto(target, values, casting="unsafe")
    # The narrower of the two shows every infinity and NaN, and takes the least time to look at.
    narrow = values if stored.itemsize <= target.dtype.itemsize else target
    return all_finite(np.ascontiguousarray(narrow))


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


def _copy_out_of_window(
    descriptor: int, tensor: StoredTensor, box: Box, values: np.ndarray, first: int, span: int
) -> None:
    itemsize = values.dtype.itemsize
    begin = tensor.offset + first * itemsize
    aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
    length = begin - aligned + span * itemsize
    # a mapped page behind the end of a file cannot be read, so the end is looked at anew
    if os.fstat(descriptor).st_size < aligned + length:
        raise _ended(tensor)
    window = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=aligned)
    try:
        flat = np.frombuffer(window, values.dtype, span, begin - aligned)
        strides = [prod(tensor.shape[d + 1 :]) * itemsize for d in range(len(box))]
        np.copyto(values, np.lib.stride_tricks.as_strided(flat, values.shape, strides, writeable=False))
        del flat
    finally:
        window.close()


def _fill(descriptor: int, buffer: np.ndarray, tensor: StoredTensor, offset: int) -> None:
    view, place = memoryview(buffer.data), tensor.offset + offset
    while view:
        count = os.preadv(descriptor, [view], place)
        if not count:
            raise _ended(tensor)
        view, place = view[count:], place + count


def _ended(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file} ended inside {tensor.key}: it changed while being read.")

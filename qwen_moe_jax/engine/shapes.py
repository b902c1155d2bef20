"""Buckets: every compiled shape comes from a short list, so that the number of compilations is bounded.

The engine's steps have one of the shapes of `prefill_shapes` and `row_buckets`. Where logits of whole
sequences are wanted, n tokens are whole chunks of `chunk_length` and a tail padded up to a bucket, or cut
into two where padding would be most of it; caches come in capacities two to an octave (64, 96, 128, ...).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_moe_jax.kernels.table import Kernels

# Longest prefill chunk of one row, and rows x chunk, which bounds the activations of a chunk. A chunk waits
# for every expert's matrices to be read, unless it has thousands of tokens; XLA's products on a CPU are so
# slow that it never does.
CPU_CHUNK, CPU_CHUNK_BATCH = 512, 4096
NATIVE_CHUNK, NATIVE_CHUNK_BATCH = 2048, 8192
GPU_CHUNK, GPU_CHUNK_BATCH = 4096, 8192
SMALLEST_CHUNK = 16
# Up to this many tokens, another chunk costs more than padding.
_PADDED = 512
SMALLEST_CAPACITY = 64


# Numbers of rows that an engine's decode programs have, at most: of greedy rows, of rows that draw or have
# penalties, and of guided ones, whose steps are two programs. With prefill's and three others, 24.
_MOST_BUCKETS = {"greedy": 5, "sampled": 3, "guided": 3}
DECODE_KINDS = tuple(_MOST_BUCKETS)


def row_buckets(slots: int, kind: str = "greedy") -> tuple[int, ...]:
    """Numbers of rows that decode steps of a kind are compiled for: powers of two up to `slots`, thinned out
    where there would be too many."""
    buckets, most = [slots], _MOST_BUCKETS[kind]
    while buckets[0] > 1:
        buckets.insert(0, 1 << (buckets[0] - 1).bit_length() - 1)
    if len(buckets) > most:
        places = np.linspace(0, len(buckets) - 1, most).round().astype(int)
        buckets = [buckets[place] for place in places]
    return tuple(buckets)


@dataclasses.dataclass(frozen=True)
class PrefillShapes:
    """What prefill steps may look like.

    Attributes:
        shapes: (rows a data rank, tokens a row).
        overhead: tokens that a step costs beside its own, since it reads every matrix once.
        while_decoding: most tokens a data rank of a step that rows which decode wait for.
    """

    shapes: tuple[tuple[int, int], ...]
    overhead: int
    while_decoding: int


def prefill_shapes(slots: int, kernels: Kernels) -> PrefillShapes:
    """Of a target. A CPU computes a token in about as long whoever else is in its chunk (measured,
    `benchmarks/README.md`), so that chunks are of one row and waste little on pads; a GPU waits for the
    matrices of all experts, which many tokens share.

    Args:
        slots: rows that there are at most.
        kernels: what programs are compiled for, and with.
    """
    longest = chunk_length(1, kernels)
    if kernels.target == "cpu":
        chunks = (16, 32, 64, 128, 256, 512, longest)
        shapes: list[tuple[int, int]] = [(1, chunk) for chunk in chunks]
        return PrefillShapes(tuple(dict.fromkeys(shapes)), overhead=32, while_decoding=512)
    shapes = [(1, 64), (1, 256), (1, 1024), (1, longest), (4, 256), (4, 1024), (16, 256)]
    fitting = tuple(shape for shape in shapes if shape[0] <= slots)
    return PrefillShapes(fitting, overhead=1024, while_decoding=longest)


def right_pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most `length` ids (empty ones too) -> (ids int32, valid bool), each [batch, length]."""
    ids = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        valid[index, : len(row)] = True
    return ids, valid


def sequence_chunks(
    rows: Sequence[np.ndarray], kernels: Kernels
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Whole sequences, chunk by chunk: (start, ids and which are valid as of `right_pad`) of each.

    Args:
        rows: int32 ids, empty rows too; as many as are computed together.
        kernels: what programs are compiled for, and with.
    """
    for start, length in chunk_spans(max(map(len, rows)), chunk_length(len(rows), kernels)):
        yield start, *right_pad([row[start : start + length] for row in rows], length)


def chunk_length(batch: int, kernels: Kernels) -> int:
    """Tokens a row in one prefill chunk: a power of two, fewer for larger batches.

    Args:
        batch: rows.
        kernels: what programs are compiled for, and with.
    """
    length, most = GPU_CHUNK, GPU_CHUNK_BATCH
    if kernels.target == "cpu":
        length, most = (NATIVE_CHUNK, NATIVE_CHUNK_BATCH) if kernels.native else (CPU_CHUNK, CPU_CHUNK_BATCH)
    while length > SMALLEST_CHUNK and length * batch > most:
        length //= 2
    return length


def tail_bucket(tokens: int, chunk: int) -> int:
    """The padded length of the last chunk: the smallest power-of-two bucket that holds `tokens`."""
    bucket = SMALLEST_CHUNK
    while bucket < tokens:
        bucket *= 2
    return min(bucket, chunk)


def chunk_spans(longest: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(start, padded length) of each chunk of a batch whose longest row has `longest` tokens."""
    start = 0
    while start < longest:
        rest = longest - start
        bucket = tail_bucket(rest, chunk)
        if bucket > _PADDED and rest <= bucket // 4 * 3:
            bucket //= 2  # full; what is left follows
        yield start, bucket
        start += bucket


def cache_capacity(tokens: int) -> int:
    """The cache bucket that holds `tokens` positions: at most half as much again."""
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        if capacity + capacity // 2 >= tokens:
            return capacity + capacity // 2
        capacity *= 2
    return capacity

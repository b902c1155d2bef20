"""Buckets: every compiled shape comes from a short list, so that the number of compilations is bounded.

A prompt of n tokens is prefilled as whole chunks of `chunk_length` and one tail padded up to a bucket;
caches come in capacities two to an octave (64, 96, 128, 192, ...).
"""

from collections.abc import Iterator

# Longest prefill chunk of one row, and rows x chunk, which bounds the activations of a chunk. On a GPU a
# chunk waits for every expert's matrices to be read, unless it has thousands of tokens.
CPU_CHUNK, CPU_CHUNK_BATCH = 512, 4096
GPU_CHUNK, GPU_CHUNK_BATCH = 4096, 8192
SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 64


def chunk_length(batch: int, target: str = "cpu") -> int:
    """Tokens a row in one prefill chunk: a power of two, fewer for larger batches.

    Args:
        batch: rows.
        target: what programs are compiled for.
    """
    length, most = (CPU_CHUNK, CPU_CHUNK_BATCH) if target == "cpu" else (GPU_CHUNK, GPU_CHUNK_BATCH)
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
    for start in range(0, longest, chunk):
        yield start, tail_bucket(longest - start, chunk)


def cache_capacity(tokens: int) -> int:
    """The cache bucket that holds `tokens` positions: at most half as much again."""
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        if capacity + capacity // 2 >= tokens:
            return capacity + capacity // 2
        capacity *= 2
    return capacity

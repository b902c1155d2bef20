"""Reads a Hugging Face checkpoint into the parameters a model expects, strictly."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import (
    Piece,
    canonical_name,
    expert_pieces,
    hf_key,
    is_matrix,
    skipped_family,
)
from qwen_moe_jax.checkpoint.safetensors_files import (
    READABLE_DTYPES,
    StoredTensor,
    abbreviate,
    iter_float32,
    read_elements,
    stored_tensors,
)
from qwen_moe_jax.errors import CheckpointError

# XLA:CPU takes over host memory without a copy if it is aligned to this many bytes.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What reading found besides the parameters.

    Attributes:
        file_bytes: bytes of the parameters in the files.
        skipped: families of tensors that text generation does not use ("model.visual", "mtp") -> tensors.
        rounded: parameters of float32 files that are held in bfloat16.
    """

    file_bytes: int
    skipped: dict[str, int]
    rounded: tuple[str, ...]


# A parameter's tensors in the files, with the place of each in the parameter.
Source = list[tuple[Piece, StoredTensor]]


@dataclasses.dataclass(frozen=True)
class Match:
    """Which tensors of a checkpoint make up the parameters.

    Attributes:
        sources: canonical name -> its tensors.
        skipped: as in `ReadReport`.
        tied_head: an `lm_head` that is stored although the configuration ties it to the embedding.
    """

    sources: dict[str, Source]
    skipped: dict[str, int]
    tied_head: StoredTensor | None


def read_parameters(
    folder: str | Path, expected: Mapping[str, jax.ShapeDtypeStruct], *, progress: bool = False
) -> tuple[dict[str, jax.Array], ReadReport]:
    """Reads every expected parameter, one at a time, and places it where its sharding says.

    bfloat16 held as float32 is exact; float32 held as bfloat16 is rounded to nearest even and reported.
    Both prefixes and both layouts of experts are read (see `layout`). A tied checkpoint may hold an `lm_head`
    equal to its embedding.

    Args:
        folder: with `model.safetensors`, or shards and their index.
        expected: canonical name -> shape, held dtype (float32 or bfloat16), and a sharding or None for the
            default device.
        progress: show a progress bar on standard error.

    Returns:
        (canonical name -> array, in the order of `expected`; what else was found).

    Raises:
        CheckpointNotFoundError: the folder or a file is missing.
        CheckpointError: a file is damaged, or keys, shapes, dtypes or values do not fit (all are named).
    """
    shapes = {name: tuple(struct.shape) for name, struct in expected.items()}
    match = match_tensors(folder, stored_tensors(folder), shapes)
    sources = match.sources
    if match.tied_head is not None and not _equal(match.tied_head, sources["embed_tokens.weight"][0][1]):
        raise CheckpointError(
            f"{folder} holds an lm_head.weight that differs from the embedding, to which config.json ties it "
            "(tie_word_embeddings is true)."
        )
    read: dict[str, jax.Array] = {}
    damaged: list[str] = []
    total = sum(tensor.nbytes for source in sources.values() for _, tensor in source)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for name in sorted(expected, key=lambda name: _position(sources[name])):
            host, not_finite = _assemble(expected[name], sources[name])
            damaged += not_finite
            read[name] = _place(host, expected[name])
            bar.update(sum(tensor.nbytes for _, tensor in sources[name]))
    if damaged:
        raise CheckpointError(
            f"{folder} holds NaN or infinite values in {abbreviate(damaged)}; the weights are damaged."
        )
    report = ReadReport(
        file_bytes=total,
        skipped=match.skipped,
        rounded=tuple(
            name
            for name, struct in expected.items()
            if any(READABLE_DTYPES[t.dtype].itemsize > struct.dtype.itemsize for _, t in sources[name])
        ),
    )
    return {name: read[name] for name in expected}, report


def checkpoint_dtype(folder: str | Path) -> str:
    """The dtype that most of the matrices' bytes are stored in, "float32" or "bfloat16"; headers only.

    Raises:
        CheckpointError: as `stored_tensors`; or it is another dtype, or there are no matrices.
    """
    weight: Counter[str] = Counter()
    for key, tensor in stored_tensors(folder).items():
        name = canonical_name(key)
        if name is not None and is_matrix(name):
            weight[tensor.dtype] += tensor.nbytes
    if not weight:
        raise CheckpointError(
            f"{folder} holds no text model; expected keys such as {hf_key('embed_tokens.weight')}."
        )
    dtype = weight.most_common(1)[0][0]
    if dtype not in READABLE_DTYPES:
        raise CheckpointError(f"{folder} is stored in {dtype}; only F32 and BF16 weights can be loaded.")
    return READABLE_DTYPES[dtype].name


def match_tensors(
    folder: str | Path, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> Match:
    """Finds each parameter's tensors, looking at headers only.

    Args:
        folder: named in errors.
        tensors: of the folder, as of `stored_tensors`.
        shapes: canonical name -> shape of every expected parameter.

    Raises:
        CheckpointError: names everything that does not fit at once.
    """
    skipped: Counter[str] = Counter()
    by_name: dict[str, StoredTensor] = {}
    unexpected, twice = [], []
    for key, tensor in tensors.items():
        family, name = skipped_family(key), canonical_name(key)
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
    for name, shape in shapes.items():
        sources[name] = []
        for piece in _pieces(name, shape, by_name):
            tensor = unused.pop(piece.name, None)
            if tensor is None:
                missing.append(hf_key(piece.name))
                continue
            if tensor.shape != piece.shape:
                misshapen.append(f"{tensor.key} is {list(tensor.shape)} instead of {list(piece.shape)}")
            if tensor.dtype not in READABLE_DTYPES:
                unreadable.append(f"{tensor.key} is {tensor.dtype}")
            sources[name].append((piece, tensor))
    tied_head = unused.pop("lm_head.weight", None) if "embed_tokens.weight" in shapes else None
    unexpected += [tensor.key for tensor in unused.values()]

    problems = [
        f"{what}: {abbreviate(found)}"
        for what, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("keys under both prefixes", twice),
            ("wrong shapes", misshapen),
            ("dtypes other than F32 and BF16", unreadable),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(problems)}.")
    return Match(sources, dict(skipped), tied_head)


def _pieces(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> list[Piece]:
    """The tensors that make up a parameter: itself or, where the file says so, one matrix an expert."""
    split = expert_pieces(name, shape)
    if name not in stored and any(piece.name in stored for piece in split):
        return split
    return [Piece(name, shape, 0)]


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or a.dtype not in READABLE_DTYPES:
        return False
    return all(np.array_equal(x, y) for x, y in zip(iter_float32(a), iter_float32(b), strict=True))


def _position(source: Source) -> tuple[str, int]:
    first = source[0][1]
    return str(first.file), first.offset


def _assemble(struct: jax.ShapeDtypeStruct, source: Source) -> tuple[np.ndarray, list[str]]:
    """The parameter on the host, and the keys of tensors with NaN or infinite values."""
    host = _aligned_empty(struct.shape, np.dtype(struct.dtype))
    flat = host.reshape(-1)
    damaged = [
        tensor.key
        for piece, tensor in source
        if not read_elements(tensor, 0, flat[piece.start : piece.start + prod(piece.shape)])
    ]
    return host, damaged


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = prod(shape) * dtype.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def _place(host: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
    # On CPU the array takes over the host memory; elsewhere waiting keeps one host copy alive at a time.
    return jax.device_put(host, struct.sharding).block_until_ready()

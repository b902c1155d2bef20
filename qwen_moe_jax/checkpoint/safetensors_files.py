"""Safetensors files as they lie on disk: headers and indices.

A file is an 8-byte little-endian header length, a JSON header (tensor -> dtype, shape, byte range) and the
tensors' bytes, which `read_box.py` reads.
"""

import dataclasses
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What this library reads; other dtypes of the format are recognised to be named.
READABLE_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# The format's own limit of a header, so that a garbled length does not fill the memory.
_LARGEST_HEADER = 100_000_000

# What other formats of weights begin with.
_FOREIGN = {
    b"\x80": "a Python pickle (as torch.save writes), which can run any code when it is opened",
    b"PK\x03\x04": "a zip archive (as torch.save writes), whose pickle can run any code when it is opened",
    b"GGUF": "a GGUF file (llama.cpp)",
}

# dtype -> unsigned integers of its width, their bits but the sign, and the least of these that is not finite
_NOT_FINITE: dict[np.dtype, tuple[Any, int, int]] = {
    READABLE_DTYPES["F32"]: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    READABLE_DTYPES["BF16"]: (np.uint16, 0x7FFF, 0x7F80),
    READABLE_DTYPES["F16"]: (np.uint16, 0x7FFF, 0x7C00),
    READABLE_DTYPES["F8_E4M3"]: (np.uint8, 0x7F, 0x7F),
    READABLE_DTYPES["F8_E8M0"]: (np.uint8, 0xFF, 0xFF),
}

# Elements converted at once: small enough for the caches, large enough that a read's cost vanishes.
_PIECE = 1 << 18


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        key: its name there.
        dtype: as the format spells it ("F32", "BF16", ...).
        shape: in elements.
        offset: of its first byte in the file.
        nbytes: its length in the file.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder: one `model.safetensors`, or shards named by an index.

    Only headers are read. All damaged files are named at once.

    Raises:
        CheckpointNotFoundError: no such folder, or no safetensors files inside.
        CheckpointError: a missing or damaged file, or an index that does not fit its shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder} does not exist; expected a checkpoint folder.")
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.is_file():
        return _indexed_tensors(folder, _weight_map(index))
    if single.is_file():
        return read_header(single)
    loose = sorted(file.name for file in folder.glob("*.safetensors"))
    if loose:
        raise CheckpointNotFoundError(
            f"{folder} holds {abbreviate(loose)} but neither {SINGLE_FILE} nor {INDEX_FILE}, "
            "which says what the shards hold; copy the index as well."
        )
    foreign = sorted(f.name for end in (".bin", ".pt", ".pth", ".gguf") for f in folder.glob(f"*{end}"))
    instead = f", only {abbreviate(foreign)}, which are not read" if foreign else ""
    raise CheckpointNotFoundError(
        f"{folder} holds no weights{instead}; expected {SINGLE_FILE} or {INDEX_FILE}."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        names = set(weight_map.values())
    except _Twice as error:
        raise CheckpointError(f"{index} is damaged: it names {error} twice; copy it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{index} is damaged: expected a JSON object with a weight_map of keys to shard files."
        ) from None
    strange = sorted(key for key in weight_map if not _plain_key(key))
    if strange:
        raise CheckpointError(f"{index} is damaged: it names {abbreviate(strange)}; copy it again.")
    outside = sorted(str(n) for n in names if not _plain_name(n))
    if outside:
        raise CheckpointError(f"{index} names {abbreviate(outside)}; expected files in the same folder.")
    return weight_map


def _plain_name(name: Any) -> bool:
    """Whether it names a file in the same folder, on any system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode(errors="replace")) <= 255
        and name not in (".", "..")
        and not any(mark in name for mark in "/\\:")
    )


def _plain_key(key: str) -> bool:
    return key.isprintable() and 0 < len(key) <= 1000


class _Twice(ValueError):
    """A key that a JSON object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, whose keys must differ: Python would keep the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Twice(shown(next(key for key, count in counts.items() if count > 1)))
    return found


def shown(text: Any) -> str:
    """Text from a file as part of a message: short, in printable characters."""
    plain = str(text)
    if not plain.isprintable():
        plain = plain.encode("unicode_escape").decode()
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


def _indexed_tensors(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    shards = sorted(set(weight_map.values()))
    problems, headers = [], {}
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in shards:
        problems.append(f"{folder} holds both {SINGLE_FILE} and an index of other files; remove one of them.")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        problems.append(f"{folder} lacks {abbreviate(missing)}, which {INDEX_FILE} names; copy it again.")
    for name in shards:
        if name not in missing:
            try:
                headers[name] = read_header(folder / name)
            except CheckpointError as error:
                problems.append(str(error))
    for name, header in headers.items():
        listed = {key for key, shard in weight_map.items() if shard == name}
        if listed - header.keys():
            problems.append(
                f"{folder / name} lacks {abbreviate(sorted(listed - header.keys()))}, which {INDEX_FILE} "
                "places there."
            )
        if header.keys() - listed:
            problems.append(
                f"{folder / name} holds {abbreviate(sorted(header.keys() - listed))}, which {INDEX_FILE} "
                "does not place there."
            )
    if problems:
        raise (CheckpointNotFoundError if missing else CheckpointError)(" ".join(problems))
    return {key: headers[shard][key] for key, shard in weight_map.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: not such a file, or truncated.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(32)).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull`.")
        stream.seek(8)
        length = int.from_bytes(start, "little")
        foreign = next((name for mark, name in _FOREIGN.items() if start.startswith(mark)), None)
        if foreign and length > _LARGEST_HEADER:
            raise CheckpointError(f"{file} is {foreign}, not a safetensors file; convert it to one.")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file: it has {size} bytes and its header would "
                f"have {length}; copy it again."
            )
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {key: _entry(file, key, value, 8 + length) for key, value in header.items()}
    except _Twice as error:
        raise CheckpointError(f"{file} holds {error} twice in its header; copy it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = shown(error.args[0]) if error.args else type(error).__name__
        raise CheckpointError(f"{file} has a garbled safetensors header ({detail}); copy it again.") from None
    _check_extent(file, size, 8 + length, tensors)
    return tensors


def _entry(file: Path, key: str, value: dict[str, Any], data: int) -> StoredTensor:
    if not _plain_key(key):
        raise ValueError(f"a tensor is named {shown(key)!r}")
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"{key} has the unknown dtype {dtype!r}")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)) or len(shape) > 32:
        raise ValueError(f"{key} has shape {shown(list(shape))} and bytes {begin} to {end}")
    if 8 * (end - begin) != prod(shape) * _BITS[dtype]:
        raise ValueError(f"{key} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes")
    return StoredTensor(file, key, dtype, shape, data + begin, end - begin)


def _check_extent(file: Path, size: int, data: int, tensors: dict[str, StoredTensor]) -> None:
    end = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file} has a garbled safetensors header ({tensor.key} begins at byte {tensor.offset} "
                f"instead of {end}); copy it again."
            )
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(
            f"{file} is truncated: its header describes {end} bytes and it has {size}; copy it again."
        )
    if size > end:
        raise CheckpointError(
            f"{file} has {size - end} bytes more than the {end} its header describes; copy it again."
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether contiguous values hold no NaN and no infinity, without a float copy.

    Those are the bit patterns whose exponent bits are all ones; in float8_e4m3fn and float8_e8m0fnu, which
    have no infinity, all bits but the sign. Integers are finite.
    """
    if values.dtype not in _NOT_FINITE:
        return True
    unsigned, magnitude, infinity = _NOT_FINITE[values.dtype]
    bits = values.reshape(-1).view(unsigned)
    return all(
        (bits[first : first + _PIECE] & magnitude).max() < infinity for first in range(0, bits.size, _PIECE)
    )


def abbreviate(items: list[str], limit: int = 10) -> str:
    """The items, comma-separated; long lists end in "and N more"."""
    first = ", ".join(map(shown, items[:limit]))
    return first if len(items) <= limit else f"{first} and {len(items) - limit} more"

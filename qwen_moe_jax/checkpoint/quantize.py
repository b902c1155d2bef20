"""From a float checkpoint to one in FP8, file to file, in the layout of the published FP8 models.

Matrices of the layers, those of multi-token prediction included, become float8_e4m3fn with block scales, one
tensor an expert; routers, gates, the two small projections of Gated DeltaNet, embedding, lm_head and what is
no matrix stay as they are.
One matrix is in memory at a time.
"""

import dataclasses
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.block_scales import E4M3, quantize, scale_shape
from qwen_moe_jax.checkpoint.layout import (
    PART_PREFIXES,
    expert_pieces,
    hf_key,
    is_block_scaled,
    is_matrix,
    whole_piece,
)
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
from qwen_moe_jax.checkpoint.parts import whole_source
from qwen_moe_jax.checkpoint.read_box import OpenFiles
from qwen_moe_jax.checkpoint.reader import Source, read_source, source_dtype
from qwen_moe_jax.checkpoint.safetensors_files import abbreviate
from qwen_moe_jax.checkpoint.targets import Box
from qwen_moe_jax.checkpoint.writer import (
    Entry,
    encode_header,
    entries_bytes,
    into_shards,
    require_new_folder,
    shard_names,
    write_index,
    write_side_files,
)
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, InputError

SCALE_DTYPES = {"bfloat16": np.dtype(jnp.bfloat16), "float32": np.dtype(np.float32)}

# Rows of an unquantised tensor copied at once.
_COPY_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What was written.

    Attributes:
        source_bytes: of the parameters that were read.
        written_bytes: of the tensors that were written.
        skipped: families of tensors that text generation does not use, and that were left out -> tensors.
    """

    source_bytes: int
    written_bytes: int
    skipped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Output:
    """A tensor to be written: a box of a parameter, as it is or as values and scales behind each other."""

    key: str
    name: str
    box: Box
    shape: tuple[int, ...]
    dtype: np.dtype
    scaled: bool

    def entries(self, scale_dtype: np.dtype) -> list[Entry]:
        """What it becomes in the file; values and scales stay together."""
        if not self.scaled:
            return [(self.key, self.dtype, self.shape)]
        scales = scale_shape((self.shape[0], self.shape[1]))
        return [(self.key, E4M3, self.shape), (f"{self.key}_scale_inv", scale_dtype, scales)]


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    scale_dtype: str = "bfloat16",
    max_shard_bytes: int = 4 << 30,
    progress: bool = False,
) -> QuantizeReport:
    """Writes an FP8 checkpoint; the last file to appear is config.json, without which it is none.

    Args:
        source: a float32 or bfloat16 checkpoint in Hugging Face layout.
        destination: a new or empty folder.
        scale_dtype: "bfloat16", as published, or "float32".
        max_shard_bytes: of a file; a tensor that is larger gets one of its own.
        progress: show a bar on standard error.

    Raises:
        InputError: the destination is not empty, or another dtype of scales.
        CheckpointError: the source is damaged, in Orbax layout, or does not fit its configuration.
    """
    source, destination = Path(source), Path(destination)
    if scale_dtype not in SCALE_DTYPES:
        raise InputError(f"scale_dtype is {scale_dtype!r}; expected one of {', '.join(SCALE_DTYPES)}.")
    require_new_folder(destination)
    config = ModelConfig.from_file(source)
    if is_orbax(source):
        raise CheckpointError(f"{source} is in Orbax layout; give the Hugging Face checkpoint it is from.")
    if config.float8:
        raise CheckpointError(f"{source} is in FP8 already; give a float32 or bfloat16 checkpoint.")
    whole = whole_source(source, config)
    sources = whole.sources
    scales = SCALE_DTYPES[scale_dtype]
    outputs = [out for name, shape in whole.shapes.items() for out in _outputs(name, shape, sources[name])]
    parts = into_shards(outputs, lambda out: entries_bytes(out.entries(scales)), max_shard_bytes)
    shards = dict(zip(shard_names(len(parts)), parts, strict=True))
    entries = {file: [e for out in members for e in out.entries(scales)] for file, members in shards.items()}
    destination.mkdir(parents=True, exist_ok=True)
    source_bytes = 0
    try:
        with tqdm(unit="B", unit_scale=True, desc="Quantizing", disable=not progress) as bar:
            for file, members in shards.items():
                with (destination / file).open("wb") as stream:
                    stream.write(encode_header(entries[file]))
                    for out in members:
                        count = _write(stream, out, sources[out.name], scales)
                        source_bytes += count
                        bar.update(count)
    except BaseException:
        for file in shards:
            (destination / file).unlink(missing_ok=True)
        raise
    write_index(destination, entries)
    dtypes = [source_dtype(sources[name]) for name in sources if is_matrix(name)]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    config = dataclasses.replace(config, float8=True)
    write_side_files(destination, config, widest, source, mtp_layers=whole.mtp_layers)
    return QuantizeReport(source_bytes, sum(map(entries_bytes, entries.values())), whole.skipped)


def _outputs(name: str, shape: tuple[int, ...], source: Source) -> Iterator[_Output]:
    prefix = PART_PREFIXES["mtp"]
    dtype, scaled = source_dtype(source), is_block_scaled(name.removeprefix(prefix))
    for piece in (scaled and expert_pieces(name, shape)) or [whole_piece(name, shape)]:
        key = piece.name if name.startswith(prefix) else hf_key(piece.name)
        yield _Output(key, name, piece.box, piece.shape, dtype, scaled)


def _write(stream: BinaryIO, out: _Output, source: Source, scales: np.dtype) -> int:
    """Reads a tensor and writes it: bytes read."""
    extent = tuple(s.stop - s.start for s in out.box)
    if out.scaled:
        matrix = np.empty(extent, np.float32)
        count = _read(source, out.box, matrix)
        for part in quantize(matrix.reshape(out.shape), scales):
            stream.write(part.reshape(-1).view(np.uint8).data)
        return count
    count = 0
    rows = max(1, _COPY_BYTES // max(1, prod(extent[1:]) * out.dtype.itemsize))
    for first in range(0, extent[0], rows):
        box = (slice(first, min(first + rows, extent[0])), *out.box[1:])
        part = np.empty((box[0].stop - first, *extent[1:]), out.dtype)
        count += _read(source, box, part)
        stream.write(part.reshape(-1).view(np.uint8).data)
    return count


def _read(source: Source, box: Box, out: np.ndarray) -> int:
    with OpenFiles() as files:
        damaged, count = read_source(source, box, out, files)
    if damaged:
        raise CheckpointError(
            f"{source[0][1].file.parent} holds NaN or infinite values in {abbreviate(damaged)}; the weights "
            "are damaged."
        )
    return count

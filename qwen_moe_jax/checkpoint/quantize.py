"""From a float checkpoint to one of few bits, file to file.

FP8 is written as the published FP8 models have it, integers and MXFP4 as compressed-tensors does, one tensor
an expert. Matrices of the layers become codes, those of multi-token prediction included; routers, gates, the
two small projections of Gated DeltaNet, embedding, lm_head and what is no matrix stay as they are.
One matrix is in memory at a time.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qwen_moe_jax.checkpoint.block_scales import quantize
from qwen_moe_jax.checkpoint.fused_rows import fused_members
from qwen_moe_jax.checkpoint.layout import matrix_form, matrix_scheme
from qwen_moe_jax.checkpoint.names import PART_PREFIXES, hf_key, is_matrix, scale_name
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
from qwen_moe_jax.checkpoint.parts import whole_source
from qwen_moe_jax.checkpoint.pieces import file_tensors
from qwen_moe_jax.checkpoint.read_box import OpenFiles
from qwen_moe_jax.checkpoint.reader import Source, read_source, source_dtype
from qwen_moe_jax.checkpoint.rounding import round_integers, round_mxfp4
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
from qwen_moe_jax.checkpoint.written import Written, written_tensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.schemes.fp8 import FP8
from qwen_moe_jax.schemes.scheme import Quantization, Scheme

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
    """Tensors to be written: boxes of parameters, as they are or as codes, scales and what belongs to them.

    Attributes:
        boxes: (parameter, box of it), behind one another in the rows.
        shape: of the matrix.
        dtype: of what stays as it is, and of scales.
        entries: what it becomes in the file, behind one another.
        scheme: of its codes, or None.
    """

    boxes: tuple[tuple[str, Box], ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    entries: tuple[Entry, ...]
    scheme: Scheme | None


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    quantization: Quantization = FP8,
    scale_dtype: str = "bfloat16",
    max_shard_bytes: int = 4 << 30,
    progress: bool = False,
) -> QuantizeReport:
    """Writes a quantised checkpoint; the last file to appear is config.json, without which it is none.

    Args:
        source: a float32 or bfloat16 checkpoint in Hugging Face layout.
        destination: a new or empty folder.
        quantization: what becomes codes, and of which kind; see `schemes.presets.preset`.
        scale_dtype: "bfloat16", as published, or "float32"; MXFP4 has its own.
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
    if config.quantization is not None:
        raise CheckpointError(
            f"{source} is quantised already ({config.quantization.method}); give a float32 or "
            "bfloat16 checkpoint."
        )
    whole = whole_source(source, config)
    sources = whole.sources
    scales = SCALE_DTYPES[scale_dtype]
    config = dataclasses.replace(config, quantization=quantization.with_scales_in(scale_dtype))
    outputs = [
        out for name, shape in whole.shapes.items() for out in _outputs(config, name, shape, sources, scales)
    ]
    parts = into_shards(outputs, lambda out: entries_bytes(out.entries), max_shard_bytes)
    shards = dict(zip(shard_names(len(parts)), parts, strict=True))
    entries = {file: [e for out in members for e in out.entries] for file, members in shards.items()}
    destination.mkdir(parents=True, exist_ok=True)
    source_bytes = 0
    try:
        with tqdm(unit="B", unit_scale=True, desc="Quantizing", disable=not progress) as bar:
            for file, members in shards.items():
                with (destination / file).open("wb") as stream:
                    stream.write(encode_header(entries[file]))
                    for out in members:
                        count = _write(stream, out, sources, scales)
                        source_bytes += count
                        bar.update(count)
    except BaseException:
        for file in shards:
            (destination / file).unlink(missing_ok=True)
        raise
    write_index(destination, entries)
    dtypes = [source_dtype(sources[name]) for name in sources if is_matrix(name)]
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    write_side_files(destination, config, widest, source, mtp_layers=whole.mtp_layers)
    return QuantizeReport(source_bytes, sum(map(entries_bytes, entries.values())), whole.skipped)


def _outputs(
    config: ModelConfig, name: str, shape: tuple[int, ...], sources: Mapping[str, Source], scales: np.dtype
) -> Iterator[_Output]:
    prefix = PART_PREFIXES["mtp"]
    root = prefix if name.startswith(prefix) else "model."
    own = name.removeprefix(prefix)
    key_of, of_source = (prefix.__add__, prefix) if root == prefix else (hf_key, "")
    scheme = matrix_scheme(config, own, root)
    dtypes = [source_dtype(sources[of_source + member]) for member in fused_members(config, own)]
    dtype = max(dtypes, key=lambda d: d.itemsize)
    for tensor in file_tensors(config, own, shape, split_experts=scheme is not None):
        entries = ((key_of(tensor.name), dtype, tensor.shape),)
        if scheme is not None:
            # of an expert its own name; what is fused is named by the parameter it begins with
            known = (own, shape) if len(tensor.boxes) > 1 else (tensor.name, tensor.shape)
            entries = tuple(
                (key_of(written.name), written.dtype, written.shape)
                for written in _written(config, *known, scales, root)
            )
        boxes = tuple((of_source + member, box) for member, box in tensor.boxes)
        yield _Output(boxes, tensor.shape, dtype, entries, scheme)


def _written(
    config: ModelConfig, name: str, shape: tuple[int, ...], scales: np.dtype, root: str
) -> Iterator[Written]:
    """Codes, what belongs to them, then scales."""
    form = matrix_form(config, name, shape, root)
    assert form is not None
    yield from written_tensors(config, name, form.values_shape(shape), form.of_codes.dtype, root)
    yield from written_tensors(config, scale_name(name), form.scales_shape(shape), scales, root)


def _write(stream: BinaryIO, out: _Output, sources: Mapping[str, Source], scales: np.dtype) -> int:
    """Reads a tensor and writes it: bytes read."""
    if out.scheme is None:
        return sum(_copy(stream, sources[name], box, out.dtype) for name, box in out.boxes)
    matrix, count, first = np.empty(out.shape, np.float32), 0, 0
    for name, box in out.boxes:
        extent = tuple(s.stop - s.start for s in box)
        rows = prod(extent[:-1])
        count += _read(sources[name], box, matrix[first : first + rows].reshape(extent))
        first += rows
    codes, found = _rounded(matrix, out.scheme, scales)
    for i, (_, dtype, shape) in enumerate(out.entries):
        last = i == len(out.entries) - 1
        part = found if last else codes if i == 0 else np.array(out.shape, dtype)
        assert part.nbytes == prod(shape) * dtype.itemsize
        stream.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return count


def _copy(stream: BinaryIO, source: Source, box: Box, dtype: np.dtype) -> int:
    """Writes a box of a parameter as it is, in bounded pieces: bytes read."""
    extent, count = tuple(s.stop - s.start for s in box), 0
    rows = max(1, _COPY_BYTES // max(1, prod(extent[1:]) * dtype.itemsize))
    for first in range(0, extent[0], rows):
        last = min(first + rows, extent[0])
        part = np.empty((last - first, *extent[1:]), dtype)
        count += _read(source, (slice(box[0].start + first, box[0].start + last), *box[1:]), part)
        stream.write(part.reshape(-1).view(np.uint8).data)
    return count


def _rounded(matrix: np.ndarray, scheme: Scheme, scales: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a matrix."""
    if scheme.codes == "e4m3":
        return quantize(matrix, scales)
    if scheme.codes == "e2m1":
        return round_mxfp4(matrix)
    return round_integers(matrix, scheme.codes, scheme.group[1], scales)


def _read(source: Source, box: Box, out: np.ndarray) -> int:
    with OpenFiles() as files:
        damaged, count = read_source(source, box, out, files)
    if damaged:
        raise CheckpointError(
            f"{source[0][1].file.parent} holds NaN or infinite values in {abbreviate(damaged)}; the weights "
            "are damaged."
        )
    return count

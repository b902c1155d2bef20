"""How the tensors of quantised checkpoints hold codes, scales and zero points.

A matrix of codes is three canonical parameters: codes, packed along its rows, two 4-bit codes a byte, the
even column in the lower four bits; scales; and zero points, a byte each. A *packing* says in which tensors of
a file these lie, and how. Where codes lie in the file as they lie in memory, but under another dtype, they
are read as they are; else a box of the file is read and unpacked.

The sources are the libraries that write them: compressed-tensors 0.20 (`compressors/`), GPTQModel 7.7
(`nn_modules/qlinear`), AutoAWQ 0.2.9 (`utils/packing_utils.py`), AMD Quark 0.13.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_moe_jax.checkpoint.names import matrix_name, scale_name
from qwen_moe_jax.checkpoint.safetensors_files import StoredTensor
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.schemes.scheme import Scheme

Box = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of a file holds an array [..., rows, columns].

    Attributes:
        dtypes: that it may have in the file.
        file_shapes: the array's shape -> shapes that the tensor may have.
        view: the dtype that the file's bytes are read as, and how many of its elements one of the file's is;
            None where it is the file's own.
        file_box: a box of the array -> the box of the tensor that holds it; None where it is the same.
        unpack: what that box holds, and the array's box -> the box of the array; None where it is the same.
    """

    dtypes: tuple[str, ...]
    file_shapes: Callable[[Shape], tuple[Shape, ...]] = lambda shape: (shape,)
    view: tuple[str, int] | None = None
    file_box: Callable[[Box], Box] | None = None
    unpack: Callable[[np.ndarray, Box], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor of a file that has to be unpacked.

    Attributes:
        tensor: as it lies in the file.
        layout: how it is unpacked.
        shape: of the array that it holds.
        divisor: a tensor of one number that the array is divided by, or None.
    """

    tensor: StoredTensor
    layout: Layout
    shape: Shape
    divisor: StoredTensor | None = None

    @property
    def key(self) -> str:
        """Of the tensor."""
        return self.tensor.key

    @property
    def file(self) -> Path:
        """That it lies in."""
        return self.tensor.file

    @property
    def offset(self) -> int:
        """In the file."""
        return self.tensor.offset

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.tensor.nbytes

    @property
    def dtype(self) -> str:
        """Of the array: bytes for codes and zero points, else the tensor's."""
        return "U8" if self.tensor.dtype in ("I32", "I8") else self.tensor.dtype


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the parts of a matrix of codes lie.

    Attributes:
        names: part ("codes", "scales", "zeros", and "divisor", one number that scales are divided by) -> what
            its tensor is called, behind the module's name and a dot, where the matrix is called `weight`.
        layouts: part -> its layout, of 4-bit codes.
        layouts8: part -> its layout where 8-bit codes have another one.
        checks: what tensors are called that say again what is known, see `packing_checks.py`.
        ignored: what tensors are called that say how activations are quantised, which they are not here.
        stacks: whether experts may be stored as one tensor [experts, rows, columns].
    """

    names: dict[str, str]
    layouts: dict[str, Layout]
    layouts8: dict[str, Layout] = dataclasses.field(default_factory=dict)
    checks: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    stacks: bool = False

    def layout(self, part: str, scheme: Scheme) -> Layout:
        """Of a part."""
        eight = CODES[scheme.codes].bits == 8
        return (eight and self.layouts8.get(part)) or self.layouts[part]


_FLOAT_SCALES = ("F32", "BF16", "F16")


def _words_shape(shape: Shape) -> tuple[Shape, ...]:
    return ((*shape[:-1], -(-shape[-1] // 4)),)


# --- turned: [columns, rows] in the file


def _turned_shape(shape: Shape) -> tuple[Shape, ...]:
    return ((shape[1], shape[0]),)


def _turned_box(box: Box) -> Box:
    return box[1], box[0]


def _turn(raw: np.ndarray, box: Box) -> np.ndarray:
    return raw.T


def _turned_words_shape(shape: Shape) -> tuple[Shape, ...]:
    return ((-(-shape[1] // 4), shape[0]),)


def _turned_words_box(box: Box) -> Box:
    return slice(box[1].start // 4, -(-box[1].stop // 4)), box[0]


def _turn_words(raw: np.ndarray, box: Box) -> np.ndarray:
    """int32 [words, rows] -> bytes [rows, columns]."""
    columns = np.ascontiguousarray(raw.T).view(np.uint8)
    first = box[1].start // 4 * 4
    return columns[:, box[1].start - first : box[1].stop - first]


# --- zero points, packed along rows


def _packed_rows(bits: int, *, turned: bool, more: int = 0) -> Layout:
    """Zero points of several rows in a word: int32 [words, groups], or turned [groups, words]."""
    each = 32 // bits

    def file_shapes(shape: Shape) -> tuple[Shape, ...]:
        words = -(-shape[0] // each)
        return ((shape[1], words),) if turned else ((words, shape[1]),)

    def file_box(box: Box) -> Box:
        words = slice(box[0].start // each, -(-box[0].stop // each))
        return (box[1], words) if turned else (words, box[1])

    def unpack(raw: np.ndarray, box: Box) -> np.ndarray:
        words = (raw.T if turned else raw).view(np.uint32)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        parts = (words[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
        rows = parts.reshape(-1, words.shape[1])
        first = box[0].start // each * each
        return (rows[box[0].start - first : box[0].stop - first] + more).astype(np.uint8)

    return Layout(("I32",), file_shapes, file_box=file_box, unpack=unpack)


# --- AWQ: int32 [in, out / 8], the eight rows of a word in an order of their own

# the row of a word that the k-th four bits hold
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq_rows(raw: np.ndarray) -> np.ndarray:
    """int32 [n, words] -> the four bits of each row, uint8 [n, 8 * words]."""
    words = raw.view(np.uint32)
    parts = np.empty((*words.shape, 8), np.uint8)
    for place, row in enumerate(_AWQ_ORDER):
        parts[..., row] = (words >> np.uint32(4 * place)) & 15
    return parts.reshape(words.shape[0], -1)


def _awq_codes_box(box: Box) -> Box:
    return slice(2 * box[1].start, 2 * box[1].stop), slice(box[0].start // 8, -(-box[0].stop // 8))


def _awq_codes(raw: np.ndarray, box: Box) -> np.ndarray:
    first = box[0].start // 8 * 8
    codes = _awq_rows(raw)[:, box[0].start - first : box[0].stop - first]
    return (codes[0::2] | codes[1::2] << 4).T


def _awq_zeros_box(box: Box) -> Box:
    return box[1], slice(box[0].start // 8, -(-box[0].stop // 8))


def _awq_zeros(raw: np.ndarray, box: Box) -> np.ndarray:
    first = box[0].start // 8 * 8
    return _awq_rows(raw)[:, box[0].start - first : box[0].stop - first].T


# --- others


def _signed(raw: np.ndarray, box: Box) -> np.ndarray:
    """int8 -> the code of the same number, whose zero point is 128."""
    return raw.view(np.uint8) ^ np.uint8(0x80)


def _floats(raw: np.ndarray, box: Box) -> np.ndarray:
    return raw.astype(np.float32)


def _flat_shapes(shape: Shape) -> tuple[Shape, ...]:
    """A scale a row may come as [rows], one a matrix as [1] or []."""
    if shape == (1, 1):
        return shape, (1,), ()
    return (shape, shape[:1]) if shape[1] == 1 else (shape,)


def _same_box(box: Box) -> Box:
    return box


_SAME_SCALES = Layout(_FLOAT_SCALES)
_FLAT_SCALES = Layout(_FLOAT_SCALES, _flat_shapes)
_BYTES = Layout(("U8",))
_POWERS = Layout(("U8", "F8_E8M0"), view=("F8_E8M0", 1))
_WORDS = Layout(("I32",), _words_shape, view=("U8", 4))
_TURNED_WORDS = Layout(("I32",), _turned_words_shape, file_box=_turned_words_box, unpack=_turn_words)
_TURNED_SCALES = Layout(_FLOAT_SCALES, _turned_shape, file_box=_turned_box, unpack=_turn)
_SIGNED = Layout(("I8",), file_box=_same_box, unpack=_signed)
_AWQ_CODES = Layout(
    ("I32",),
    lambda shape: ((2 * shape[1], -(-shape[0] // 8)),),
    file_box=_awq_codes_box,
    unpack=_awq_codes,
)
_AWQ_ZEROS = Layout(
    ("I32",), lambda shape: ((shape[1], -(-shape[0] // 8)),), file_box=_awq_zeros_box, unpack=_awq_zeros
)


def _gptq(more: int) -> Packing:
    return Packing(
        {"codes": "qweight", "scales": "scales", "zeros": "qzeros"},
        {
            "codes": _TURNED_WORDS,
            "scales": _TURNED_SCALES,
            "zeros": _packed_rows(4, turned=True, more=more),
        },
        {"zeros": _packed_rows(8, turned=True, more=more)},
        checks=("g_idx", "qzeros"),
    )


PACKINGS: dict[str, Packing] = {
    # Qwen's and DeepSeek's FP8
    "fp8": Packing(
        {"codes": "weight", "scales": "weight_scale_inv"},
        {"codes": Layout(("F8_E4M3",)), "scales": Layout(("F32", "BF16"))},
        stacks=True,
    ),
    # compressed-tensors: pack-quantized
    "packed": Packing(
        {"codes": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point"},
        {"codes": _WORDS, "scales": _SAME_SCALES, "zeros": _packed_rows(4, turned=False)},
        {"zeros": _packed_rows(8, turned=False)},
        checks=("weight_shape", "weight_g_idx"),
        stacks=True,
    ),
    # compressed-tensors: mxfp4-pack-quantized
    "mxfp4": Packing(
        {"codes": "weight_packed", "scales": "weight_scale"},
        {"codes": _BYTES, "scales": _POWERS},
        stacks=True,
    ),
    # compressed-tensors: nvfp4-pack-quantized; its scales are divided by one number a matrix
    "nvfp4": Packing(
        {"codes": "weight_packed", "scales": "weight_scale", "divisor": "weight_global_scale"},
        {
            "codes": _BYTES,
            "scales": Layout(("F8_E4M3",), file_box=_same_box, unpack=_floats),
        },
        ignored=("input_global_scale",),
    ),
    # compressed-tensors: float-quantized
    "floats": Packing(
        {"codes": "weight", "scales": "weight_scale"},
        {"codes": Layout(("F8_E4M3",)), "scales": _FLAT_SCALES},
        ignored=("input_scale",),
    ),
    # compressed-tensors: int-quantized
    "integers": Packing(
        {"codes": "weight", "scales": "weight_scale", "zeros": "weight_zero_point"},
        {"codes": _SIGNED, "scales": _FLAT_SCALES, "zeros": _SIGNED},
        ignored=("input_scale", "input_zero_point"),
    ),
    "gptq": _gptq(more=1),
    "gptq_v2": _gptq(more=0),
    "awq": Packing(
        {"codes": "qweight", "scales": "scales", "zeros": "qzeros"},
        {"codes": _AWQ_CODES, "scales": _TURNED_SCALES, "zeros": _AWQ_ZEROS},
    ),
    # AMD Quark's MXFP4
    "quark": Packing(
        {"codes": "weight", "scales": "weight_scale"},
        {"codes": _BYTES, "scales": _POWERS},
        stacks=True,
    ),
}


def part_of(name: str) -> str:
    """Which part of a matrix of codes a parameter is: "codes", "scales" or "zeros"."""
    matrix = matrix_name(name)
    return "codes" if name == matrix else "scales" if name == scale_name(matrix) else "zeros"


def stored_name(name: str, ending: str) -> str:
    """What a tensor beside a matrix is called in a file.

    Args:
        name: canonical, of the matrix or its scales or zero points.
        ending: as of `Packing.names`.
    """
    matrix = matrix_name(name)
    if matrix.endswith(".weight"):
        return matrix.removesuffix("weight") + ending
    return matrix + ending.removeprefix("weight")  # a stack of experts is no module of its own


def as_array(tensor: StoredTensor, layout: Layout, shape: Shape) -> StoredTensor | PackedTensor:
    """A tensor of a file as the array of a shape that it holds."""
    if layout.unpack is not None:
        return PackedTensor(tensor, layout, shape)
    if layout.view is None:
        return dataclasses.replace(tensor, shape=shape)
    dtype, more = layout.view
    return dataclasses.replace(tensor, dtype=dtype, shape=(*tensor.shape[:-1], tensor.shape[-1] * more))


@dataclasses.dataclass(frozen=True)
class StoredAs:
    """How one parameter is stored.

    Attributes:
        packing: of a matrix of codes, or None.
        part: of it, as of `part_of`.
        layout: of its tensors.
    """

    packing: Packing | None
    part: str
    layout: Layout

    def name(self, piece: str) -> str:
        """What a piece of the parameter is called in the file."""
        return piece if self.packing is None else stored_name(piece, self.packing.names[self.part])

    def divisor(self, piece: str) -> str | None:
        """What the number is called that the scales of a piece are divided by, or None."""
        ending = self.packing.names.get("divisor") if self.packing is not None else None
        return stored_name(piece, ending) if ending is not None and self.part == "scales" else None


_PLAIN = StoredAs(None, "codes", Layout(("F32", "BF16")))


def stored_as(name: str, scheme: Scheme | None) -> StoredAs:
    """How a parameter is stored whose matrix has a scheme, or none."""
    if scheme is None:
        return _PLAIN
    packing, part = PACKINGS[scheme.packing], part_of(name)
    return StoredAs(packing, part, packing.layout(part, scheme))

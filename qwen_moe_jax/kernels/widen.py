"""Tiles of a stack of matrices as a kernel's products take them, also out of codes with block scales.

Codes (`formats/codes.py`) are loaded as bytes and become numbers in registers. Of two codes a byte, the lower
and the upper four bits are separated and joined along a new last axis: a thread that holds a byte then holds
both its columns, so nothing is exchanged between threads.

A number is (code - zero point) * scale. The first factor is exact in bfloat16 for every format (integers of
at most 8 bits and a sign; floats of at most 4). Where a row has one scale in a step of a kernel's loop, the
product takes codes, and the scale is multiplied into its float32 sum: nothing is rounded, and a scale costs a
multiplication for each result, not for each code. Where blocks are narrower than a step, codes are
multiplied first and rounded to the product's dtype, as the plain form does; with scales that are powers of
two that rounds nothing either.

Ways to widen float8_e4m3fn:

    "native"   the hardware's conversion, where its float8 is this one (gfx950, NVIDIA from sm_89 on)
    "bits"     through the bits of a float16 of 1/256 of the value, exact for every finite code: for any
               hardware, gfx942 among it, whose own float8 is e4m3fnuz, worth half at the same bits
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.codes import CODES, e2m1_of_bits, e4m3_of_bits, e8m0_of_bits

WIDENINGS = ("native", "bits")


@dataclasses.dataclass(frozen=True)
class Place:
    """Which tile of a stack.

    Attributes:
        group, row: of its first element.
        rows: how many.
        number: of the step.
        inside: bool [rows], which of its rows exist; None for all.
    """

    group: jax.Array
    row: jax.Array
    rows: int
    number: jax.Array
    inside: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a kernel reads a stack of matrices [groups, rows, columns], a step of columns at a time.

    Attributes:
        columns: of a matrix.
        step: columns of a tile, a power of two.
        codes: the number format, None for arrays of numbers.
        block: rows and columns of a scale.
        zeros: whether blocks have zero points.
        powers: scales are exponents of two (float8_e8m0fnu).
        widening: of e4m3, as above.
    """

    columns: int
    step: int
    codes: str | None = None
    block: tuple[int, int] = (1, 1)
    zeros: bool = False
    powers: bool = False
    widening: str = "bits"

    @classmethod
    def of(cls, weights: Matrix, step: int, widening: str) -> "Stored":
        """For the operands that `operands_of` makes of the same stack."""
        if not isinstance(weights, BlockScaled):
            return cls(weights.shape[-1], step)
        return cls(
            weights.shape[-1],
            step,
            weights.codes,
            weights.block,
            weights.zeros is not None,
            weights.scales.dtype == jnp.float8_e8m0fnu,
            widening,
        )

    @property
    def operands(self) -> int:
        """How many arrays a kernel is given of the stack."""
        return 1 if self.codes is None else 2 + self.zeros

    @property
    def scales(self) -> int:
        """That a row has in a step; where blocks fit no step, one for each column."""
        width = self.block[1]
        if width % self.step == 0 or width >= self.columns:
            return 1
        return self.step // width if self.step % width == 0 else self.step

    def tile(self, refs: Sequence[Any], place: Place, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """A tile for a matrix product. Behind the matrix's borders it means nothing, but is finite.

        Args:
            refs: to the operands.
            place: of the tile.
            dtype: that the product takes.

        Returns:
            [rows, step] in `dtype`, and float32 [rows] to multiply the product with, or None.
        """
        if self.codes is None:
            return self._load(refs, place).astype(dtype), None
        codes = self._codes(refs, place)
        scales = self._scales(refs, place)
        if self.scales == 1:
            return narrowed(codes, dtype), scales.reshape(place.rows)
        scaled = self._by_block(jnp.multiply, codes, scales)
        return narrowed(scaled, dtype) if self.powers else scaled.astype(dtype), None

    def numbers(self, refs: Sequence[Any], place: Place) -> jax.Array:
        """The same tile as float32 numbers, scales included."""
        if self.codes is None:
            return self._load(refs, place).astype(jnp.float32)
        codes = self._codes(refs, place)
        return self._by_block(jnp.multiply, codes, self._scales(refs, place))

    def _load(self, refs: Sequence[Any], place: Place) -> jax.Array:
        """[rows, step / packed] as stored, zero behind the borders."""
        packed = 1 if self.codes is None else CODES[self.codes].packed
        width = self.step // packed
        across = within(place.number * self.step, self.step, self.columns, every=packed)
        return masked_load(
            refs[0].at[place.group, pl.ds(place.row, place.rows), pl.ds(place.number * width, width)],
            both(place.inside, across, (place.rows, width)),
        )

    def _codes(self, refs: Sequence[Any], place: Place) -> jax.Array:
        """What the codes mean, less their zero points: float32 [rows, step]."""
        assert self.codes is not None
        values = self._load(refs, place)
        if CODES[self.codes].bits == 4:
            values = jnp.stack([values & 15, values >> 4], axis=-1).reshape(place.rows, self.step)
        if self.codes == "e4m3":
            return widened(values, self.widening)
        if self.codes == "e2m1":
            return e2m1_of_bits(values)
        codes = values.astype(jnp.float32)
        if not self.zeros:
            return codes - (CODES[self.codes].zero or 0)
        zeros = self._of_blocks(refs[2], place).astype(jnp.float32)
        return self._by_block(jnp.subtract, codes, zeros)

    def _scales(self, refs: Sequence[Any], place: Place) -> jax.Array:
        """float32 [rows, scales]."""
        scales = self._of_blocks(refs[1], place)
        return e8m0_of_bits(scales) if self.powers else scales.astype(jnp.float32)

    def _of_blocks(self, ref: Any, place: Place) -> jax.Array:
        """What each block of the tile has one of: [rows, scales]. Behind the borders it is the last one's."""
        rows = jnp.minimum((place.row + jnp.arange(place.rows)) // self.block[0], ref.shape[1] - 1)
        column = place.number * self.step
        if self.scales == 1:
            columns = jnp.full((1, 1), column // self.block[1])
        else:
            firsts = column + self.step // self.scales * jnp.arange(self.scales)
            columns = jnp.minimum(firsts // self.block[1], ref.shape[2] - 1)[None, :]
        # array indices only: an interpreted kernel has no mixed ones
        return plt.load(ref.at[*jnp.broadcast_arrays(place.group, rows[:, None], columns)])

    def _by_block(
        self, operation: Callable[[jax.Array, jax.Array], jax.Array], numbers: jax.Array, blocks: jax.Array
    ) -> jax.Array:
        """[rows, step] with [rows, scales], each for its block."""
        if self.scales == 1:
            return operation(numbers, blocks)
        rows = numbers.shape[0]
        split = numbers.reshape(rows, self.scales, self.step // self.scales)
        return operation(split, blocks[:, :, None]).reshape(rows, self.step)


def within(first: jax.Array, count: int, size: int, *, every: int = 1) -> jax.Array | None:
    """Which indices are less than `size`; None where all are. A mask that the compiler cannot see through
    makes it load bytes one by one, each behind a branch.

    Args:
        first: a multiple of `count`.
        count: how many indices a tile spans, from `first` on.
        size: of the array.
        every: only each such index is looked at.
    """
    if size % count == 0:
        return None
    return first + every * jnp.arange(count // every) < size


def both(rows: jax.Array | None, columns: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """A tile's mask of those of its rows and columns."""
    masks = ([] if rows is None else [rows[:, None]]) + ([] if columns is None else [columns[None, :]])
    if not masks:
        return None
    return jnp.broadcast_to(masks[0] if len(masks) == 1 else masks[0] & masks[1], shape)


def masked_load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Zero where a mask is false."""
    return plt.load(ref, mask=mask, other=None if mask is None else 0)


def operands_of(weights: Matrix) -> list[jax.Array]:
    """What a kernel is given of a stack: its array, or codes, scales and any zero points. Floats of 8 bits go
    as their bits, since Triton knows neither e8m0 nor, on every target, e4m3."""
    if not isinstance(weights, BlockScaled):
        return [weights]
    arrays = [weights.values, weights.scales, *([] if weights.zeros is None else [weights.zeros])]
    return [lax.bitcast_convert_type(a, jnp.uint8) if a.dtype.itemsize == 1 else a for a in arrays]


def bytes_of_one(weights: Matrix) -> int:
    """Bytes of one matrix of a stack, with its scales and zero points."""
    return sum(a.size // a.shape[0] * a.dtype.itemsize for a in jax.tree.leaves(weights))


def narrowed(exact: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 numbers that `dtype` has, without rounding.

    gfx942 has no instruction that rounds to bfloat16: it takes about five for each number, of the dozen that
    there is time for while a byte of codes comes from memory.
    """
    if dtype != jnp.bfloat16:
        return exact.astype(dtype)
    upper = lax.bitcast_convert_type(exact, jnp.uint32) >> 16
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def widened(values: jax.Array, widening: str) -> jax.Array:
    """The bits of finite float8_e4m3fn, uint8 -> their numbers, float32."""
    if widening == "native":
        return lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
    return e4m3_of_bits(values)

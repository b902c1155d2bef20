"""Number formats of stored weights: which numbers their codes mean, and how codes lie in an array.

e4m3   float8_e4m3fn (OCP 8-bit floating point, 1.0), an element a code
int8   unsigned bytes; a code means code - zero point, which is 128 where none is stored
int4   two codes a byte, the element of even index in the lower four bits; code - zero point, or - 8
e2m1   two codes a byte, likewise; the 4-bit floats of OCP Microscaling Formats (MX) 1.0, 5.3.3, whose
       magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with the sign in bit 3
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Codes:
    """One number format.

    Attributes:
        name: as above.
        bits: of a code.
        dtype: of the array that holds codes.
        zero: of integers, the zero point where none is stored; None for floating point.
    """

    name: str
    bits: int
    dtype: jnp.dtype
    zero: int | None = None

    @property
    def packed(self) -> int:
        """Codes in an element of the array."""
        return 8 * self.dtype.itemsize // self.bits


CODES = {
    codes.name: codes
    for codes in (
        Codes("e4m3", 8, jnp.dtype(jnp.float8_e4m3fn)),
        Codes("int8", 8, jnp.dtype(jnp.uint8), zero=128),
        Codes("int4", 4, jnp.dtype(jnp.uint8), zero=8),
        Codes("e2m1", 4, jnp.dtype(jnp.uint8)),
    )
}


@dataclasses.dataclass(frozen=True)
class MatrixFormat:
    """How a matrix lies in memory: codes, and a scale for each block of them.

    Attributes:
        codes: a key of `CODES`.
        block: rows and columns that a scale is for; the last ones may be fewer.
        scale_dtype: "float32", "bfloat16", "float16", or "float8_e8m0fnu" (a power of two).
        zeros: whether each block has a zero point; of integers only.
    """

    codes: str
    block: tuple[int, int]
    scale_dtype: str = "float32"
    zeros: bool = False

    @property
    def of_codes(self) -> Codes:
        """The number format."""
        return CODES[self.codes]

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the array of codes, for a matrix or stack [..., out, in].

        Raises:
            ValueError: an odd number of columns, of which two share a byte.
        """
        *leading, columns = shape
        if columns % self.of_codes.packed:
            raise ValueError(f"{self.codes} packs {self.of_codes.packed} columns, and there are {columns}.")
        return (*leading, columns // self.of_codes.packed)

    def matrix_shape(self, values_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the matrix whose codes are an array of a shape: `values_shape` backwards."""
        *leading, columns = values_shape
        return (*leading, columns * self.of_codes.packed)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales, and of the zero points, for a matrix or stack [..., out, in]."""
        *leading, rows, columns = shape
        return (*leading, -(-rows // self.block[0]), -(-columns // self.block[1]))


def widened_codes(values: jax.Array, codes: str, widening: str = "bits") -> jax.Array:
    """Codes -> the numbers they mean, in float32; of integers with no zero point taken off.

    Args:
        values: [..., columns / packed], finite.
        codes: a key of `CODES`.
        widening: of e4m3, as of `widened`.

    Returns:
        [..., columns].
    """
    if codes == "e4m3":
        return widened(values, widening)
    if codes == "int8":
        return values.astype(jnp.float32)
    nibbles = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    if codes == "int4":
        return nibbles.astype(jnp.float32)
    return e2m1_of_bits(nibbles)


def widened_scales(scales: jax.Array) -> jax.Array:
    """Scales in any of their dtypes -> float32, exactly."""
    if scales.dtype != jnp.float8_e8m0fnu:
        return scales.astype(jnp.float32)
    return e8m0_of_bits(lax.bitcast_convert_type(scales, jnp.uint8))


def widened(values: jax.Array, widening: str) -> jax.Array:
    """Finite float8_e4m3fn -> the same numbers in float32.

    Args:
        values: any shape.
        widening: by "native" conversion; as "fnuz", the float8 of gfx942, whose numbers at the same bits are
            half of these, but for the bits of -0, which are its NaN (a -0 becomes 0); or through
            "bits": those behind the sign, one place further up, are the bits of a float16 of 1/256 of the
            value, subnormal ones included. (XLA:CPU's own conversion takes three times as long as that.)
    """
    if widening == "native":
        return values.astype(jnp.float32)
    bits = lax.bitcast_convert_type(values, jnp.uint8)
    if widening == "fnuz":
        bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
        return lax.bitcast_convert_type(bits, jnp.float8_e4m3fnuz).astype(jnp.float32) * 2
    return e4m3_of_bits(bits)


def e4m3_of_bits(bits: jax.Array) -> jax.Array:
    """The bits of finite float8_e4m3fn, uint8 -> their numbers in float32."""
    wide = bits.astype(jnp.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256


def e2m1_of_bits(bits: jax.Array) -> jax.Array:
    """4-bit floats, one a byte, uint8 -> their numbers in float32.

    Behind the sign, one place further up, lie the bits of a float16 of 2^-14 times the value, subnormal ones
    included.
    """
    wide = bits.astype(jnp.uint16)
    half = ((wide & 8) << 12) | ((wide & 7) << 9)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2.0**14


def e8m0_of_bits(bits: jax.Array) -> jax.Array:
    """The bits of finite float8_e8m0fnu, uint8 -> their powers of two in float32."""
    exponent = bits.astype(jnp.uint32)
    # the code 0, 2^-127, is subnormal in float32
    return lax.bitcast_convert_type(jnp.where(exponent == 0, 1 << 22, exponent << 23), jnp.float32)

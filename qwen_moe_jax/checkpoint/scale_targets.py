"""Matrices of codes, and their scales and zero points, divided as their matrices are.

A file has a scale for each block of a matrix. A rank's slice of it may begin inside a block, or have sections
that do (512 rows among 8 ranks are 64 each, where blocks have 128). So a slice's scales are held for
*granules*, pieces of a block or the largest divisor of it such that no block border cuts one. Most often that
is the block itself; where it is half of one, each scale is held twice.
"""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.names import is_side, scale_name, zero_name
from qwen_moe_jax.checkpoint.targets import Box, Copy, Target
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.formats.codes import MatrixFormat

# canonical name of a matrix -> how it is stored, or held
Forms = dict[str, MatrixFormat]


def with_scales(
    targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, MatrixFormat]
) -> tuple[dict[str, Target], Forms]:
    """Turns the targets of matrices that are stored as codes into those of codes, scales and zero points.

    Args:
        targets: canonical name -> how a parameter is held, as if matrices were whole. What one is made of is
            stored in one format (`parallel.layout.check_fusable`).
        shapes: stored parameter -> shape, with scales and zero points.
        stored: name of a stored matrix of codes -> its format.

    Returns:
        (all targets; canonical name -> the format that a matrix is held in, with granules as blocks).

    Raises:
        InputError: a slice begins between two codes of a byte.
    """
    found: dict[str, Target] = {}
    forms: Forms = {}
    for name, target in targets.items():
        if is_side(name):
            continue
        form = stored.get(name)
        if form is None:
            found[name] = target
            continue
        granules = _granules(target, shapes, stored)
        forms[name] = dataclasses.replace(form, block=granules)
        found[name] = _codes_target(name, target, form)
        sides = [(scale_name, jnp.dtype(form.scale_dtype))]
        if form.zeros:
            sides.append((zero_name, jnp.dtype(jnp.uint8)))
        for name_of, dtype in sides:
            found[name_of(name)] = _side_target(target, granules, shapes, stored, name_of, dtype)
    return found, forms


def _codes_target(name: str, target: Target, form: MatrixFormat) -> Target:
    """The matrix's own target, in columns of packed codes."""
    packed, struct = form.of_codes.packed, target.struct

    def fewer(columns: slice) -> slice:
        if columns.start % packed or columns.stop % packed:
            raise InputError(
                f"a device would hold columns {columns.start} to {columns.stop} of {name}, and {packed} of "
                f"them share a byte in {form.codes}; choose a mesh that divides it evenly."
            )
        return slice(columns.start // packed, columns.stop // packed)

    def copies(index: Box) -> tuple[Copy, ...]:
        columns = slice(index[-1].start * packed, index[-1].stop * packed)
        return tuple(
            dataclasses.replace(
                copy,
                box=(*copy.box[:-1], fewer(copy.box[-1])),
                place=(*copy.place[:-1], fewer(copy.place[-1])),
            )
            for copy in target.copies((*index[:-1], columns))
        )

    fewer(slice(0, _local_shape(target)[-1]))
    held = jax.ShapeDtypeStruct(
        (*struct.shape[:-1], struct.shape[-1] // packed), form.of_codes.dtype, sharding=struct.sharding
    )
    if packed == 1:
        return dataclasses.replace(target, struct=held)
    packed_target = Target(held, copies, as_stored=target.as_stored)
    for index in _indices(packed_target):  # now, not while weights are read
        copies(index)
    return packed_target


def _side_target(
    matrix: Target,
    granules: tuple[int, int],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, MatrixFormat],
    name_of: Callable[[str], str],
    dtype: jnp.dtype,
) -> Target:
    """Of scales or zero points, whose names `name_of` makes of a matrix's."""
    shape = matrix.struct.shape
    local = _local_shape(matrix)
    held = (*local[:-2], *(-(-size // granule) for size, granule in zip(local[-2:], granules, strict=True)))
    struct = jax.ShapeDtypeStruct(
        tuple(n // part * scales for n, part, scales in zip(shape, local, held, strict=True)),
        dtype,
        sharding=matrix.struct.sharding,
    )

    def copies(index: Box) -> tuple[Copy, ...]:
        box = tuple(
            slice(s.start // n * part, s.stop // n * part)
            for s, n, part in zip(index, held, local, strict=True)
        )
        return tuple(
            _side_copy(copy, granules, shapes, stored[copy.source].block, name_of(copy.source))
            for copy in matrix.copies(box)
        )

    return Target(struct, copies)


def _side_copy(
    copy: Copy,
    granules: tuple[int, int],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, int],
    name: str,
) -> Copy:
    """The scales of a box of a matrix: which blocks they are, and which granule takes which of them."""
    box, place, pick = list(copy.box[:-2]), list(copy.place[:-2]), []
    runs = _runs(copy.source, shapes[copy.source], shapes[name], block)
    for span, there, granule, size, starts in zip(
        copy.box[-2:], copy.place[-2:], granules, block, runs, strict=True
    ):
        first, last = there.start // granule, -(-there.stop // granule)
        # the stored element that each granule begins with, and its block
        elements = span.start + np.arange(first, last) * granule - there.start
        which = _block_of(elements, starts, size)
        box.append(slice(int(which[0]), int(which[-1]) + 1))
        place.append(slice(first, last))
        pick.append(which - which[0])
    return Copy(name, tuple(box), tuple(place), (pick[0], pick[1]))


def _block_of(elements: np.ndarray, starts: tuple[int, ...], size: int) -> np.ndarray:
    """Index of each element's block, where blocks begin anew at every start."""
    before = 0
    found = elements // size
    for start, following in pairwise(starts):
        before += -(-(following - start) // size)
        inside = elements >= following
        found = np.where(inside, before + (elements - following) // size, found)
    return found


def _runs(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in rows and columns of a stored matrix blocks begin anew.

    Gate and up rows of an expert were matrices of their own. Where their blocks are whole, it is the same.
    """
    halves = name.endswith("experts.gate_up_proj") and scales[-2] > -(-shape[-2] // block[0])
    return ((0, shape[-2] // 2) if halves else (0,)), (0,)


def _granules(
    target: Target, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, MatrixFormat]
) -> tuple[int, int]:
    """The largest pieces that begin with a block or whole pieces after one, on every device."""
    found = [0, 0]
    local = _local_shape(target)
    for index in _indices(target):
        for copy in target.copies(index):
            block = stored[copy.source].block
            runs = _runs(copy.source, shapes[copy.source], shapes[scale_name(copy.source)], block)
            for d in range(2):
                found[d] = gcd(found[d], block[d])
                span, there = copy.box[d - 2], copy.place[d - 2]
                for start in runs[d]:
                    if start <= span.start:
                        inside = span.start - start
                    elif start < span.stop:
                        # a run that begins within: it must begin with a granule of the slice
                        inside = there.start + start - span.start
                    else:
                        continue
                    found[d] = gcd(found[d], inside)
                found[d] = gcd(found[d], there.start)
                if there.stop < local[d - 2]:
                    found[d] = gcd(found[d], there.stop)
    return found[0], found[1]


def _indices(target: Target) -> list[Box]:
    """Every device's slice, also of a mesh without devices."""
    local = _local_shape(target)
    counts = [n // part for n, part in zip(target.struct.shape, local, strict=True)]
    return [
        tuple(slice(i * part, (i + 1) * part) for i, part in zip(place, local, strict=True))
        for place in np.ndindex(*counts)
    ]


def _local_shape(target: Target) -> tuple[int, ...]:
    """Of a device's slice; all are of one shape."""
    struct = target.struct
    return tuple(struct.sharding.shard_shape(struct.shape)) if struct.sharding else tuple(struct.shape)

"""Scales of float8 matrices, divided as their matrices are.

A file has a scale for each block of 128 x 128. A rank's slice of a matrix may begin inside a block, or have
sections that do (512 rows among 8 ranks are 64 each). So a slice's scales are held for *granules*,
pieces of 128 elements or the largest divisor of it such that no block border cuts one. Most often that is the
block itself; where it is half of one, each scale is held twice.
"""

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.block_scales import BLOCK, E4M3
from qwen_moe_jax.checkpoint.layout import is_scale, scale_name
from qwen_moe_jax.checkpoint.targets import Box, Copy, Target
from qwen_moe_jax.formats.codes import MatrixFormat

# canonical name of a matrix -> how it is held
Forms = dict[str, MatrixFormat]


def with_scales(
    targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Target], Forms]:
    """Adds to the targets of float8 matrices those of their scales.

    Args:
        targets: canonical name -> how a parameter is held, without scales.
        shapes: stored parameter -> shape, with scales.

    Returns:
        (all targets, in float8 where there are scales; the forms of those matrices, with granules as blocks).
    """
    found: dict[str, Target] = {}
    forms: Forms = {}
    for name, target in targets.items():
        if is_scale(name):
            continue
        if scale_name(name) not in shapes:
            found[name] = target
            continue
        struct = target.struct
        held = jax.ShapeDtypeStruct(struct.shape, E4M3, sharding=struct.sharding)
        found[name] = dataclasses.replace(target, struct=held)
        granules = _granules(target, shapes)
        forms[name] = MatrixFormat("e4m3", granules)
        found[scale_name(name)] = _scale_target(target, granules, shapes)
    return found, forms


def _scale_target(matrix: Target, granules: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> Target:
    shape = matrix.struct.shape
    local = _local_shape(matrix)
    held = (*local[:-2], *(-(-size // granule) for size, granule in zip(local[-2:], granules, strict=True)))
    struct = jax.ShapeDtypeStruct(
        tuple(n // part * scales for n, part, scales in zip(shape, local, held, strict=True)),
        jnp.float32,
        sharding=matrix.struct.sharding,
    )

    def copies(index: Box) -> tuple[Copy, ...]:
        box = tuple(
            slice(s.start // n * part, s.stop // n * part)
            for s, n, part in zip(index, held, local, strict=True)
        )
        return tuple(_scale_copy(copy, granules, shapes) for copy in matrix.copies(box))

    return Target(struct, copies)


def _scale_copy(copy: Copy, granules: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> Copy:
    """The scales of a box of a matrix: which blocks they are, and which granule takes which of them."""
    name = scale_name(copy.source)
    box, place, pick = list(copy.box[:-2]), list(copy.place[:-2]), []
    runs = _runs(copy.source, shapes[copy.source], shapes[name])
    for span, there, granule, starts in zip(copy.box[-2:], copy.place[-2:], granules, runs, strict=True):
        first, last = there.start // granule, -(-there.stop // granule)
        # the stored element that each granule begins with, and its block
        elements = span.start + np.arange(first, last) * granule - there.start
        block = _block_of(elements, starts)
        box.append(slice(int(block[0]), int(block[-1]) + 1))
        place.append(slice(first, last))
        pick.append(block - block[0])
    return Copy(name, tuple(box), tuple(place), (pick[0], pick[1]))


def _block_of(elements: np.ndarray, starts: tuple[int, ...]) -> np.ndarray:
    """Index of each element's block, where blocks begin anew at every start."""
    before = 0
    found = elements // BLOCK
    for start, following in pairwise(starts):
        before += -(-(following - start) // BLOCK)
        inside = elements >= following
        found = np.where(inside, before + (elements - following) // BLOCK, found)
    return found


def _runs(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in rows and columns of a stored matrix blocks begin anew.

    Gate and up rows of an expert were matrices of their own. Where their blocks are whole, it is the same.
    """
    halves = name.endswith("experts.gate_up_proj") and scales[-2] > -(-shape[-2] // BLOCK)
    return ((0, shape[-2] // 2) if halves else (0,)), (0,)


def _granules(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """The largest pieces that begin with a block or whole pieces after one, on every device."""
    found = [BLOCK, BLOCK]
    local = _local_shape(target)
    for index in _indices(target):
        for copy in target.copies(index):
            runs = _runs(copy.source, shapes[copy.source], shapes[scale_name(copy.source)])
            for d in range(2):
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

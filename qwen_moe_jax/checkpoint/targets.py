"""What is read for a parameter, and where it goes: the seam between files and layouts.

A parameter is held as an array over devices, each of which has a slice of it. The target says of which
boxes of which stored parameters a slice is made; what no box covers is zero.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Box = tuple[slice, ...]  # one slice with start and stop a dimension

# XLA:CPU takes over host memory without a copy if it is aligned to this many bytes.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Copy:
    """A box of a stored parameter, and where it lies in a device's slice.

    Attributes:
        source: canonical name of the stored parameter.
        box: within it.
        place: within the slice; of the box's shape behind leading dimensions of one element.
        pick: for scales, which row and which column of the box each row and column of the place takes; None
            where box and place are of one shape.
    """

    source: str
    box: Box
    place: Box
    pick: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter as it is held.

    Attributes:
        struct: global shape, held dtype, and a sharding or None for the default device.
        copies: index of a device's slice in the global array -> what it is made of.
        as_stored: the global array is the stored parameter itself.
    """

    struct: jax.ShapeDtypeStruct
    copies: Callable[[Box], tuple[Copy, ...]]
    as_stored: bool = False


# source, box, destination (a view of the box's shape) -> the keys of damaged tensors among what it read
Fetch = Callable[[str, Box, np.ndarray], list[str]]


def whole(name: str, struct: jax.ShapeDtypeStruct) -> Target:
    """The stored parameter itself, in whatever sharding the struct names."""

    def copies(index: Box) -> tuple[Copy, ...]:
        return (Copy(name, index, tuple(slice(0, _length(s)) for s in index)),)

    return Target(struct, copies, as_stored=True)


class Transfers:
    """Slices on their way to devices: at most one, while another one is read.

    On CPU an array takes over the host's memory, and nothing is on its way.
    """

    def __init__(self) -> None:
        self._last: list[jax.Array] = []

    def finish(self) -> None:
        """Waits for what is on its way, so that its host memory is free."""
        jax.block_until_ready(self._last)
        self._last = []

    def start(self, host: np.ndarray, devices: list[Any]) -> list[jax.Array]:
        """Sends a slice to devices, once the one before has arrived."""
        self.finish()
        self._last = [jax.device_put(host, device) for device in devices]
        return self._last


def place(target: Target, fetch: Fetch, transfers: Transfers | None = None) -> tuple[jax.Array, list[str]]:
    """Builds the parameter on this process's devices; slices that several devices share are fetched once.

    Args:
        target: what is held.
        fetch: reads.
        transfers: to go on reading while the last slice is on its way; None waits for it.

    Returns:
        (the array, keys of tensors with NaN or infinite values).
    """
    struct = target.struct
    sharding = struct.sharding or jnp.zeros(()).sharding
    on_the_way = transfers or Transfers()
    damaged: list[str] = []
    holders: dict[tuple[tuple[int, int], ...], tuple[Box, list[Any]]] = {}
    indices = sharding.addressable_devices_indices_map(struct.shape)
    for device, index in indices.items():
        box = concrete(index or (), struct.shape)
        holders.setdefault(_key(box), (box, []))[1].append(device)
    pieces: dict[Any, jax.Array] = {}
    for box, devices in holders.values():
        host, not_finite = _assemble(target, box, fetch)
        damaged += not_finite
        pieces |= zip(devices, on_the_way.start(host, devices), strict=True)
    if transfers is None:
        on_the_way.finish()
    ordered = [pieces[device] for device in indices]
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, ordered), damaged


def concrete(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The index with start and stop filled in."""
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(full, shape, strict=True))


def check_sources(targets: Mapping[str, Target], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the targets of all devices together use every element that is stored.

    A layout that forgot one would give a healthy-looking model without it.
    """
    covered = {name: np.zeros(shape, bool) for name, shape in stored.items()}
    for target in targets.values():
        shape = target.struct.shape
        sharding = target.struct.sharding or jnp.zeros(()).sharding
        boxes = [concrete(index or (), shape) for index in sharding.devices_indices_map(shape).values()]
        for box in {_key(box): box for box in boxes}.values():
            for copy in target.copies(box):
                covered[copy.source][copy.box] = True
    missed = [name for name, seen in covered.items() if not seen.all()]
    if missed:
        raise ValueError(f"no device holds all of {', '.join(missed)}")


def give_back(target: Target, array: jax.Array, stored: Mapping[str, np.ndarray]) -> None:
    """Writes what this process's devices hold of a parameter to where it is stored: `place` backwards."""
    for shard in array.addressable_shards:
        local = np.asarray(shard.data)
        for copy in target.copies(concrete(shard.index, target.struct.shape)):
            host = stored[copy.source]
            if copy.pick is None:
                host[copy.box] = local[copy.place].reshape(host[copy.box].shape)
            else:
                out = host[copy.box]
                part = local[copy.place].reshape(*out.shape[:-2], *map(len, copy.pick))
                out[(..., *np.ix_(*copy.pick))] = part


def _assemble(target: Target, box: Box, fetch: Fetch) -> tuple[np.ndarray, list[str]]:
    shape = tuple(map(_length, box))
    copies = target.copies(box)
    host = _aligned_empty(shape, np.dtype(target.struct.dtype))
    if sum(_size(copy.place) for copy in copies) < host.size:
        host.view(np.uint8)[...] = 0  # not the number: exponents (e8m0) have no zero, and would be NaN
    damaged: list[str] = []
    for copy in copies:
        out = host[copy.place][(0,) * (len(copy.place) - len(copy.box))]
        if copy.pick is None:
            damaged += fetch(copy.source, copy.box, out)
        else:
            scales = np.empty(tuple(map(_length, copy.box)), host.dtype)
            damaged += fetch(copy.source, copy.box, scales)
            out[...] = scales[(..., *np.ix_(*copy.pick))]
    return host, damaged


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def _length(s: slice) -> int:
    return s.stop - s.start


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in box)  # slices have no hash before Python 3.12


def _size(box: Box) -> int:
    return int(np.prod([_length(s) for s in box], dtype=np.int64))

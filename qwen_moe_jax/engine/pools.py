"""How large an engine's pools are: rows' states, snapshots of states and pages, within a budget of memory."""

import dataclasses
from pathlib import Path

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.formats.cache import PAGE, pages_for
from qwen_moe_jax.parallel.processes import least_of_all

# Of what a device has left; the rest is for compiled programs' temporaries and the runtime.
_USED = 0.9
# Of a host's memory that is available: other programs want some, and pages of files are counted as available.
_USED_OF_HOST = 0.6
# Pools that take their memory at once, on a device that a host pretends to have or without the C++ kernels,
# where it is not asked for.
_TAKEN_AT_ONCE = 64 << 20
# Of what rows' states leave, at most, for snapshots; and snapshots a row, at most.
_SNAPSHOT_SHARE, _SNAPSHOTS_A_ROW = 0.25, 4


@dataclasses.dataclass(frozen=True)
class PoolSizes:
    """Entries of the pools of each data rank.

    Attributes:
        slots: rows that are computed together at most.
        pages: of keys and values.
        snapshots: of recurrent states, for the prefix cache.
        page_bytes, state_bytes: of one entry, on one device.
    """

    slots: int
    pages: int
    snapshots: int
    page_bytes: int
    state_bytes: int

    @property
    def bytes(self) -> int:
        """Of all pools on one device, where every entry is in use."""
        return (self.slots + self.snapshots) * self.state_bytes + self.pages * self.page_bytes


def pool_sizes(
    forward: Forward, *, max_rows: int, memory: int | None, prefix_cache: bool, context: int
) -> PoolSizes:
    """What fits.

    Args:
        forward: the model.
        max_rows: rows of the whole mesh, rounded up to what its data ranks divide.
        memory: bytes of each device, None for what it has left.
        prefix_cache: keep snapshots, and pages beyond those of the rows.
        context: tokens of the longest row.

    Raises:
        InputError: the memory does not hold the states of so many rows and pages for one of them.
    """
    slots = -(-max_rows // forward.batch_multiple)
    page, state = forward.page_bytes, forward.state_bytes
    longest = pages_for(context)
    least = slots * state + page
    if memory is None:
        memory = _left(forward)
        if not forward.memory_as_used:
            # as much as a small job needs, but always one row of the model's whole context
            memory = min(memory, max(_TAKEN_AT_ONCE, least + longest * page))
    if least > memory:
        raise InputError(
            f"{memory:,} bytes of memory do not hold the states of {slots} rows ({slots * state:,} bytes) "
            f"and a page of {PAGE} tokens ({page:,} bytes); give more memory or fewer rows (max_rows)."
        )
    rest = memory - slots * state
    snapshots = _SNAPSHOTS_A_ROW * slots if prefix_cache else 0
    if state:  # without recurrent layers they take nothing
        snapshots = min(snapshots, int(_SNAPSHOT_SHARE * rest) // state)
    snapshots = _rounded(snapshots)
    pages = slots * longest * (2 if prefix_cache else 1)
    if page:  # nor do pages without attention layers
        pages = min(pages, (rest - snapshots * state) // page)
    return PoolSizes(slots, _rounded(pages), snapshots, page, state)


def _rounded(number: int) -> int:
    """Down to 2^n or 3 * 2^n, so that programs compiled in one process fit the next one, which finds a little
    more or less memory."""
    if number < 2:
        return number
    power = 1 << number.bit_length() - 1
    return power + power // 2 if number >= power + power // 2 else power


def _left(forward: Forward) -> int:
    """Bytes that each device has left, the same number in every process."""
    devices = forward.devices
    if devices[0].platform == "cpu":
        here = int(_USED_OF_HOST * _available()) // max(1, len(devices))
    else:
        stats = [device.memory_stats() or {} for device in devices]
        here = min(int(_USED * s["bytes_limit"]) - s["bytes_in_use"] for s in stats)
    return least_of_all(max(0, here))


def _available() -> int:
    """Bytes of the host's memory that a program may still take."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) << 10
    # a container may have less than its host
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free

"""What the time model (`times.py`) takes for granted of devices and links, every number with its source.

None of it was measured by this project. Sources are microbenchmarks that others published; where there is
none for a device, the line says what stands for it. `assumptions_for` gives the set of a device, `changed`
replaces numbers of it.

A collective among devices of one host takes its latency, and the bytes that a device sends over the bandwidth
of its links (Hockney's model, as in Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005). Bytes are those of `minimum.Collective.sent`: all but a device's own n-th part,
for an all-reduce twice. A ring sends as much as direct exchange on fully connected devices does, so the
formula is one; the latency does not grow with the number of devices, which is what direct exchange gives, and
what was published: 7.1 us among two (ROCm/aiter pull 801), 7.2 among four (vllm pull 19744), 7.5 among eight.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.devices import Device
from qwen_moe_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_moe_jax.aot.minimum import Collective

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a device reaches of its data sheet, and what nothing can be faster than.

    Attributes:
        memory: share of the memory's bandwidth that reading large arrays reaches.
        flops: dtype -> share of the peak of matrix units that large products reach.
        launch: seconds that the host takes to start a kernel. It runs ahead, so they are hidden while the
            device has as much to do.
        gap: seconds between the ends of two kernels that read and compute nothing.
        latency: operation -> seconds of a collective among devices of one host, however little it sends.
        links: devices of a group -> share of the bandwidth of the links between them that a collective
            reaches; a group of another size has that of the next larger one.
        network_latency: seconds of a collective of more devices than a host has.
        network_bandwidth: bytes a second that each of its devices sends.
        host: devices of a host.
    """

    memory: float
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    launch: float
    gap: float
    latency: Mapping[str, float] = dataclasses.field(hash=False)
    links: Mapping[int, float] = dataclasses.field(hash=False)
    network_latency: float
    network_bandwidth: float
    host: int = 8

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "links"):
            for share in _numbers(getattr(self, name)):
                if not 0 < share <= 1:
                    raise InputError(f"{name} is {share!r}; expected a share, above 0 and at most 1.")
        for name in ("launch", "gap", "latency", "network_latency"):
            for seconds in _numbers(getattr(self, name)):
                if not 0 <= seconds < math.inf:
                    raise InputError(f"{name} is {seconds!r}; expected seconds, 0 or more.")
        if not self.network_bandwidth > 0:  # also a NaN
            raise InputError(
                f"network_bandwidth is {self.network_bandwidth!r}; expected bytes a second, above 0."
            )
        if isinstance(self.host, bool) or not isinstance(self.host, int) or self.host < 1:
            raise InputError(f"host is {self.host!r}; expected how many devices a host has.")

    def changed(self, given: Mapping[str, Any]) -> "Assumptions":
        """With other numbers; a number for all of a mapping's values.

        Raises:
            InputError: a name that is none, or a number that cannot be.
        """
        names = [field.name for field in dataclasses.fields(self)]
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in names:
                raise InputError(f"{name!r} is no assumption; they are {', '.join(names)}.")
            if isinstance(value, bool) or not isinstance(value, (int, float, Mapping)):
                raise InputError(f"{name} is {value!r}; expected a number.")
            before = getattr(self, name)
            if isinstance(before, Mapping) and not isinstance(value, Mapping):
                value = dict.fromkeys(before, value)
            if name == "host" and isinstance(value, float) and value.is_integer():
                value = int(value)
            values[name] = value
        return dataclasses.replace(self, **values)

    def collective_seconds(self, one: "Collective", device: Device) -> float:
        """Of all of a step's collectives of one kind (`one.count` of them), on a device."""
        if one.ranks < 2:
            return 0
        if one.ranks > self.host:
            return one.count * self.network_latency + one.sent / self.network_bandwidth
        share = self.links[min((n for n in self.links if n >= one.ranks), default=max(self.links))]
        return one.count * self.latency[one.operation] + one.seconds(device) / share


def _numbers(value: Any) -> list[float]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


# MI300X: copying in BabelStream, AMD's acceptance threshold of 4.177 TB/s, of 5.3
# (ROCm/system-acceptance-docs, docs/gpus/mi300x.md; its dot, which only reads, is at 3.66). MI325X: no figure
# found, that of MI300X. MI355X: adding arrays of 17 GB on gfx950, 5.80 TB/s of 8 (tile-ai/tilelang pull
# 2248).
_MEMORY = {"MI300X": 4.177 / 5.3, "MI325X": 4.177 / 5.3, "MI355X": 5.80 / 8}
# MI300X and MI325X: AMD's "Measuring Max-Achievable FLOPs, Part 2" (rocm.blogs.amd.com, 2025-02-28): bfloat16
# 708 and 843, float8 1273 and 1519 TFLOP/s, with data as of models. MI355X: 1188 TFLOP/s of bfloat16 on
# MI350X (AITER, 8192 x 8192 x 8192; HazyResearch/HipKittens, analysis/mi350x_data_to_log.json), whose peak is
# 2307 at 2.2 GHz; float8 was not found, and has the same share.
_FLOPS = {
    "MI300X": {"bfloat16": 708 / 1307.4, "float8": 1273 / 2614.9},
    "MI325X": {"bfloat16": 843 / 1307.4, "float8": 1519 / 2614.9},
    "MI355X": {"bfloat16": 1188 / 2306.9, "float8": 1188 / 2306.9},
}
# RCCL 2.22 among eight MI300X, all-reduce of 1 to 32 KiB, "Understanding RCCL Bandwidth and xGMI Performance
# on AMD Instinct MI300X" (rocm.blogs.amd.com, 2025-03-02): 13.1 us one after the other, 7.5 us in HIP graphs.
# So a graph saves 5.6 us a launch, which stands for what starting any kernel costs the host. No other
# operation and no other device was found in RCCL; AITER's own all-reduce is at 6.3 us on MI355X (vllm pull
# 39080).
_LATENCY, _LATENCY_IN_GRAPH = 13.1e-6, 7.5e-6
_LAUNCH = _LATENCY - _LATENCY_IN_GRAPH
# 941 kernels of one block each, which depend on each other, in a HIP graph: 3.87 us each (ROCm/rocm-systems
# issue 10834; on gfx1100, for want of a figure of gfx942 or gfx950).
_GAP = 3.87e-6
# Eight: fitted to RCCL's table of the page above, 1 KiB to 1 GiB, by least squares of the logarithms; it is
# met to within 0.69 to 1.26, and lowest between 256 KiB and 2 MiB. Four: all-reduce of 2 to 16 MB, 113 GB/s
# of 192 (vllm pull 19744, MI300X). Two: 4 to 256 MB, 48 GB/s of 64 (ROCm/aiter pull 801). AMD asks MI355X for
# no more GB/s than MI300X (304, system-acceptance-docs); what was found of it in RCCL is that threshold only,
# so it has the same shares of its faster links.
_LINKS = {2: 0.75, 4: 0.6, 8: 0.56}
# 16 MI350X of two hosts, all-reduce of 128 MiB: 249 GB/s (ROCm/rocm-systems pull 9406). The latency is a
# guess, three times that inside a host: none was found.
_NETWORK_LATENCY, _NETWORK_BANDWIDTH = 3 * _LATENCY, 249e9


def assumptions_for(device: Device, *, graphs: bool = False) -> Assumptions:
    """What is assumed of a device and of RCCL between several.

    Args:
        device: of `devices.py`, an AMD one.
        graphs: programs are replayed as HIP graphs. This library's are not (`Kernels.compiler_options`),
            those of published engines are.

    Raises:
        InputError: nothing is known of the device.
    """
    name = device.name.split()[-1]
    if name not in _MEMORY:
        raise InputError(
            f"nothing is known of what {device.name} reaches; times are modelled for {', '.join(_MEMORY)}."
        )
    latency = _LATENCY_IN_GRAPH if graphs else _LATENCY
    return Assumptions(
        memory=_MEMORY[name],
        flops=_FLOPS[name],
        launch=0 if graphs else _LAUNCH,
        gap=_GAP,
        latency=dict.fromkeys(OPERATIONS, latency),
        links=_LINKS,
        network_latency=_NETWORK_LATENCY,
        network_bandwidth=_NETWORK_BANDWIDTH,
    )

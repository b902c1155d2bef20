"""The accelerators that deployments are planned for, and compiled for."""

import dataclasses
from collections.abc import Mapping

from qwen_moe_jax.errors import InputError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, as its maker describes it. Nothing here is measured.

    Attributes:
        name: as its maker writes it.
        memory: bytes of it, as the driver reports them to within a percent.
        arch: what the compiler calls it, "gfx942" or "sm_90".
        compute_units: AMD's compute units, or NVIDIA's streaming multiprocessors, that are switched on.
        lds_bytes: of fast memory in one compute unit (AMD's LDS, NVIDIA's shared memory).
        bandwidth: bytes a second between its memory and its compute units.
        clock_ghz: highest clock of the compute units, in 10^9 a second.
        peak_flops: dtype, "bfloat16" or "float8" -> floating-point operations a second of its matrix units, a
            multiplication and an addition counted as two, without sparsity.
        link_bandwidth: bytes a second that it can send to all the other devices of its host together; it
            receives as many at the same time.
    """

    name: str
    memory: int
    arch: str
    compute_units: int
    lds_bytes: int
    bandwidth: float
    clock_ghz: float
    peak_flops: Mapping[str, float] = dataclasses.field(hash=False)  # a dict has no hash
    link_bandwidth: float


# Sources: the makers' data sheets ("AMD Instinct MI300X / MI325X / MI355X Accelerator", "NVIDIA H100 Tensor
# Core GPU", SXM5) for memory (capacities of HBM are whole numbers of GiB), bandwidth, clock and peaks; the
# ROCm documentation's table "AMD GPU specifications" for compute units and LDS; NVIDIA's "CUDA C++
# Programming Guide", compute capability 9.0, for shared memory.
#
# A peak is compute units x clock x operations a clock of one unit, which AMD's white papers on CDNA 3 and
# CDNA 4 give as 2048 and 4096 in bfloat16, and twice that in float8; so are the data sheets' figures (for
# MI355X rounded there to 2.5 and 5.0 PFLOP/s), and NVIDIA's with 4096.
#
# Links: seven of AMD's Infinity Fabric, one to each other device of a host, of 128 GB/s (MI355X: 153.6) in
# both directions together; 900 GB/s of NVLink in both directions together.
_CDNA3 = {"bfloat16": 1307.4e12, "float8": 2614.9e12}

DEVICES = {
    "mi300x": Device(
        name="AMD Instinct MI300X",
        memory=192 * GIB,
        arch="gfx942",
        compute_units=304,
        lds_bytes=64 * 1024,
        bandwidth=5.3e12,
        clock_ghz=2.1,
        peak_flops=_CDNA3,
        link_bandwidth=7 * 64e9,
    ),
    "mi325x": Device(
        name="AMD Instinct MI325X",
        memory=256 * GIB,
        arch="gfx942",
        compute_units=304,
        lds_bytes=64 * 1024,
        bandwidth=6.0e12,
        clock_ghz=2.1,
        peak_flops=_CDNA3,
        link_bandwidth=7 * 64e9,
    ),
    "mi355x": Device(
        name="AMD Instinct MI355X",
        memory=288 * GIB,
        arch="gfx950",
        compute_units=256,
        lds_bytes=160 * 1024,
        bandwidth=8.0e12,
        clock_ghz=2.4,
        peak_flops={"bfloat16": 2516.6e12, "float8": 5033.2e12},
        link_bandwidth=7 * 76.8e9,
    ),
    "h100": Device(
        name="NVIDIA H100",
        memory=80 * GIB,
        arch="sm_90",
        compute_units=132,
        lds_bytes=228 * 1024,
        bandwidth=3.35e12,
        clock_ghz=1.83,
        peak_flops={"bfloat16": 989.4e12, "float8": 1978.9e12},
        link_bandwidth=450e9,
    ),
}


def find_device(name: str) -> Device:
    """The device of a short name.

    Raises:
        InputError: there is none.
    """
    try:
        return DEVICES[name.lower()]
    except (KeyError, AttributeError):
        raise InputError(f"device is {name!r}; expected one of {', '.join(DEVICES)}.") from None

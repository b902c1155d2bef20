"""The accelerators that deployments are planned for."""

import dataclasses

from qwen_moe_jax.errors import InputError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as its maker writes it.
        memory: bytes of it, as the driver reports them to within a percent.
    """

    name: str
    memory: int


# Makers' data sheets: capacities of HBM are whole numbers of GiB.
DEVICES = {
    "mi300x": Device("AMD Instinct MI300X", 192 * GIB),
    "mi325x": Device("AMD Instinct MI325X", 256 * GIB),
    "mi355x": Device("AMD Instinct MI355X", 288 * GIB),
    "h100": Device("NVIDIA H100", 80 * GIB),
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

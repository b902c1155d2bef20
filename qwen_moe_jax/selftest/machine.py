"""What the selftest runs on: versions, devices, and the table of implementations."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from qwen_moe_jax.devices import DEVICES, Device
from qwen_moe_jax.kernels.table import AMD, Kernels
from qwen_moe_jax.selftest.report import Outcome

# Packages whose versions decide what runs, beside jax's plugins ("jax-rocm7-plugin", "jax-rocm7-pjrt").
_PACKAGES = ("qwen-moe-jax", "flax", "numpy", "ml-dtypes")
# Beginnings of the environment's variables that change what XLA, RCCL or the driver do.
_VARIABLES = (
    "XLA_",
    "JAX_",
    "NCCL_",
    "RCCL_",
    "HIP_",
    "HSA_",
    "ROCR_",
    "GPU_",
    "AMD_",
    "CUDA_VISIBLE_DEVICES",
)


def versions() -> Outcome:
    """Of the system, Python, and the packages."""
    packages = {}
    for found in importlib.metadata.distributions():
        name = str(found.metadata["Name"]).lower().replace("_", "-")
        if name.startswith("jax") or name in _PACKAGES:
            packages[name] = found.version
    client = jax.local_devices()[0].client
    details = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted(packages.items())),
        "backend": client.platform,
        "backend_version": client.platform_version,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }
    plugins = [f"{name} {version}" for name, version in packages.items() if name.startswith("jax-")]
    said = [f"python {platform.python_version()}", f"jax {jax.__version__}", *sorted(plugins)]
    return Outcome(summary=", ".join(said), details=details)


def devices() -> Outcome:
    """All that jax sees."""
    found = [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "compute_capability": str(getattr(device, "compute_capability", "")) or None,
            "memory": device.memory_stats(),
        }
        for device in jax.devices()
    ]
    first = jax.devices()[0]
    limit = memory_limit(first)
    known = known_device(first)
    said = f"{len(found)} x {first.device_kind}"
    said += "" if limit is None else f", {limit / 1e9:.0f} GB for JAX"
    said += "" if known is None else f" ({known.name} of devices.py)"
    return Outcome(summary=said, details={"devices": found, "known_as": known and known.name})


def table(kernels: Kernels) -> Outcome:
    """Which implementations run here, in either dtype."""
    details = {
        "target": kernels.target,
        "kernels": how_kernels_run(kernels.target),
        "compiler_options": kernels.compiler_options,
        **{dtype: kernels.lines(dtype) for dtype in ("float32", "bfloat16")},
    }
    return Outcome(
        summary=f"target {kernels.target}; Pallas kernels are {details['kernels']}", details=details
    )


def how_kernels_run(target: str) -> str:
    """ "compiled" on the targets that kernels are for, elsewhere "interpreted"."""
    return "compiled" if target in AMD else "interpreted"


def known_device(device: Any) -> Device | None:
    """What `devices.py` has of a device of JAX; None where its kind is none of those."""
    kind = device.device_kind.lower()
    for known in DEVICES.values():
        if known.name.split()[-1].lower() in kind.split():
            return known
    return None


def memory_limit(device: Any) -> int | None:
    """Bytes that JAX may allocate on a device, or None where it does not say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def free_memory(device: Any) -> int | None:
    """Bytes of them that are not in use."""
    stats = device.memory_stats() or {}
    return None if "bytes_limit" not in stats else stats["bytes_limit"] - stats.get("bytes_in_use", 0)

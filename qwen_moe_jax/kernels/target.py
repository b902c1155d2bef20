"""What programs are compiled for, on this machine."""

import jax

from qwen_moe_jax.kernels.table import AMD


def current_target() -> str:
    """The target of JAX's default device: "cpu", an AMD architecture of the table, or "gpu"."""
    if jax.default_backend() == "cpu":
        return "cpu"
    # of an AMD device the architecture, "gfx950:sramecc+:xnack-"; of others a number
    architecture = str(getattr(jax.devices()[0], "compute_capability", "")).partition(":")[0]
    return architecture if architecture in AMD else "gpu"

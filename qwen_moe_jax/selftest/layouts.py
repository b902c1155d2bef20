"""Meshes of all visible devices against one of them, and the bandwidth between them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen_moe_jax.devices import Device
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.layout_check import check_layout
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import make_mesh
from qwen_moe_jax.parallel.partial_sums import all_reduced
from qwen_moe_jax.selftest.machine import known_device
from qwen_moe_jax.selftest.measure import seconds_a_call
from qwen_moe_jax.selftest.models import Models
from qwen_moe_jax.selftest.report import Outcome, Part, Skip

# float32 of all devices' sums, a device.
_GPU_BYTES, _CPU_BYTES = 256 << 20, 4 << 20
_ONE = "there is one device"


def layout_parts(models: Models) -> list[Part]:
    """A check for each of a few meshes that take all devices."""
    n = jax.local_device_count()
    if n == 1:
        return [("layouts", _skip)]
    found = [
        _part(models, "float32", expert=n),
        _part(models, "float32", expert=n, dispatch="all_to_all"),
        _part(models, "float32", tensor=n),
    ]
    if n >= 4 and n % 2 == 0:
        found.append(_part(models, "bfloat16", expert=n // 2, tensor=2))
    return found


def _part(models: Models, dtype: str, *, expert: int = 1, tensor: int = 1, dispatch: str = "psum") -> Part:
    def run() -> Outcome:
        models.free()
        mesh = make_mesh(expert=expert, tensor=tensor)
        kernels = make_kernels(models.target)
        layout = Layout(
            models.config,
            mesh,
            expert_dispatch=dispatch,
            # XLA:CPU has no such operation
            ragged=models.target != "cpu",
        )
        report = check_layout(models.folder, layout, jnp.dtype(dtype), kernels)
        worst = max(report.comparisons, key=lambda c: np.nan_to_num(c.difference, nan=np.inf))
        said = f"{worst.branch}, {worst.place}" if worst.branch != worst.place else worst.place
        return Outcome(
            ok=report.ok,
            summary=f"largest difference from one device {worst.difference:.1e} ({said}), tolerance "
            f"{report.tolerance:.0e}, {dtype}",
            details={
                "layout": report.layout,
                "dtype": dtype,
                "tolerance": report.tolerance,
                "tokens": report.tokens,
                "ties": report.ties,
                "differences": {f"{c.place}, {c.branch}": c.difference for c in report.comparisons},
            },
        )

    axes = [f"{name} {size}" for name, size in (("expert", expert), ("tensor", tensor)) if size > 1]
    return f"layout {' x '.join(axes)}{'' if dispatch == 'psum' else f' {dispatch}'}", run


def all_reduce() -> Outcome:
    """Bytes a second of a sum over all devices, of which the links' figure is an upper bound."""
    devices = jax.local_devices()
    n = len(devices)
    if n == 1:
        raise Skip(_ONE)
    size = _CPU_BYTES if devices[0].platform == "cpu" else _GPU_BYTES
    mesh = make_mesh(expert=n)
    spec = PartitionSpec("expert")
    data = jax.jit(lambda: jnp.ones((n, size // 4), jnp.float32), out_shardings=NamedSharding(mesh, spec))()

    def summed(x: jax.Array) -> jax.Array:
        return all_reduced(x, ("expert",))

    run = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    right = bool((run(data) == n).all())
    seconds = seconds_a_call(lambda: run(data))
    # what a ring sends; see `aot/minimum.py`
    rate = 2 * (n - 1) / n * size / seconds
    known: Device | None = known_device(devices[0])
    share = (
        "" if known is None else f", {rate / known.link_bandwidth:.0%} of {known.link_bandwidth / 1e9:.0f}"
    )
    return Outcome(
        ok=right,
        summary=f"{rate / 1e9:.3g} GB/s sent by each of {n} devices{share}"
        + ("" if right else "; the sum is wrong"),
        details={
            "devices": n,
            "bytes": size,
            "seconds": seconds,
            "bytes_per_second": rate,
            "link_bandwidth": known and known.link_bandwidth,
            "right": right,
        },
    )


def _skip() -> Outcome:
    raise Skip(_ONE)

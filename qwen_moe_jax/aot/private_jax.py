"""Every private name of jax that ahead-of-time compilation for AMD GPUs needs. Checked with jax 0.10.2.

jax finds compilers in installed packages, and expects a device behind each. There is no public way to hand it
the compiler alone, nor to count the operations of a program that no device here can run.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import jax

from qwen_moe_jax.errors import ToolchainError

CHECKED_WITH = "0.10.2"

_BRIDGE = "jax._src.xla_bridge"
_CLIENT = "jaxlib.xla_client"


def _private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ToolchainError(
            f"jax {jax.__version__} has no {module}.{name}, which compiling for AMD GPUs needs; it was "
            f"checked with jax {CHECKED_WITH}. Install that one."
        ) from None


def has_compiler(platform: str) -> bool:
    """Whether jax can describe devices of a platform already, by an installed plugin or `add_compiler`.

    Installed plugins are looked for first, as jax does when it is first asked for a device.
    """
    _private(_BRIDGE, "_discover_and_register_pjrt_plugins")()
    return platform in _private(_BRIDGE, "_topology_factories")


def add_compiler(platform: str, plugin: Path) -> None:
    """Lets jax describe devices of a platform and compile for them, by a PJRT plugin, without having any.

    jax is given the plugin's compiler and, in place of its devices, a refusal: so the platform is never the
    default one, nor one of `jax.devices()`, and what runs on the CPU runs as before.

    Raises:
        jax.errors.JaxRuntimeError: the plugin cannot be loaded.
    """
    load = _private(_CLIENT, "load_pjrt_plugin_dynamically")
    make_topology = _private(_CLIENT, "make_c_api_device_topology")
    register = _private(_BRIDGE, "register_backend_factory")

    def refuse() -> Any:
        raise RuntimeError(f"platform {platform!r} is only compiled for in this process, there is no device")

    register(
        platform,
        refuse,
        fail_quietly=True,
        make_topology=partial(make_topology, load(platform, str(plugin))),
    )


def cost_analysis(compiled: jax.stages.Compiled) -> dict[str, float]:
    """XLA's count of what one device does in a compiled program: "flops", "bytes accessed" and more.

    The client that compiles without a device does not implement `Compiled.cost_analysis`, so the CPU's does
    it. What XLA does not see into, calls of libraries and kernels written by hand, counts as -1 flop each.
    """
    analyse = _private("jaxlib._jax", "hlo_module_cost_analysis")
    executable: Any = compiled.runtime_executable()
    (module,) = executable.hlo_modules()
    return analyse(jax.devices("cpu")[0].client, module)

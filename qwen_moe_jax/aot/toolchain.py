"""XLA's compiler for AMD GPUs on a machine that has neither GPU nor ROCm: fetched, made ready, loaded.

It is the PJRT plugin of the wheel `jax-rocm7-pjrt`. Installed as a package, jax would find it and complain
about missing GPUs in every program; so it is kept in a folder of its own, with stand-ins for the ROCm
libraries that it is linked against (`stubs.py`), and only what asks for it loads it.
"""

import contextlib
import ctypes
import errno
import glob
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from tqdm import tqdm

from qwen_moe_jax.aot import private_jax
from qwen_moe_jax.aot.stubs import build_stubs, c_compiler, read_shared_object
from qwen_moe_jax.devices import DEVICES, Device
from qwen_moe_jax.errors import InputError, ToolchainError
from qwen_moe_jax.host import user_cache

PLATFORM = "rocm"
PACKAGE = "jax-rocm7-pjrt"
COMMAND = "qwen-moe-jax toolchain"

_PLUGIN = "xla_rocm_plugin.so"
_STUBS = "stubs"
_MANIFEST = "toolchain.json"
# The library of ROCm without which there is no other.
_RUNTIME = "libamdhip64."
# The wheel of 0.10.2 has 154 MB, and 503 MB unpacked.
_ROOM = 700_000_000
_PIECE = 4 << 20


def default_folder() -> Path:
    """The user's cache folder for the toolchain of the jax that runs; the plugin serves any Python."""
    return user_cache("rocm", jax.__version__)


def prepare(folder: str | Path | None = None, *, progress: bool = False) -> Path:
    """Downloads the compiler and builds what it needs to load, if that has not been done.

    All is made in a folder beside, which gets its name when it is whole; what an interrupted call left there
    is made anew by the next. Of calls at the same time one works and the others wait for it.

    Args:
        folder: a new or empty folder; None for the user's cache.
        progress: show bars on standard error.

    Returns:
        The folder.

    Raises:
        ToolchainError: the machine is no Linux on x86_64, lacks pip, a C compiler or room, the wheel cannot
            be downloaded, or the folder holds something else.
    """
    folder = default_folder() if folder is None else Path(folder).absolute()
    if _is_taken(folder):
        _read_manifest(folder)
        return folder
    _check_machine()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{folder.name}.lock")):
            if _is_taken(folder):  # by a call that this one waited for
                _read_manifest(folder)
            else:
                _make(folder, progress)
    except OSError as error:
        raise _as_sentence(error, folder) from error
    return folder


def load(folder: str | Path | None = None) -> None:
    """Makes platform "rocm" one that jax can compile for in this process. Calling it again does nothing.

    What the process runs, and where, stays as it is: the platform has no devices but those of `topology`.
    Where an installed plugin of jax has registered the platform, that one is used.

    Args:
        folder: what `prepare` made; None for the user's cache.

    Raises:
        ToolchainError: nothing is prepared, it is of another jax, or it cannot be loaded.
    """
    if private_jax.has_compiler(PLATFORM):
        return
    folder = default_folder() if folder is None else Path(folder).absolute()
    manifest = _read_manifest(folder)
    plugin = folder / _PLUGIN
    real = _real_runtime(plugin)
    try:
        if real is None:
            # The loader takes a library that is loaded already for the one of the same name that it needs;
            # nothing else in the process sees the functions of the stand-ins.
            for name in manifest["stubs"]:
                ctypes.CDLL(str(folder / _STUBS / name), mode=ctypes.RTLD_LOCAL)
        private_jax.add_compiler(PLATFORM, plugin)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        if real is None:
            raise ToolchainError(
                f"The compiler in {folder} cannot be loaded: {reason}. Delete the folder and run `{COMMAND}`."
            ) from None
        raise ToolchainError(
            f"The compiler in {folder} cannot be loaded with the ROCm of this machine ({real}): {reason}. "
            "Install all of ROCm 7, or jax's own plugin (jax[rocm7-local])."
        ) from None


def topology(device: Device, shape: tuple[int, int, int] = (1, 1, 1)) -> list[Any]:
    """Devices to compile for, that do not exist.

    Args:
        device: an AMD one.
        shape: how many slices (hosts that share a fast network), hosts a slice and devices a host.

    Returns:
        slices x hosts x devices of them (`jax.Device`), for a mesh. Nothing can be run or stored on them.

    Raises:
        InputError: the device's architecture is not AMD's or not known, or the shape is none.
        ToolchainError: as of `load`.
    """
    amd = {name: one.arch for name, one in DEVICES.items() if one.arch.startswith("gfx")}
    if device.arch not in amd.values():  # which aborts the process if it gets as far as LLVM
        raise InputError(
            f"device is {device.name} ({device.arch}); programs are compiled ahead of time for "
            f"{', '.join(sorted(set(amd.values())))} only ({', '.join(amd)})."
        )
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise InputError(f"shape is {shape!r}; expected slices, hosts and devices, each at least 1.")
    load()
    description = topologies.get_topology_desc(
        "", PLATFORM, target_config=target_config(device), topology="x".join(map(str, shape))
    )
    return list(description.devices)


def target_config(device: Device) -> str:
    """A device for XLA: a `GpuTargetConfigProto` in text form.

    What `Device` does not say is the same in CDNA 3 and CDNA 4; XLA's own `mi300.txtpb` and `mi350.txtpb`
    give the same values. The suffix of the architecture says that memory has error correction and that pages
    are not fetched on demand, as data centres run these devices.
    """
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024
            threads_per_warp: 64
            threads_per_core_limit: 2048
            fpus_per_core: 128
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65536
            block_dim_limit_z: 65536
            registers_per_core_limit: 131072
            registers_per_block_limit: 131072
            l2_cache_size: 4194304
            core_count: {device.compute_units}
            shared_memory_per_block: {device.lds_bytes}
            shared_memory_per_block_optin: {device.lds_bytes}
            shared_memory_per_core: {device.lds_bytes}
            memory_bandwidth: {int(device.bandwidth)}
            clock_rate_ghz: {device.clock_ghz}
            device_memory_size: {device.memory}
            rocm_compute_capability {{ gcn_arch_name: "{device.arch}:sramecc+:xnack-" }}
        }}
        platform_name: "ROCM"
        dnn_version_info {{ }}
        device_description_str: "{device.name}"
    """


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _check_machine() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise ToolchainError(
            f"This machine is {sys.platform} on {platform.machine()}; the compiler for AMD GPUs exists for "
            "Linux on x86_64 only."
        )
    if importlib.util.find_spec("pip") is None:
        raise ToolchainError(
            f"{sys.executable} has no pip, which downloads the compiler; install it (python -m ensurepip)."
        )
    c_compiler()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits until no other process is inside. The system opens the lock of one that was killed."""
    import fcntl  # where there is none, the machine is refused before

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, progress: bool) -> None:
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    # A pip that outlived its call must not write into the folder of this one.
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    free = shutil.disk_usage(folder.parent).free
    if free < _ROOM:
        raise ToolchainError(
            f"{folder.parent} has {free / 1e6:.0f} MB left; the compiler for AMD GPUs needs "
            f"{_ROOM / 1e6:.0f} MB. Make room, or give a folder on another disk."
        )
    part.mkdir()
    try:
        wheel = _download(part, progress)
        _unpack(wheel, part / _PLUGIN, progress)
        wheel.unlink()
        manifest = {
            "jax": jax.__version__,
            "wheel": wheel.name,
            "plugin_bytes": (part / _PLUGIN).stat().st_size,
            "stubs": build_stubs(part / _PLUGIN, part / _STUBS),
            "compiler": _compiler_target(),
        }
        (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in part.rglob("*"):
            _sync(path)  # or a name could outlive, in a power cut, what it stands for
        part.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(folder: Path, progress: bool) -> Path:
    """Has pip download the wheel of the jax that runs."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--no-color"]
    options += ["--dest", str(folder)] if progress else ["--dest", str(folder), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={jax.__version__}"],
        stdout=2 if progress else subprocess.DEVNULL,  # bars are not what a command prints
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},  # a small /tmp does not hold the wheel
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ToolchainError(_why_no_wheel(done.stderr))


def _why_no_wheel(output: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.strip()]
    errors = [line.rstrip(".") for line in errors] or ["it gave no reason"]
    begin = f"pip could not download {PACKAGE} {jax.__version__}"
    versions = next((line for line in errors if "(from versions: " in line), None)
    # "none" pip says of an index that it did not reach, too
    if versions and "(from versions: none)" not in versions:
        there = versions.partition("(from versions: ")[2].rstrip(")").split(", ")
        return (
            f"{begin}, which does not exist. Install a jax that it exists for, like {', '.join(there[-6:])}."
        )
    reason = versions or errors[-1]
    return f"{begin}: {reason}. Check the network and pip's index (pip config list), and try again."


def _unpack(wheel: Path, plugin: Path, progress: bool) -> None:
    """Takes the plugin out of its wheel."""
    with zipfile.ZipFile(wheel) as archive:  # pip has checked its digest
        found = [entry for entry in archive.infolist() if entry.filename.endswith(f"/{_PLUGIN}")]
        if len(found) != 1:
            raise ToolchainError(f"{wheel.name} holds {len(found)} files {_PLUGIN}; expected 1.")
        bar = tqdm(
            total=found[0].file_size, unit="B", unit_scale=True, desc="Unpacking", disable=not progress
        )
        with bar, archive.open(found[0]) as source, plugin.open("wb") as out:
            while piece := source.read(_PIECE):
                out.write(piece)
                bar.update(len(piece))


def _compiler_target() -> str:
    """What the C compiler compiles for, as it names it itself."""
    done = subprocess.run([*c_compiler(), "-dumpmachine"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What `prepare` wrote of a whole toolchain for the jax that runs."""
    if not _is_taken(folder):
        raise ToolchainError(f"The compiler for AMD GPUs is not in {folder}; run `{COMMAND}` to fetch it.")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, size = manifest["jax"], manifest["plugin_bytes"]
        whole = (folder / _PLUGIN).stat().st_size == size
        whole = whole and all((folder / _STUBS / name).is_file() for name in manifest["stubs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolchainError(
            f"{folder} holds something, but not a compiler for AMD GPUs ({error}); give another folder, or "
            f"delete it and run `{COMMAND}`."
        ) from None
    if version != jax.__version__:
        raise ToolchainError(
            f"{folder} holds the compiler of jax {version}, and this is jax {jax.__version__}; run "
            f"`{COMMAND}`, with another folder if you gave this one."
        )
    if not whole:
        raise ToolchainError(f"The compiler in {folder} is damaged; delete the folder and run `{COMMAND}`.")
    return manifest


def _real_runtime(plugin: Path) -> str | None:
    """The library of a real ROCm that the plugin would be loaded with, or None."""
    wants = read_shared_object(plugin)
    name = next((name for name in wants.needed if name.startswith(_RUNTIME)), None)
    if name is None:
        return None
    for candidate in [name, *(str(folder / name) for folder in wants.search if (folder / name).exists())]:
        with contextlib.suppress(OSError):
            ctypes.CDLL(candidate)
            return candidate
    return None


def _as_sentence(error: OSError, folder: Path) -> ToolchainError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ToolchainError(
            f"The disk of {folder.parent} is full; the compiler for AMD GPUs needs {_ROOM / 1e6:.0f} MB. "
            "Make room, or give a folder on another disk."
        )
    return ToolchainError(
        f"The compiler for AMD GPUs could not be put into {folder}: {error}. Give a folder that can be "
        "written."
    )

"""The C++ kernels of this folder, compiled at first use and registered with XLA.

One library a *variant*: what a processor can do decides which one is built and loaded.

    amx         AVX-512 with bfloat16 tiles (Intel, from Sapphire Rapids on)
    avx512bf16  AVX-512 with products of bfloat16 pairs: AMD only, since on Intel's processors they run at
                half the speed of float32's
    avx512      AVX-512
    avx2        AVX2 with FMA
    plain       whatever the compiler takes for granted: SSE2, or NEON on 64-bit Arm

A library lies in the user's cache under a name that its sources, compiler, flags and processor decide, so
that nothing stale is ever loaded.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.host import processor_features, processor_says, user_cache

_SOURCES = Path(__file__).parent
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Variant -> the processor's flags (as Linux calls them) that it needs, best first.
VARIANTS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512bf16": (*_AVX512, "avx512_bf16"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
    "plain": (),
}
# No -ffast-math: NaN and infinities are kept.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
          "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")  # fmt: skip
OPERATIONS = (
    "rows",
    "linear",
    "experts",
    "conv",
    "delta_step",
    "delta_look",
    "delta_chunks",
    "attention",
    "append",
    "move_states",
    "reserve",
)
_loaded: list["Library"] = []
# Seconds after which a compiler is given up.
_PATIENCE = 300


class BuildError(Exception):
    """Why there is no library, in a sentence."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        variant: a key of `VARIANTS`.
        file: it was loaded from.
        prefix: of the names its operations are registered under.
        functions: of the library.
    """

    variant: str
    file: Path
    prefix: str
    functions: ctypes.CDLL

    def target(self, operation: str) -> str:
        """What `jax.ffi.ffi_call` calls the operation."""
        return f"{self.prefix}_{operation}"


@functools.cache
def native_variant() -> str | None:
    """The variant that runs here, built and loaded, or None: then there was one warning that says why."""
    try:
        return load(best_variant()).variant
    except BuildError as error:
        warnings.warn(
            f"No CPU kernels, so XLA's own products run, several times slower in bfloat16: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def copy_finite(to: np.ndarray, values: np.ndarray) -> bool | None:
    """Copies contiguous values by the C++ library: whether all are finite.

    Args:
        to: contiguous, of the same size in bytes; is written.
        values: contiguous, float32, bfloat16 or float8_e4m3fn.

    Returns:
        None, and nothing is copied, where no library was loaded (for a model on a CPU one was).
    """
    if not _loaded:
        return None
    function = _loaded[-1].functions.qwen_moe_jax_copy_finite
    size = ctypes.c_long(values.nbytes)
    sources = ctypes.c_void_p(values.ctypes.data)
    return bool(function(ctypes.c_void_p(to.ctypes.data), sources, size, ctypes.c_int(values.itemsize)))


def runnable_variants() -> list[str]:
    """The variants that the processor runs, best first."""
    found = processor_features()
    return [name for name, needed in VARIANTS.items() if found.issuperset(needed)]


def best_variant() -> str:
    """The fastest variant that the processor runs."""
    runs = runnable_variants()
    if processor_says("vendor_id") != "AuthenticAMD" and "avx512bf16" in runs:
        runs.remove("avx512bf16")
    return runs[0]


@functools.cache
def load(variant: str) -> Library:
    """Builds a variant if the cache has none, loads it and registers its operations with XLA.

    Raises:
        InputError: no such variant.
        BuildError: no compiler, a failed build, or a processor that cannot run it.
    """
    if variant not in VARIANTS:
        raise InputError(f"the CPU kernels have no variant {variant!r}; there are {', '.join(VARIANTS)}.")
    missing = set(VARIANTS[variant]) - processor_features()
    if missing:
        raise BuildError(f"this processor lacks {', '.join(sorted(missing))}, which {variant!r} needs.")
    file = build(variant)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(f"{file} cannot be loaded ({error}).") from error
    if not library.qwen_moe_jax_ready():
        raise BuildError("the operating system does not lend the processor's tile registers.")
    prefix = f"qwen_moe_jax_{file.stem}"
    for operation in OPERATIONS:
        handler = jax.ffi.pycapsule(getattr(library, f"qwen_moe_jax_{operation}"))
        jax.ffi.register_ffi_target(f"{prefix}_{operation}", handler, platform="cpu")
    _loaded.append(Library(variant, file, prefix, library))
    return _loaded[-1]


def build(variant: str) -> Path:
    """The library of a variant in the cache, compiled if it is not there.

    Args:
        variant: a key of `VARIANTS`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = _compiler()
    spelt = (name.replace("avx512_", "avx512").replace("_", "-") for name in VARIANTS[variant])
    flags = (*_FLAGS, *(f"-m{name}" for name in spelt))
    file = user_cache("cpu") / f"{variant}-{_digest(compiler, flags)}.so"
    if file.is_file():
        return file
    print(f"qwen-moe-jax: building CPU kernels ({variant}), once ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        headers = ("-isystem", jax.ffi.include_dir())
        command = [compiler, *flags, *headers, str(_SOURCES / "handlers.cc"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler} did not run ({error}).") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise BuildError(f"{compiler} failed: {first.strip()}")
        os.replace(made, file)  # another process may have built the same meanwhile
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return file


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"CXX names {asked}, which is not there."
        if asked
        else "there is no C++ compiler (g++ or clang++); install one."
    )


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    """Of everything that decides what is built, and of the processor."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"{compiler} did not run ({error}).") from error
    found = hashlib.sha256(version)
    for part in (compiler, *flags, jax.__version__, platform.machine(), *sorted(processor_features())):
        found.update(part.encode() + b"\0")
    for source in sorted(_SOURCES.glob("*.[hc]*")):
        found.update(source.read_bytes())
    return found.hexdigest()[:12]

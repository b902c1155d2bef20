"""The persistent compilation cache: a second process does not compile what the first one did."""

import hashlib
import platform
from pathlib import Path

import jax

from qwen_moe_jax.host import processor_features, user_cache


def default_cache_folder() -> Path:
    """The user's cache folder for compiled programs, one subfolder for each kind of host processor.

    XLA:CPU programs hold machine code for the processor that compiled them, so hosts that share a home
    folder must not share programs.
    """
    return user_cache("xla", _processor())


def _processor() -> str:
    features = sorted(processor_features() or platform.processor().split())
    digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"


def enable_compilation_cache(folder: str | Path | None) -> None:
    """Keeps compiled programs in `folder` from now on, for this process.

    Args:
        folder: "auto" for the user's cache folder, a path, or None to leave JAX's setting alone. A
            folder that the user gave JAX (`jax_compilation_cache_dir`) wins over "auto".
    """
    if folder is None or (folder == "auto" and jax.config.values["jax_compilation_cache_dir"]):
        return
    path = default_cache_folder() if folder == "auto" else Path(folder)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs are many here (one a bucket); each saves a noticeable part of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

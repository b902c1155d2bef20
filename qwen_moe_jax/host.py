"""The machine that this process runs on: its user's cache folder, and what its processor is."""

import functools
import os
from pathlib import Path


def user_cache(*folders: str) -> Path:
    """A folder of this library in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.joinpath("qwen_moe_jax", *folders)


@functools.cache
def processor_says(*fields: str) -> str:
    """What Linux says of the first processor in the first of these fields that there is, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fields)), "")


def processor_features() -> frozenset[str]:
    """The processor's features as Linux names them; empty where that is not to be had."""
    return frozenset(processor_says("flags", "Features").split())

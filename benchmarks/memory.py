"""How the benchmarks in this folder measure memory; imports nothing that would take some."""

from pathlib import Path


def process_memory(field: str, process: int | str = "self") -> int:
    """A field of /proc/PROCESS/status, such as VmRSS (resident now) or VmHWM (at most so far), in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

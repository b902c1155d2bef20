"""Loading onto one to eight devices: bandwidth beside `cat`, host memory, bytes read.

    python benchmarks/loading.py CHECKPOINT [--repeat 3] [--held bfloat16] [--touch] [--layouts 1x1 8x1 ...]

Every load is a process of its own with pretended CPU devices; matrices are held in the dtype they are stored
in (--held to convert), so that a byte read is a byte held. A layout is EXPERT x TENSOR. Printed for each:

- GB/s of the bytes read, best and median of the repeats, and the best over that of `cat FILES > /dev/null`,
  run in turn with it (both out of the page cache: the first pass warms it);
- beyond: the most memory the process had beyond what its devices hold and it had before, in MB, beside the
  largest slice of a device;
- read / share: bytes read over the bytes of the different slices that the devices hold.

With --touch, the process first touches and frees as much memory as the files have bytes: a virtual machine
may get memory from its host page by page when it is touched first, which `cat` never needs.
"""

import argparse
import json
import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path


def _resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def load_here(folder: Path, expert: int, tensor: int, held: str, touch: bool) -> None:
    """One load, in this process; prints its numbers as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", expert * tensor)
    from qwen_moe_jax import make_mesh
    from qwen_moe_jax.checkpoint.layout import parameter_forms, parameter_shapes, text_keys
    from qwen_moe_jax.checkpoint.orbax import is_orbax, read_orbax_targets
    from qwen_moe_jax.checkpoint.reader import read_targets
    from qwen_moe_jax.checkpoint.stored_config import read_config
    from qwen_moe_jax.model.params import DtypePolicy
    from qwen_moe_jax.parallel.layout import Layout

    config = read_config(folder)
    layout = Layout(config, make_mesh(1, expert, tensor))
    policy = DtypePolicy(compute=jnp.dtype(held), matrix=jnp.dtype(held), vector=jnp.dtype(held))
    targets, shapes = layout.targets(policy), parameter_shapes(config)
    jnp.zeros(1).block_until_ready()
    if touch:
        rows = np.empty(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), np.uint8)
        rows[:: mmap.PAGESIZE] = 1
        del rows
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if is_orbax(folder):
        arrays, report = read_orbax_targets(folder, targets, shapes, parameter_forms(config))
    else:
        arrays, report = read_targets(folder, targets, shapes, keys=text_keys(config))
    jax.block_until_ready(list(arrays.values()))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    share, holds, largest = 0, 0, 0
    for array in arrays.values():
        slices = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
        share += sum(slices.values())
        holds += sum(shard.data.nbytes for shard in array.addressable_shards)
        largest = max(largest, *slices.values())
    found = {
        "seconds": seconds,
        "read": report.read_bytes,
        "share": share,
        "holds": holds,
        "largest": largest,
        "beyond": peak - before - holds,
    }
    print(json.dumps(found))


def cat_seconds(folder: Path) -> float:
    """Seconds of `cat` over the checkpoint's files."""
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file() and file.suffix != ".json")
    start = time.perf_counter()
    with Path("/dev/null").open("wb") as nowhere:
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
    return time.perf_counter() - start


def main() -> int:
    """Measures every layout in turn with cat and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--held", default="bfloat16")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x1", "1x2", "4x2", "8x1", "1x8"])
    parser.add_argument("--touch", action="store_true", help="have the memory given by the host before")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        expert, tensor = args.one
        load_here(args.folder, expert, tensor, args.held, args.touch)
        return 0
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    cat_seconds(args.folder)
    print("| expert x tensor | GB/s | median | of cat | beyond, MB | largest slice, MB | read / share |")
    print("|---|---|---|---|---|---|---|")
    for layout in args.layouts:
        expert, tensor = layout.split("x")
        command = [sys.executable, __file__, str(args.folder), "--held", args.held, "--one", expert, tensor]
        command += ["--touch"] * args.touch
        runs, cats = [], []
        for _ in range(args.repeat):
            cats.append(size / cat_seconds(args.folder))
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        rates = sorted(run["read"] / run["seconds"] for run in runs)
        print(
            f"| {expert} x {tensor} | {rates[-1] / 1e9:.2f} | {rates[len(rates) // 2] / 1e9:.2f} | "
            f"{rates[-1] / max(cats):.0%} | {max(run['beyond'] for run in runs) / 1e6:.0f} | "
            f"{runs[0]['largest'] / 1e6:.0f} | {runs[0]['read'] / runs[0]['share']:.3f} |",
            flush=True,
        )
    print(f"\ncat: {max(cats) / 1e9:.2f} GB/s; {size / 1e9:.2f} GB in files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

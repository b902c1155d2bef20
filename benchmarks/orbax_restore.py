"""Restoring from Orbax against reading safetensors of equal bytes, in turns, each in a process of its own.

    python benchmarks/orbax_restore.py FOLDER [--size mid] [--repeat 5]

Makes in FOLDER what it lacks of a checkpoint with random weights (about 5 GB for `mid`; delete it
afterwards): as transformers saves it, one matrix an expert; as this library saves it, experts fused; and in
Orbax layout, with `convert_checkpoint`. A reading of each that does not count warms the page cache.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

_LOADER = Path(__file__).with_name("load_memory.py")
_NAMES = {
    "matrices": "safetensors, one matrix an expert",
    "fused": "safetensors, fused experts",
    "orbax": "Orbax",
}


def _make(base: Path, size: str) -> None:
    import jax
    import jax.numpy as jnp
    from make_checkpoint import make_checkpoint

    from qwen_moe_jax.checkpoint.convert import convert_checkpoint
    from qwen_moe_jax.checkpoint.layout import parameter_shapes
    from qwen_moe_jax.checkpoint.names import is_matrix
    from qwen_moe_jax.checkpoint.reader import read_parameters
    from qwen_moe_jax.checkpoint.writer import write_safetensors
    from qwen_moe_jax.config import ModelConfig

    source = base / "matrices"
    if not source.exists():
        source.mkdir(parents=True)
        make_checkpoint(size, source, "bfloat16")
    config = ModelConfig.from_file(source)
    if not (base / "fused").exists():
        structs = {
            name: jax.ShapeDtypeStruct(shape, jnp.bfloat16 if is_matrix(name) else jnp.float32)
            for name, shape in parameter_shapes(config).items()
        }
        parameters, _ = read_parameters(source, structs)
        write_safetensors(base / "fused", parameters, config, dtype=jnp.bfloat16)
    if not (base / "orbax" / "orbax").exists():
        start = time.perf_counter()
        report = convert_checkpoint(source, base / "orbax")
        seconds = time.perf_counter() - start
        print(f"converted {report.written_bytes / 1e9:.2f} GB in {seconds:.1f} s, on the disk\n")


def _read(folder: Path, held: str) -> dict[str, float]:
    command = [sys.executable, str(_LOADER), str(folder), "--one", "qwen_moe_jax", held]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Makes what is missing, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="mid")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    _make(args.folder, args.size)
    print("| | matrices held in | seconds, best | median | peak memory / held |")
    print("|---|---|---|---|---|")
    for held in ("bfloat16", "float32"):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in _NAMES}
        for _ in range(args.repeat + 1):
            for name, found in runs.items():
                found.append(_read(args.folder / name, held))
        for name, found in runs.items():
            measured = found[1:]  # the first warmed the page cache
            seconds = sorted(run["seconds"] for run in measured)
            peak = max(run["peak"] / run["held"] for run in measured)
            best, median = seconds[0], seconds[len(seconds) // 2]
            print(f"| {_NAMES[name]} | {held} | {best:.2f} | {median:.2f} | {peak:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

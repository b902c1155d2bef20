"""Seconds and peak memory of loading a checkpoint, each loader in a process of its own.

    python benchmarks/load_memory.py CHECKPOINT [--repeat 3] [--transformers]

Reads the folder (Hugging Face or Orbax layout) with matrices held in float32 and in bfloat16. Peak is the
growth of the process's resident memory, over the bytes of the parameters held afterwards. The files should
be in the page cache: the first pass warms it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from memory import process_memory
from needs import need


def _load_here(folder: Path, held: str) -> int:
    import jax
    import jax.numpy as jnp

    from qwen_moe_jax.checkpoint.layout import parameter_shapes
    from qwen_moe_jax.checkpoint.names import is_matrix
    from qwen_moe_jax.checkpoint.orbax import read_orbax
    from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
    from qwen_moe_jax.checkpoint.reader import read_parameters
    from qwen_moe_jax.config import ModelConfig

    jnp.zeros(1).block_until_ready()
    expected = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(held) if is_matrix(name) else jnp.float32)
        for name, shape in parameter_shapes(ModelConfig.from_file(folder)).items()
    }
    if is_orbax(folder):
        return _timed(lambda: sum(value.nbytes for value in read_orbax(folder, expected).values()))
    return _timed(lambda: sum(value.nbytes for value in read_parameters(folder, expected)[0].values()))


def _load_transformers(folder: Path, held: str) -> int:
    import torch
    from transformers import Qwen3_5MoeForCausalLM

    torch.set_num_threads(2)

    def load() -> int:
        model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, held))
        return sum(weight.numel() * weight.element_size() for weight in model.parameters())

    return _timed(load)


def _timed(load) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = process_memory("VmRSS"), time.perf_counter()
    held = load()
    seconds = time.perf_counter() - start
    peak = process_memory("VmHWM") - before
    print(json.dumps({"seconds": seconds, "held": held, "peak": peak}))
    return 0


def main() -> int:
    """Runs every loader `--repeat` times and prints the best time and the largest peak."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="measure the PyTorch reference as well")
    parser.add_argument("--one", nargs=2, metavar=("LOADER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    need(*(("torch", "transformers") if args.transformers else ()))
    if args.one:
        loader = _load_here if args.one[0] == "qwen_moe_jax" else _load_transformers
        return loader(args.folder, args.one[1])

    loaders = ["qwen_moe_jax", *(["transformers"] if args.transformers else [])]
    print(f"{'loader':<14}{'held':<10}{'seconds, best':>14}{'median':>8}{'held GB':>9}{'peak / held':>13}")
    for loader in loaders:
        for held in ("float32", "bfloat16"):
            command = [sys.executable, __file__, str(args.folder), "--one", loader, held]
            runs = []
            for _ in range(args.repeat):
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            seconds = sorted(run["seconds"] for run in runs)
            print(
                f"{loader:<14}{held:<10}{seconds[0]:>14.2f}{seconds[len(seconds) // 2]:>8.2f}"
                f"{runs[0]['held'] / 1e9:>9.2f}{max(run['peak'] / run['held'] for run in runs):>13.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

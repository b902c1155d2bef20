"""Decoding and prefill on 1, 2 and 8 devices that one CPU pretends to have: kernels at once share its cores.

    python benchmarks/cpu_devices.py CHECKPOINT

Prints, for each number of ranks along the expert axis and with the C++ kernels and without, tokens/s and the
processor seconds used per second: above the number of cores there would be oversubscription, and a wait for
threads that do not run would show as lost speed.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from qwen_moe_jax import QwenMoe, make_mesh  # noqa: E402


def _seconds(model: Any, ids: np.ndarray, new: int) -> float:
    usage = model.generate(ids, max_new_tokens=new, eos_token_id=[]).usage
    return usage.prefill_seconds + usage.decode_seconds


def main() -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print("| ranks | kernels | prefill 512 | cores busy | decode, batch 8 | cores busy |")
    print("|---|---|---|---|---|---|")
    for ranks in args.ranks:
        for kernels in ("auto", "xla"):
            mesh = make_mesh(expert=ranks)
            model = QwenMoe.from_pretrained(
                args.checkpoint, mesh=mesh, shared_expert="prescaled", kernels=kernels
            )
            rng = np.random.default_rng(0)
            cells = []
            for shape, new in (((1, 512), 1), ((8, 64), 33)):
                ids = rng.integers(2, model.config.vocab_size, shape)
                model.generate(ids, max_new_tokens=new, eos_token_id=[])
                found = []
                # a block of steps comes out at once, so its first token says nothing of the prefill's time
                short = 0.0
                if new > 1:
                    model.generate(ids, max_new_tokens=1, eos_token_id=[])
                    short = min(_seconds(model, ids, 1) for _ in range(args.repeat))
                for _ in range(args.repeat):
                    processor, wall = time.process_time(), time.perf_counter()
                    out = model.generate(ids, max_new_tokens=new, eos_token_id=[])
                    busy = (time.process_time() - processor) / (time.perf_counter() - wall)
                    rate = shape[1] / out.usage.prefill_seconds
                    if new > 1:
                        taken = out.usage.prefill_seconds + out.usage.decode_seconds - short
                        rate = shape[0] * (new - 1) / taken
                    found.append((rate, busy))
                rate, busy = max(found)
                cells += [f"{rate:.0f}", f"{busy:.2f}"]
            name = f"C++, {model.kernels.native}" if model.kernels.native else "XLA"
            print(f"| {ranks} | {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every model family on one CPU beside transformers: decoding one row and prefill, in turn in one run.

    python benchmarks/families.py [--size mid] [--repeat 2] [--out NAME]

Makes a checkpoint of each model type with random weights, of the sizes of `make_checkpoint.py`, in bfloat16.
Each library has a process of its own, which waits while the other works (`cpu.py`); medians are shown.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from needs import need

TYPES = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen3_moe", "qwen2_moe")


def measure(model_type: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Job -> library -> tokens a second."""
    from cpu import OURS, THEIRS, Job, Worker
    from make_checkpoint import make_checkpoint

    jobs = [Job(1, args.prompt, 0), Job(1, args.prompt, args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        count = make_checkpoint(args.size, Path(folder), "bfloat16", model_type=model_type)
        print(f"{model_type}: {count / 1e6:.0f} million parameters", flush=True)
        options = argparse.Namespace(checkpoint=Path(folder), threads=args.threads, kernels="auto")
        asked = [(OURS, "bfloat16"), *((THEIRS, dtype) for dtype in args.transformers)]
        workers = [Worker(library, dtype, options) for library, dtype in asked]
        seconds = {
            job.name: {
                worker.name: statistics.median(worker.run(job) for _ in range(args.repeat))
                for worker in workers
            }
            for job in jobs
        }
        for worker in workers:
            worker.close()
    return {job.name: {name: job.tokens / each for name, each in seconds[job.name].items()} for job in jobs}


def main() -> None:
    """Prints and writes what the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="mid")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--transformers", nargs="+", default=["bfloat16", "float32"], metavar="DTYPE")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    need("torch", "transformers")
    found = {}
    theirs = [f"transformers {dtype} | ratio" for dtype in args.transformers]
    lines = [f"| tokens/s | | this library | {' | '.join(theirs)} |", "|---" * (3 + 2 * len(theirs)) + "|"]
    for model_type in args.types:
        found[model_type] = measure(model_type, args)
        for job, rates in found[model_type].items():
            ours, *others = rates.values()
            cells = [f"{rate:.1f} | {ours / rate:.2f}" for rate in others]
            lines.append(f"| `{model_type}` | {job} | {ours:.1f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

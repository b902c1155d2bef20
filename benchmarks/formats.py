"""Number formats of the layers' matrices side by side on one CPU: speed, memory, share of the roofline.

    python benchmarks/make_checkpoint.py mid DIR
    python benchmarks/formats.py DIR [--formats fp8 int8 int4 int4-experts mxfp4-experts]
        [--copies DIR] [--out NAME]

Writes quantised copies of the checkpoint beside each other, loads each in a process of its own, and measures
decoding of one row and of eight, and a prefill of 512 tokens, in turns as `cpu.py` does. The roofline of
decoding is the bytes that a step must read (`aot/minimum.py`) over the bandwidth that `machine.cc` measures.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cpu import OURS, Job, Worker, measured_machine

JOBS = (Job(1, 128, 64), Job(8, 128, 32), Job(1, 512, 0))


def quantised(source: Path, name: str, folder: Path) -> Path:
    """A copy of a checkpoint in a format, made unless it is there; "-experts" behind its name means of the
    routed experts alone."""
    from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
    from qwen_moe_jax.schemes.presets import preset

    form, _, which = name.partition("-")
    if not (folder / name).exists():
        only = which == "experts"
        quantize_checkpoint(source, folder / name, quantization=preset(form, experts_only=only))
    return folder / name


def least_bytes(folder: Path, job: Job) -> float:
    """That a decode step must read, computed in bfloat16."""
    import jax.numpy as jnp

    from qwen_moe_jax.aot.minimum import least_work
    from qwen_moe_jax.checkpoint.stored_config import read_config
    from qwen_moe_jax.model.params import DtypePolicy
    from qwen_moe_jax.parallel.layout import Layout
    from qwen_moe_jax.parallel.mesh import abstract_mesh

    layout = Layout(read_config(folder), abstract_mesh(1, 1, 1), shared_expert="outside")
    policy = DtypePolicy(compute=jnp.dtype("bfloat16"), matrix=jnp.dtype("bfloat16"))
    context = job.prompt + job.steps // 2
    return least_work(layout, policy, batch=job.batch, tokens=1, context=context).total_bytes


def main() -> None:
    """Prints and writes what the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--formats", nargs="+", default=["fp8", "int8", "int4", "int4-experts", "mxfp4-experts"]
    )
    parser.add_argument("--copies", type=Path, help="where quantised copies stay (default: nowhere)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = measured_machine(args.threads)
    print(f"{args.threads} threads read {machine['read']} GB/s", flush=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as temporary:
        folders = {"bfloat16": args.checkpoint}
        copies = args.copies or Path(temporary)
        folders |= {name: quantised(args.checkpoint, name, copies) for name in args.formats}
        workers = {}
        for name, folder in folders.items():
            own = copy.copy(args)
            own.checkpoint = folder
            workers[name] = Worker(OURS, "bfloat16", own)
            found[name] = {"memory": workers[name].loading["held"]}
        for job in JOBS:
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            for _ in range(args.repeat):
                for name, worker in workers.items():
                    seconds[name].append(worker.run(job))
            for name, each in seconds.items():
                taken = statistics.median(each)
                found[name][job.name] = job.tokens / taken
                if job.steps:
                    least = job.steps * least_bytes(folders[name], job) / (machine["read"] * 1e9)
                    found[name][f"{job.name}, roofline"] = least / taken
            print(job.name, {name: round(found[name][job.name], 1) for name in found}, flush=True)
        for worker in workers.values():
            worker.close()
    lines = ["| format | memory, GB | " + " | ".join(job.name for job in JOBS) + " |"]
    lines.append("|---|---|" + "---|" * len(JOBS))
    for name, row in found.items():
        cells = []
        for job in JOBS:
            over = row[job.name] / found["bfloat16"][job.name]
            share = row.get(f"{job.name}, roofline")
            roofline = "" if share is None else f", {share:.0%} of the roofline"
            cells.append(f"{row[job.name]:.1f} ({over:.2f}{roofline})")
        lines.append(f"| {name} | {row['memory'] / 1e9:.2f} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        args.out.with_suffix(".json").write_text(json.dumps({"machine": machine} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The 397B compiled for 8 AMD GPUs: compile time and memory here, bytes and FLOPs over the least there.

Each program in a process of its own, so that its peak memory is its own. Nothing is run on a GPU; the seconds
are of this machine. `python benchmarks/aot.py` takes about 20 minutes on two cores, after
`qwen-moe-jax toolchain`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEVICES = ("mi300x", "mi355x")
BATCHES = (1, 8, 64)
CASES = (("decode", "bf16"), ("prefill", "bf16"), ("decode", "fp8"))


def compiled(program: str, dtype: str, device: str, batch: int, context: int) -> dict[str, Any]:
    """One program's report, with "resident" bytes of the process that compiled it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "qwen_moe_jax.cli", "compile", "397b", "--json", str(file)]
        command += ["--program", program, "--dtype", dtype, "--device", device, "--count", "8"]
        command += ["--batch", str(batch), "--context", str(context)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if not file.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        report = json.loads(file.read_text(encoding="utf-8"))
        return report["programs"][program] | {"resident": usage.ru_maxrss * 1024}


def rest(found: dict[str, Any]) -> str:
    """The largest parts of what is moved beside the least."""
    least = found["least"]["bytes"]
    of_part = {
        "experts": ("routed experts",),
        "gated_delta_net": ("Gated DeltaNet", "recurrent state"),
        "gated_attention": ("attention", "keys and values"),
        "shared_expert": ("shared expert",),
        "router": ("router",),
        "lm_head": ("lm_head",),
    }
    over = {
        part: moved - sum(least.get(name, 0) for name in of_part.get(part, ()))
        for part, moved in found["traffic_by_part"].items()
    }
    largest = sorted(over.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{part} {moved / 1e9:.2f}" for part, moved in largest if moved > 1e7)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    options = parser.parse_args()
    print(f"397B, EP 8, {options.context} tokens of context a row\n")
    print(
        "| program | weights | device | batch x tokens | lower + compile, s | resident, GB | temporaries, GB "
        "| GB moved | over the least | of which, GB | GFLOP over the least |"
    )
    print("|" + "---|" * 11)
    for program, dtype in CASES:
        for device in DEVICES:
            for batch in BATCHES:
                found = compiled(program, dtype, device, batch, options.context)
                print(
                    f"| {program} | {dtype} | {device} | {batch} x {found['tokens']} "
                    f"| {found['lower_seconds']:.0f} + {found['compile_seconds']:.0f} "
                    f"| {found['resident'] / 1e9:.1f} | {found['temporaries'] / 1e9:.2f} "
                    f"| {found['traffic'] / 1e9:.1f} | {found['traffic_ratio']:.3f} | {rest(found)} "
                    f"| {found['flops_ratio']:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

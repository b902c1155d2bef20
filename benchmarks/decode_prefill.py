"""Prefill and decode in tokens/s, ours against transformers, taking turns in one run.

    python benchmarks/make_checkpoint.py mid /tmp/mid
    python benchmarks/decode_prefill.py --checkpoint /tmp/mid

Each library runs in a process of its own that waits, without using a core, while the other one works; a
measurement of one is followed by the same measurement of the other, and the medians are compared. The
first run of everything, which compiles, is not counted (its seconds are shown). Ours goes through
`QwenMoe.generate`, transformers through bare forward calls with its own cache, without the overhead of
its `generate`. Greedy; token ids are random, the same for both.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

# Ours over transformers in bfloat16 on the mid checkpoint; below is a regression.
FLOORS = {"prefill 512": 1.0, "decode batch 1": 1.3}
DECODE_PROMPT = 128  # tokens in the cache before the decode steps that are timed
# Threads of the process that has just worked go on spinning for a while.
SETTLE_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: `batch` rows of `prompt` tokens, then `steps` decode steps (0: prefill is timed)."""

    name: str
    batch: int
    prompt: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens that the measured seconds pay for."""
        return self.batch * (self.steps or self.prompt)


class Ours:
    """This library, through its public interface."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        from qwen_moe_jax import QwenMoe

        self.model = QwenMoe.from_pretrained(folder, dtype=dtype, compilation_cache=None)
        self.vocab_size = self.model.config.vocab_size

    def seconds(self, job: Job, ids: np.ndarray) -> float:
        """Runs a job and returns its seconds."""
        out = self.model.generate(ids, max_new_tokens=job.steps + 1, eos_token_id=[])
        assert out.usage.generated_tokens == job.batch * (job.steps + 1)
        return out.usage.decode_seconds if job.steps else out.usage.prefill_seconds


class Transformers:
    """The PyTorch reference."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        import torch
        from transformers import Qwen3_5MoeForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.vocab_size = self.model.config.vocab_size

    def seconds(self, job: Job, ids: np.ndarray) -> float:
        """Runs a job and returns its seconds."""
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model(input_ids=self.torch.as_tensor(ids), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            if not job.steps:
                return time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(job.steps):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - start


LIBRARIES = {"ours": Ours, "transformers": Transformers}


def _serve(library: str, folder: Path, dtype: str, threads: int) -> int:
    """The worker: one job a line on stdin, its seconds on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    start = time.perf_counter()
    runner = LIBRARIES[library](folder, dtype, threads)
    print(time.perf_counter() - start, file=answers, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        ids = np.random.default_rng(job.prompt).integers(2, runner.vocab_size, (job.batch, job.prompt))
        print(runner.seconds(job, ids), file=answers, flush=True)
    return 0


class Worker:
    """A library in a process of its own."""

    def __init__(self, library: str, dtype: str, args: argparse.Namespace):
        self.label = f"{library} {dtype}"
        options = ["--serve", library, "--dtype", dtype, "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--checkpoint", str(args.checkpoint), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"{self.label}: loaded in {self._answer():.1f} s", flush=True)

    def run(self, job: Job) -> float:
        """Seconds of one job."""
        time.sleep(SETTLE_SECONDS)
        pipe = cast("IO[str]", self.process.stdin)
        print(json.dumps(dataclasses.asdict(job)), file=pipe, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        cast("IO[str]", self.process.stdin).close()
        self.process.wait()

    def _answer(self) -> float:
        line = cast("IO[str]", self.process.stdout).readline()
        if not line:
            raise SystemExit(f"{self.label} ended early with status {self.process.wait()}")
        return float(line)


def _measure(workers: list[Worker], jobs: list[Job], repeat: int) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        first = [worker.run(job) for worker in workers]
        turns = [[worker.run(job) for worker in workers] for _ in range(repeat)]
        rates = [job.tokens / statistics.median(seconds) for seconds in zip(*turns, strict=True)]
        ratios = sorted(theirs / ours for ours, theirs in turns)
        rows.append(
            {
                "job": job.name,
                "ours": rates[0],
                "transformers": rates[1],
                "ratio": rates[0] / rates[1],
                "ratios": ratios,
                "first seconds": first,
            }
        )
        floor = f"   floor {FLOORS[job.name]}" if job.name in FLOORS else ""
        print(
            f"{job.name:<18}{rates[0]:>10.1f}{rates[1]:>14.1f}{rates[0] / rates[1]:>9.2f}"
            f"   {ratios[0]:.2f} to {ratios[-1]:.2f}   {first[0]:>6.1f}{first[1]:>6.1f}{floor}",
            flush=True,
        )
    return rows


def main() -> int:
    """Measures every job and prints one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder, as make_checkpoint.py writes")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of ours")
    parser.add_argument("--their-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048], metavar="TOKENS")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8], metavar="BATCH")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each library, at least 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--serve", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return _serve(args.serve, args.checkpoint, args.dtype, args.threads)

    jobs = [Job(f"prefill {tokens}", 1, tokens, 0) for tokens in args.prefill]
    jobs += [Job(f"decode batch {batch}", batch, DECODE_PROMPT, args.steps) for batch in args.decode]
    workers = [Worker("ours", args.dtype, args), Worker("transformers", args.their_dtype, args)]
    print(f"\n{'tokens/s':<18}{'ours':>10}{'transformers':>14}{'ratio':>9}   single turns   first run, s")
    rows = _measure(workers, jobs, args.repeat)
    for worker in workers:
        worker.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

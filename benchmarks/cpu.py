"""This library, transformers and llama.cpp on one CPU, in turn in one run, beside what the machine can do.

    python benchmarks/make_checkpoint.py mid DIR
    python benchmarks/cpu.py DIR [--transformers bfloat16 float32] [--llama BIN_FOLDER --gguf FILE] --out NAME

Measures loading, prefill, decoding of one row and of eight after a short and a long context, and memory. Each
library has a process of its own, which waits without using a core while another one works; every
measurement is taken by all of them before the next one, `--repeat` times, and medians are shown. What
compiles is run once before. Token ids are random; rows of a batch differ, also where they share a long
context, so that they choose different experts. llama.cpp runs where a folder with `llama-bench` and
`llama-batched-bench` is given and the checkpoint as a GGUF file.

The roofline of decoding is the bytes a step must read (weights in use, with the expected number of
distinct experts; keys and values; states, twice) over the bandwidth that `machine.cc` measures; that of
prefill the larger of the same for weights and of the products' FLOPs over the fastest products of the dtype
that it measures. Writes NAME.md, NAME.json and NAME.png.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory import process_memory
from needs import need

SETTLE_SECONDS = 0.3  # threads of the process that has just worked go on spinning for a while
LONG = 4096  # tokens from which a prompt is measured less often
OURS, THEIRS, LLAMA = "this library", "transformers", "llama.cpp"


@dataclasses.dataclass(frozen=True)
class Job:
    """`batch` rows of `prompt` tokens, then `steps` decode steps (0: prefill is timed)."""

    batch: int
    prompt: int
    steps: int

    @property
    def name(self) -> str:
        """For tables."""
        if not self.steps:
            return f"prefill {self.prompt}"
        return f"decode batch {self.batch} after {self.prompt}"

    @property
    def tokens(self) -> int:
        """That the measured seconds pay for."""
        return self.batch * self.steps or self.prompt


class Ours:
    """This library: prefill through a request, decoding through the engine's loop."""

    def __init__(self, folder: Path, dtype: str, threads: int, kernels: str):
        from qwen_moe_jax import QwenMoe

        self.model = QwenMoe.from_pretrained(folder, dtype=dtype, kernels=kernels, compilation_cache=None)
        self.vocab_size = self.model.config.vocab_size
        self.prefilled: tuple[int, Any] = (0, None)

    def seconds(self, job: Job, ids: np.ndarray, first: np.ndarray) -> float:
        """Runs a job and returns its seconds."""
        if not job.steps:
            # an engine that the model keeps knows the prompt from the turn before
            with self.model.engine(max_rows=1, prefix_cache=False) as engine:
                start = time.perf_counter()
                engine.submit(ids[0].tolist(), max_new_tokens=1, eos_token_id=[]).result()
                return time.perf_counter() - start
        from qwen_moe_jax.engine.jobs import Job
        from qwen_moe_jax.engine.sampling import RowSampling

        with self.model.engine(max_rows=job.batch) as engine:
            core = engine._core
            rows = []
            for token in first.tolist():
                asked = Job(
                    prompt=np.asarray([*ids[0], token], np.int32),
                    max_new_tokens=job.steps + 1000,
                    sampling=(RowSampling(),),
                    end_ids=(),
                    draft_tokens=0,
                    one_by_one=False,
                    take=lambda *_: False,
                )
                rows += core.submit(asked)
                while not rows[-1].emitted:  # the next one finds the context in the prefix cache
                    core.advance()
            for row in rows:  # what came before is compiled by now; each goes on by as many tokens
                row.max_new_tokens = len(row.emitted) + job.steps
            before = core.generated_tokens
            start = time.perf_counter()
            while any(len(row.emitted) < row.max_new_tokens for row in rows) and core.advance():
                pass
            seconds = time.perf_counter() - start
            return seconds * job.batch * job.steps / max(1, core.generated_tokens - before)


class Transformers:
    """The PyTorch reference through bare forward calls, without the overhead of its `generate`."""

    def __init__(self, folder: Path, dtype: str, threads: int, kernels: str):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.vocab_size = self.model.config.vocab_size

    def seconds(self, job: Job, ids: np.ndarray, first: np.ndarray) -> float:
        """Runs a job and returns its seconds."""
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model(input_ids=self.torch.as_tensor(ids[:1]), use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1)
            if not job.steps:
                return time.perf_counter() - start
            cache = out.past_key_values
            if job.batch > 1:
                cache.reorder_cache(self.torch.zeros(job.batch, dtype=self.torch.long))
            token = self.torch.as_tensor(first)[:, None]
            start = time.perf_counter()
            for _ in range(job.steps):
                out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - start


LIBRARIES = {OURS: Ours, THEIRS: Transformers}


def _serve(library: str, args: argparse.Namespace) -> int:
    """The worker: one job a line on stdin, its seconds on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    if library == THEIRS:
        import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401
    else:
        import qwen_moe_jax.generation.api  # noqa: F401
    before, start = process_memory("VmRSS"), time.perf_counter()
    runner = LIBRARIES[library](args.checkpoint, args.dtype, args.threads, args.kernels)
    loaded = time.perf_counter() - start
    held, peak = (process_memory(field) - before for field in ("VmRSS", "VmHWM"))
    print(json.dumps({"load": loaded, "held": held, "load_peak": peak}), file=answers, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        rng = np.random.default_rng(job.prompt)
        ids = rng.integers(2, runner.vocab_size, (1, job.prompt))
        first = rng.integers(2, runner.vocab_size, job.batch)
        print(runner.seconds(job, ids, first), file=answers, flush=True)
    return 0


class Worker:
    """A library in a process of its own."""

    def __init__(self, library: str, dtype: str, args: argparse.Namespace):
        self.name = library if library == OURS else f"{library} {dtype}"
        self.dtype = dtype
        options = ["--serve", library, "--dtype", dtype, "--threads", str(args.threads)]
        options += ["--kernels", args.kernels]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(args.checkpoint), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loading: dict[str, float] = json.loads(self._answer())
        self.ran: set[Job] = set()
        print(f"{self.name}: loaded in {self.loading['load']:.1f} s", flush=True)

    def run(self, job: Job) -> float:
        """Seconds of one job; the first run, which compiles or warms up, is not counted.

        What does not compile needs no warming up for a long prompt.
        """
        known = job in self.ran or (self.name != OURS and job.prompt >= LONG)
        seconds = [self._once(job) for _ in range(1 if known else 2)]
        self.ran.add(job)
        return seconds[-1]

    def _once(self, job: Job) -> float:
        time.sleep(SETTLE_SECONDS)
        assert self.process.stdin is not None
        print(json.dumps(dataclasses.asdict(job)), file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Ends the process and notes its largest memory."""
        self.loading["peak"] = process_memory("VmHWM", self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early with status {self.process.wait()}")
        return line


class Llama:
    """llama.cpp, whose programs measure themselves and load the file anew each time."""

    def __init__(self, folder: Path, gguf: Path, threads: int):
        self.name, self.dtype = f"{LLAMA} bf16", "bfloat16"
        self.folder, self.gguf, self.threads = folder, gguf, str(threads)
        self.loading: dict[str, float] = {}

    def run(self, job: Job) -> float | None:
        """Seconds of one job, None for what llama-batched-bench cannot do: it cannot share a prompt between
        rows of this architecture, and reading a long one for each takes longer than the rest together."""
        if job.batch > 1 and job.prompt >= LONG:
            return None
        time.sleep(SETTLE_SECONDS)
        common = ["-m", str(self.gguf), "-t", self.threads]
        if job.batch == 1:
            size = ["-p", str(job.prompt), "-n", "0"]
            if job.steps:
                size = ["-p", "0", "-n", str(job.steps), "-d", str(job.prompt)]
            rows = json.loads(self._start("llama-bench", *common, *size, "-r", "1", "-o", "json"))
            return job.tokens / rows[0]["avg_ts"]
        room = job.batch * (job.prompt + job.steps)
        size = ["-npp", str(job.prompt), "-ntg", str(job.steps), "-npl", str(job.batch), "-c", str(room)]
        lines = self._start("llama-batched-bench", *common, *size, "--output-format", "jsonl")
        row = next(json.loads(line) for line in lines.splitlines() if line.startswith("{"))
        return row["t_tg"]

    def _start(self, program: str, *options: str) -> str:
        process = subprocess.Popen(
            [str(self.folder / program), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{program} {' '.join(options)} ended with status {status}")
        self.loading["peak"] = max(self.loading.get("peak", 0), 1024 * usage.ru_maxrss)
        return out

    def close(self) -> None:
        """Nothing runs between jobs."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a job costs at least, of a checkpoint and a machine."""

    config: Any
    machine: dict[str, float]

    def seconds(self, job: Job, dtype: str) -> float:
        """Lower bound."""
        size = 2 if dtype == "bfloat16" else 4
        c = self.config
        attention = sum(kind == "full_attention" for kind in c.layer_types)
        linear = len(c.layer_types) - attention
        expert = 3 * c.moe_intermediate_size * c.hidden_size
        shared = 3 * c.shared_expert_intermediate_size * c.hidden_size + c.hidden_size
        heads = c.num_attention_heads * c.head_dim
        keys = c.num_key_value_heads * c.head_dim
        a_layer = shared + c.num_experts * c.hidden_size
        mixers = attention * c.hidden_size * (3 * heads + 2 * keys)
        mixers += linear * c.hidden_size * (c.conv_channels + 2 * c.value_dim + 2 * c.linear_num_value_heads)
        dense = mixers + len(c.layer_types) * a_layer
        head = c.vocab_size * c.hidden_size
        tokens = job.batch if job.steps else job.prompt
        chosen = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** tokens)
        read = size * (dense + head + len(c.layer_types) * chosen * expert)
        if job.steps:
            state = 4 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
            context = job.prompt + job.steps / 2
            read += job.batch * (2 * linear * state + size * attention * 2 * keys * context)
            return job.steps * read / (self.machine["read"] * 1e9)
        active = dense + len(c.layer_types) * c.num_experts_per_tok * expert
        flops = 2 * active * tokens + 2 * head + attention * 4 * heads * tokens * tokens / 2
        peak = max(self.machine["float32"], self.machine["bfloat16"] if size == 2 else 0)
        return max(read / (self.machine["read"] * 1e9), flops / (peak * 1e9))


def measured_machine(threads: int) -> dict[str, float]:
    """Runs machine.cc."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "machine"
        source = Path(__file__).with_name("machine.cc")
        command = ["g++", "-O2", "-march=native", "-pthread", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        return json.loads(subprocess.run([program, str(threads)], capture_output=True, check=True).stdout)


def _measure(workers: list[Any], jobs: list[Job], repeat: int, roofline: Roofline) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        turns = max(1, repeat if job.prompt < LONG else repeat // 2)
        seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for _ in range(turns):
            for worker in workers:
                found = worker.run(job)
                if found is not None:
                    seconds[worker.name].append(found)
        taken = {name: statistics.median(each) for name, each in seconds.items() if each}
        row = {
            "job": job.name,
            "rates": {name: job.tokens / each for name, each in taken.items()},
            "roofline": {
                w.name: roofline.seconds(job, w.dtype) / taken[w.name] for w in workers if w.name in taken
            },
            "seconds": seconds,
        }
        rows.append(row)
        said = "  ".join(
            f"{name} {rate:.1f} ({row['roofline'][name]:.0%})" for name, rate in row["rates"].items()
        )
        print(f"{job.name:<28}{said}", flush=True)
    return rows


def _table(rows: list[dict[str, Any]], workers: list[Any], machine: dict[str, float]) -> str:
    names = [worker.name for worker in workers]
    lines = [
        f"{machine['threads']} threads: reads {machine['read']} GB/s, float32 {machine['float32']} GFLOP/s, "
        f"bfloat16 {machine['bfloat16']} GFLOP/s.",
        "",
        "| tokens/s (share of the roofline) | " + " | ".join(names) + " | ratios |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for row in rows:
        rates, shares = row["rates"], row["roofline"]
        cells = [f"{rates[name]:.1f} ({shares[name]:.0%})" if name in rates else "" for name in names]
        ratios = ", ".join(
            f"{rates[names[0]] / rates[name]:.2f}" if name in rates else "-" for name in names[1:]
        )
        lines.append(f"| {row['job']} | " + " | ".join(cells) + f" | {ratios} |")

    def loading(label: str, field: str, scale: float) -> str:
        values = [worker.loading.get(field) for worker in workers]
        cells = ["" if value is None else f"{value / scale:.2f}" for value in values]
        ours = values[0] or 0.0
        ratios = ", ".join("" if not value else f"{ours / value:.2f}" for value in values[1:])
        return f"| {label} | " + " | ".join(cells) + f" | {ratios} |"

    lines.append(loading("load, s", "load", 1))
    lines.append(loading("memory held after it, GB", "held", 1e9))
    lines.append(loading("its peak, GB", "load_peak", 1e9))
    lines.append(loading("largest of all, GB", "peak", 1e9))
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], names: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(rows) + 1.5))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        places = np.arange(len(rows)) + index * height
        rates = [row["rates"].get(name, 0) for row in rows]
        shares = [rate / row["rates"][names[0]] for rate, row in zip(rates, rows, strict=True)]
        axes.barh(places, shares, height, label=name)
        for place, rate, share in zip(places, rates, shares, strict=True):
            if rate:
                axes.text(share, place, f" {rate:.0f}", va="center", fontsize=7)
    axes.set_yticks(np.arange(len(rows)) + 0.4 - height / 2, [row["job"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"speed, {names[0]} = 1 (numbers: tokens/s)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> int:
    """Measures every job and writes the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder, as make_checkpoint.py writes")
    parser.add_argument("--transformers", nargs="*", default=["bfloat16"], metavar="DTYPE")
    parser.add_argument("--kernels", default="auto", choices=("auto", "xla"), help="of this library")
    parser.add_argument("--llama", type=Path, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--gguf", type=Path, help="the checkpoint for llama.cpp, in bf16")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048, 8192], metavar="TOKENS")
    parser.add_argument("--after", type=int, nargs="*", default=[512, 16384], metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each library, half for long prompts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="name of the files that are written, without ending")
    parser.add_argument("--serve", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    args = parser.parse_args()
    need("matplotlib", *(("torch", "transformers") if args.transformers else ()))
    if args.serve:
        return _serve(args.serve, args)
    if (args.llama is None) != (args.gguf is None):
        parser.error("--llama and --gguf go together")

    from qwen_moe_jax.config import ModelConfig

    machine = measured_machine(args.threads)
    print(machine, flush=True)
    # transformers first: it needs twice the weights while it loads
    theirs: list[Any] = [Worker(THEIRS, dtype, args) for dtype in args.transformers]
    workers = [Worker(OURS, "bfloat16", args), *theirs]
    if args.llama is not None:
        workers.append(Llama(args.llama, args.gguf, args.threads))
    jobs = [Job(1, tokens, 0) for tokens in args.prefill]
    jobs += [Job(batch, tokens, args.steps) for tokens in args.after for batch in args.batch]
    roofline = Roofline(ModelConfig.from_file(args.checkpoint), machine)
    rows = _measure(workers, jobs, args.repeat, roofline)
    for worker in workers:
        worker.close()
    table = _table(rows, workers, machine)
    print("\n" + table)
    if args.out:
        args.out.with_suffix(".md").write_text(table)
        found = {"machine": machine, "rows": rows, "loading": {w.name: w.loading for w in workers}}
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        _plot(rows, [worker.name for worker in workers], args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

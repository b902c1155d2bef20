"""Any visible GPU in under 8 minutes: kernels, a model that fills a tenth of the card, and the time model.

    python benchmarks/gpu.py [--out NAME]
    python benchmarks/gpu.py --rehearse      # every step on a CPU, tiny, interpreted: no measurement

Parts, in order: the machine; what its memory, its matrix units and its launches do; every Pallas kernel
against plain XLA in error (as `qwen-moe-jax selftest`) and in time, with its share of the card's bandwidth
and FLOP/s; prefill and decode of a model with random weights, transformers in bfloat16 on the same card
beside it where torch sees that; the time model's predictions beside what was measured. On GPUs that are not
AMD's the kernels are those of gfx950, as Triton lowers them. A part that the rest of `--budget` has no time
for is left out and says so; each is caught by itself. Writes NAME.md and NAME.json.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# before jax is imported: torch needs some of the card, too
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_kernels
import gpu_model
import jax
import jax.numpy as jnp
from gpu_model import Prompts, Work

from qwen_moe_jax.aot.assumptions import assumptions_for
from qwen_moe_jax.aot.times import DECODING
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.kernels.target import current_target
from qwen_moe_jax.selftest import kernel_checks, machine, measure
from qwen_moe_jax.selftest.report import Outcome, PartReport, Skip, as_json, run_parts

BUDGET = 450.0
# Longest that parts were allowed for in sizing them, seconds; nothing was timed on an AMD GPU.
CHECK, TIMES, OURS, THEIRS, SMALL = 40, 30, 60, 30, 15
_CHAIN, _TINY_CHAIN = 256, 32  # kernels whose launches are timed
_REPEAT = 3
_TINY_POOLS = 4 << 20
REHEARSED = (
    "**Nothing here was measured on a GPU.** This is a rehearsal on a CPU, in tiny sizes with interpreted "
    "kernels: it shows that every step runs, and its seconds mean nothing."
)


class Run:
    """What parts share.

    Attributes:
        target: what programs are compiled for here.
        kernel_target: what kernels are compiled for.
        rehearse: tiny sizes, interpreted.
        found: what parts leave for later ones.
    """

    def __init__(self, rehearse: bool, budget: float):
        self.rehearse = rehearse
        self.target = current_target()
        self.kernel_target = gpu_kernels.kernel_target(self.target)
        self.found: dict[str, Any] = {}
        device = jax.local_devices()[0]
        self.known = machine.known_device(device)
        self.kind = device.device_kind
        self.memory = machine.memory_limit(device)
        self.config = gpu_model.sizes(rehearse, self.memory)
        self._end = time.monotonic() + budget

    def left(self) -> float:
        """Seconds of the budget."""
        return self._end - time.monotonic()

    def within(self, seconds: float, function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """A part that is left out where it has no time."""

        def run() -> Outcome:
            if self.left() < seconds:
                raise Skip(
                    f"{max(0, self.left()):.0f} s of the budget are left, and this may take {seconds:.0f}"
                )
            return function()

        return run

    def parts(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """All of them."""
        found: list[tuple[str, Callable[[], Outcome]]] = [
            ("versions", machine.versions),
            ("devices", machine.devices),
            ("bandwidth", self.within(SMALL, self.bandwidth)),
            ("products", self.within(SMALL, self.products)),
            ("launches", self.within(SMALL, self.launches)),
        ]
        for form in ("gathered", "grouped"):
            check = partial(kernel_checks.experts, form, self.kernel_target)
            found.append((f"{form} experts, error", self.within(CHECK, check)))
        for name, check in (
            ("flash attention", kernel_checks.attention),
            ("delta step", kernel_checks.delta_step),
            ("scaled products", kernel_checks.scaled),
            ("delta chunks", kernel_checks.delta_chunks),
        ):
            found.append((f"{name}, error", self.within(CHECK, partial(check, self.kernel_target))))
        found.append(("kernels, time", self.within(TIMES, self.kernel_times)))
        found.append(("this library", self.within(OURS, self.ours)))
        found.append(("transformers", self.within(THEIRS, self.theirs)))
        return [*found, ("predictions", self.predictions)]

    def bandwidth(self) -> Outcome:
        """As of the selftest."""
        outcome = measure.bandwidth()
        rates = outcome.details["read_bytes_per_second"], outcome.details["copy_bytes_per_second"]
        self.found["bandwidth"] = max(rates)
        return outcome

    def products(self) -> Outcome:
        """As of the selftest."""
        outcome = measure.matmul()
        self.found["flops"] = outcome.details["flops_per_second"]
        return outcome

    def launches(self) -> Outcome:
        """Seconds between kernels that have nothing to do, with the options of this library's programs."""
        options = make_kernels(self.target).compiler_options
        x, w = jnp.ones((16, 64), jnp.bfloat16), jnp.eye(64, dtype=jnp.bfloat16)

        def chain(length: int) -> float:
            def products(x: jax.Array, w: jax.Array) -> jax.Array:
                for _ in range(length):
                    x = x @ w
                return x

            compiled = jax.jit(products, compiler_options=options)
            return measure.seconds_a_call(lambda: compiled(x, w))

        kernels = _TINY_CHAIN if self.rehearse else _CHAIN
        short, long = chain(kernels // 8), chain(kernels)
        self.found["launch"] = seconds = max(0.0, (long - short) / (kernels - kernels // 8))
        return Outcome(
            summary=f"{1e6 * seconds:.2f} us a kernel, of {kernels} products of 16 x 64 x 64 in a row",
            details={"seconds": seconds},
        )

    def kernel_times(self) -> Outcome:
        """Every kernel and plain XLA."""
        known = self.known
        bandwidth = self.found.get("bandwidth") if known is None else known.bandwidth
        peak = self.found.get("flops") if known is None else known.peak_flops["bfloat16"]
        rows = []
        for case in gpu_kernels.cases(self.kernel_target, self.rehearse):
            if self.left() < 10:
                rows.append({"kernel": case.name, "size": case.size, "seconds_error": "no time was left"})
            else:
                rows.append(gpu_kernels.measure(case, bandwidth, peak))
        bad = [row for row in rows if "seconds" not in row]
        return Outcome(
            ok=not bad,
            summary=f"{len(rows) - len(bad)} of {len(rows)} sizes timed, shares of the "
            + ("card's own rates above" if known is None else f"data sheet of {known.name}"),
            details={"kernels": rows},
        )

    def ours(self) -> Outcome:
        """Prefill and decode of this library."""
        kernels = gpu_model.model_kernels(self.target, self.rehearse)
        model = gpu_model.build(self.config, kernels)
        prompts = Prompts(self.config["vocab_size"])
        # what jax takes of a card torch does not get
        memory = _TINY_POOLS if self.rehearse or not self.memory else self.memory // 10
        with model.engine(memory=memory, prefix_cache=False) as engine:
            took = self._each(partial(gpu_model.ours, engine, prompts, _REPEAT), 20)
        del model, engine
        gpu_model.free()
        return self._measured("ours", took, {"kernels": kernels.lines("bfloat16")})

    def theirs(self) -> Outcome:
        """The same of transformers."""
        try:
            model = gpu_model.Transformers(self.config, jax.default_backend())
        except ImportError as error:
            raise Skip(str(error)) from error
        prompts = Prompts(self.config["vocab_size"])
        took = self._each(partial(model.seconds, prompts, _REPEAT), 15)
        return self._measured("transformers", took, {"torch": model.torch.__version__})

    def predictions(self) -> Outcome:
        """What the time model says of the same model."""
        if not self.found.get("ours"):
            raise Skip("no times of this library are there to compare with")
        own = [self.found.get(name) for name in ("bandwidth", "flops", "launch")]
        card = None if None in own else gpu_model.measured_card(self.kind, self.memory, *own)
        published = None
        if self.known is not None:
            with contextlib.suppress(InputError):  # nothing is known of what it reaches
                published = self.known, assumptions_for(self.known)
        rows = []
        for work in gpu_model.works(self.rehearse):
            seconds = self.found["ours"].get(work.name)
            row: dict[str, Any] = {"what": work.name, "measured": seconds}
            for name, given in (("from_this_card", card), ("from_published", published)):
                row[name] = None if given is None else gpu_model.predicted(self.config, work, *given)
            rows.append(row)
        kernels = DECODING.kernels(gpu_model.one_device(self.config), 64)
        return Outcome(
            summary=f"{len(rows)} times, with {kernels:.0f} kernels assumed in a decode step of 64 rows",
            details={"predictions": rows, "kernels": kernels},
        )

    def _each(self, seconds_of: Callable[[Work], float], needs: float) -> dict[str, float]:
        """Seconds by name, as far as time reaches."""
        found = {}
        for work in gpu_model.works(self.rehearse):
            if self.left() >= needs:
                found[work.name] = seconds_of(work)
        return found

    def _measured(self, name: str, took: dict[str, float], details: dict[str, Any]) -> Outcome:
        self.found[name] = took
        count, layers = len(gpu_model.works(self.rehearse)), self.config["num_hidden_layers"]
        size = gpu_model.bytes_of(self.config)
        what = "tiny layers" if self.rehearse else "layers of the 35B"
        return Outcome(
            summary=f"{len(took)} of {count} times; {layers} {what}, {size / 1e9:.3g} GB"
            + ("" if len(took) == count else "; no time was left for the others"),
            details={"seconds": took, "layers": layers, "bytes": size} | details,
        )


def tables(run: Run, parts: tuple[PartReport, ...]) -> str:
    """What NAME.md holds."""
    by_name = {part.name: part for part in parts}
    lines = [f"# {'Rehearsal of benchmarks/gpu.py' if run.rehearse else run.kind}", ""]
    if run.rehearse:
        lines += [REHEARSED, ""]
    lines += ["| part | | s | |", "|---|---|---|---|"]
    lines += [f"| {part.name} | {part.status} | {part.seconds:.1f} | {part.summary} |" for part in parts]
    if rows := by_name["kernels, time"].details.get("kernels"):
        lines += [
            "",
            "| kernel | size | kernel, ms | plain XLA, ms | ratio | of bandwidth | of FLOP/s |",
            "|---" * 7 + "|",
        ]
        lines += [_kernel_line(row) for row in rows]
    ours, theirs = (by_name[name].details.get("seconds", {}) for name in ("this library", "transformers"))
    if ours:
        lines += ["", "| | this library, ms | transformers bfloat16, ms | ratio |", "|---|---|---|---|"]
        for name, seconds in ours.items():
            other = theirs.get(name)
            lines.append(f"| {name} | {_ms(seconds)} | {_ms(other)} | {_ratio(other, seconds)} |")
        lines += ["", "Prefill is up to the first token, decode is a step."]
    if rows := by_name["predictions"].details.get("predictions"):
        lines += [
            "",
            "| | measured, ms | by the time model, from this card's own rates above | over measured "
            "| from published assumptions | over measured |",
            "|---" * 6 + "|",
        ]
        for row in rows:
            cells = [_ms(row["measured"])]
            for name in ("from_this_card", "from_published"):
                cells += [_ms(row[name]), _ratio(row[name], row["measured"])]
            lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kernel_line(row: dict[str, Any]) -> str:
    def share(name: str) -> str:
        return "" if row.get(name) is None else f"{row[name]:.0%}"

    kernel = row.get("seconds_error") or _ms(row.get("seconds"))
    plain = row.get("plain_seconds_error") or _ms(row.get("plain_seconds"))
    ratio = _ratio(row.get("plain_seconds"), row.get("seconds"))
    return (
        f"| {row['kernel']} | {row['size']} | {kernel} | {plain} | {ratio} | {share('bytes_share')} "
        f"| {share('flops_share')} |"
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.4g}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if not one or not other else f"{one / other:.2f}"


def main() -> int:
    """Runs all parts and writes both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="NAME", help="of the two files (default: of the device)")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, without a measurement")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds (default {BUDGET:g})"
    )
    options = parser.parse_args()
    if options.rehearse:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() == "cpu":
        sys.exit("gpu.py found no GPU; --rehearse runs every step on a CPU, without measuring anything.")
    run = Run(options.rehearse, options.budget)
    kind = "rehearsal" if run.rehearse else re.sub(r"\W+", "-", run.kind.lower()).strip("-")
    out = options.out or Path(__file__).parent / "results" / f"gpu-{kind}"
    report = run_parts(
        run.parts(),
        checkpoint="random weights",
        output=out.with_suffix(".json"),
        progress=sys.stderr.isatty(),
    )
    said = {"measured_on_a_gpu": not run.rehearse, "device": run.kind} | report.to_dict()
    out.with_suffix(".json").write_text(json.dumps(as_json(said), indent=1) + "\n", encoding="utf-8")
    text = tables(run, report.parts)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())

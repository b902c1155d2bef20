"""Parity against the float64 truth and the reference, over all random configurations and the checkpoint.

    python benchmarks/parity.py            # writes benchmarks/results/parity.md

Takes some minutes, nearly all of it compilation: every configuration is its own program.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import divergence, parity  # noqa: E402
from support.configs import FULL  # noqa: E402
from support.problems import CHECKPOINT, load, prompt_ids, reference_generate, teacher_forced  # noqa: E402
from support.reference import save_reference  # noqa: E402

from qwen_moe_jax import QwenMoe  # noqa: E402
from qwen_moe_jax.evaluation.evaluate import MAX_SOLUTION_TOKENS  # noqa: E402
from qwen_moe_jax.evaluation.word_problems import held_out  # noqa: E402

TRAINED_SEEDS = (1, 2, 3)  # of a thousand problems each


def describe(config: dict) -> str:
    """One configuration in a few characters."""
    layers = "".join("F" if kind == FULL else "L" for kind in config["layer_types"])
    rope = config["rope_parameters"]
    return (
        f"{layers} h{config['num_attention_heads']}/{config['num_key_value_heads']}x{config['head_dim']} "
        f"l{config['linear_num_value_heads']}/{config['linear_num_key_heads']} "
        f"k{config['linear_conv_kernel_dim']} e{config['num_experts']}/{config['num_experts_per_tok']} "
        f"r{rope['partial_rotary_factor']:g}{' yarn' if rope['rope_type'] == 'yarn' else ''}"
    )


def random_models(seeds: range) -> list[str]:
    """The float32 table, its summary, and the greedy comparison."""
    lines = [
        "| seed | configuration | length | ours RMS | reference RMS | ratio | ours max | reference max "
        "| router margin |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    judged: list[parity.Errors] = []
    ties: list[parity.Errors] = []
    equal, partings = 0, []
    for seed in tqdm(seeds, unit="model"):
        random_model = parity.random_model(seed)
        with tempfile.TemporaryDirectory() as folder:
            ours = QwenMoe.from_pretrained(save_reference(random_model.reference, folder), dtype="auto")
        for length in parity.lengths_of(seed):
            for case in random_model.cases(length):
                logits = np.asarray(ours.logits(case.ids[None]))[0]
                error = parity.measure(case, logits, parity.reference_on(case))
                (ties if case.router_tie else judged).append(error)
                lines.append(
                    f"| {seed} | {describe(random_model.config)} | {length} | {error.ours_rms:.2e} "
                    f"| {error.reference_rms:.2e} | {error.ratio:.2f} | {error.ours_max:.1e} "
                    f"| {error.reference_max:.1e} | {case.router_margin:.0e}"
                    f"{' (tie, drawn again)' if case.router_tie else ''} |"
                )
        case = random_model.case(parity.lengths_of(seed)[0])
        tokens = ours.generate(case.ids[None], max_new_tokens=parity.GREEDY_TOKENS).sequences[0]
        found = parity.compare_greedy(random_model, case.ids, tokens, parity.reference_tokens(case))
        equal += found is None
        if found is not None:
            partings.append((seed, found))
    ratios = [error.ratio for error in judged]
    summary = [
        f"- {len(seeds)} configurations, {len(judged)} cases. RMS error against the float64 truth, ours "
        f"over the reference's: geometric mean {parity.geometric_mean(ratios):.3f} (bar "
        f"{parity.GEOMETRIC_MEAN_RATIO}), smallest {min(ratios):.2f}, largest {max(ratios):.2f} (bar "
        f"{parity.LARGEST_RATIO}).",
        f"- Largest difference from the truth over its largest logit: ours "
        f"{max(e.ours_max for e in judged):.1e} (bar {parity.LARGEST_DIFFERENCE}), the reference's "
        f"{max(e.reference_max for e in judged):.1e}.",
        f"- {len(ties)} prompts were drawn again because the truth's router margin was below "
        f"{parity.ROUTER_TIE} (they are in the table, not in the figures above)"
        + (
            f": on them ours is off by at most {max(e.ours_max for e in ties):.1e}, the reference by "
            f"{max(e.reference_max for e in ties):.1e}."
            if ties
            else "."
        ),
        f"- {parity.GREEDY_TOKENS} greedy tokens equal the reference's in {equal} of {len(seeds)} "
        f"configurations; {len(partings)} part.",
    ]
    summary += [
        f"  - seed {seed}: after {d.step} tokens, the truth's two best {d.gap:.1e} apart (of the largest "
        f"logit; excused up to {parity.LARGEST_DIFFERENCE}: {'yes' if d.excused else 'NO'}), router margin "
        f"{d.router_margin:.0e}."
        for seed, d in partings
    ]
    return ["## float32, random models", "", *summary, "", *lines, ""]


def bfloat16(seeds: range) -> list[str]:
    """Mean KL of next-token distributions over random models and the trained checkpoint."""
    found = []
    for seed in tqdm(seeds, unit="model"):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = divergence.bfloat16_checkpoint(seed, Path(folder))
            found.append(divergence.measure(checkpoint, divergence.random_rows(seed)))
    whole = divergence.pooled(found)
    # a few flipped experts decide the ratio of a few hundred problems
    problems = [teacher_forced(CHECKPOINT, held_out(1000, seed=seed)) for seed in TRAINED_SEEDS]
    parts = [divergence.measure(CHECKPOINT, rows) for rows in problems]
    trained = divergence.pooled(parts)
    ratios = [one.ratio for one in found]
    return [
        "## bfloat16",
        "",
        "Mean KL(reference bf16, ours bf16) over mean KL(reference fp32, reference bf16), same bf16 weights "
        f"(bar {divergence.LARGEST_RATIO}).",
        "",
        f"- {len(seeds)} random models, {divergence.ROWS} x {divergence.LENGTH} positions each: "
        f"{whole.ours:.2e} over {whole.yardstick:.2e} nats = {whole.ratio:.3f} pooled; single models "
        f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean {parity.geometric_mean(ratios):.3f}.",
        f"- The trained checkpoint, {len(parts)} x 1000 held-out problems with their solutions: "
        f"{trained.ours:.2e} over {trained.yardstick:.2e} nats = {trained.ratio:.3f} pooled; the thousands "
        f"{', '.join(f'{one.ratio:.2f}' for one in parts)}.",
        "",
    ]


def trained_checkpoint() -> list[str]:
    """How many of 200 replies equal the reference's, in both dtypes, batched and alone."""
    prompts = prompt_ids(CHECKPOINT, held_out(200, seed=0))
    lines = ["## The trained checkpoint, 200 held-out problems, every token of the reply", ""]
    for name in ("float32", "bfloat16"):
        expected = reference_generate(load(CHECKPOINT, getattr(torch, name)), prompts)
        ours = QwenMoe.from_pretrained(CHECKPOINT, dtype=getattr(jnp, name))
        for way, size in (("batched by 50", 50), ("alone", 1)):
            if (name, way) == ("bfloat16", "alone"):
                continue  # the reference's own bfloat16 replies depend on the batch
            found = [
                reply
                for start in range(0, len(prompts), size)
                for reply in ours.generate(
                    prompts[start : start + size], max_new_tokens=MAX_SOLUTION_TOKENS
                ).sequences
            ]
            same = sum(a == b for a, b in zip(found, expected, strict=True))
            tokens = sum(map(len, expected))
            lines.append(f"- {name}, {way}: {same} of {len(prompts)} replies equal ({tokens} tokens).")
    return [*lines, ""]


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(parity.SEEDS), help="random models to measure")
    parser.add_argument("--only", choices=("float32", "bfloat16", "trained"), help="one part, not written")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parity.md")
    args = parser.parse_args()
    start = time.perf_counter()
    lines = [
        "# Parity",
        "",
        f"jax {jax.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{jax.default_backend()}. Made by `python benchmarks/parity.py`.",
        "",
    ]
    seeds = range(args.seeds)
    if args.only in (None, "float32"):
        lines += random_models(seeds)
    if args.only in (None, "bfloat16"):
        lines += bfloat16(seeds)
    if args.only in (None, "trained"):
        lines += trained_checkpoint()
    lines.append(f"Measured in {(time.perf_counter() - start) / 60:.0f} minutes.")
    report = "\n".join(lines) + "\n"
    print(report)
    if args.only is None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()

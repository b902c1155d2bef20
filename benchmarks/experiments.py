"""What captures cost, and how fast texts are scored beside lm-eval's own `hf` model, on a CPU.

    python benchmarks/make_checkpoint.py mid DIR --dtype bfloat16
    python benchmarks/experiments.py DIR [--questions 24] [--tokens 512] [--out NAME]

Both in bfloat16, in turns, in one run. Captures: `logits` of a prompt, `run` without captures, and `run` with
every point but the attention weights and with all of them. Scores: multiple-choice questions with contexts of
500 tokens and four continuations of 4 tokens, through lm-eval's `loglikelihood` of both models; `hf` takes
batches of 1, 4 and 8, of which the fastest counts, on a few questions.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from needs import need

CONTEXT, CHOICES, ANSWER = 500, 4, 4


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def captures(model: Any, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of each way to run a prompt."""
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, tokens).tolist()
    some = [name for name in model.points() if not name.endswith(".attention")]
    ways: dict[str, Callable[[], Any]] = {
        "logits": lambda: model.logits([ids]),
        "run": lambda: model.run([ids]),
        "all but attention": lambda: model.run([ids], capture=some),
        "everything": lambda: model.run([ids], capture="*"),
    }
    for work in ways.values():
        work()  # compiles
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(seconds(work))
    return {name: statistics.median(times) for name, times in found.items()}


def questions(vocab: int, count: int, seed: int) -> list[tuple[Any, list[int], list[int]]]:
    """Requests as lm-eval hands them to a model: (key, context, continuation)."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        context = rng.integers(3, vocab, CONTEXT).tolist()
        for choice in range(CHOICES):
            text = rng.integers(3, vocab, ANSWER).tolist()
            found.append(((f"{number}", f"{choice}"), context, text))
    return found


def main() -> None:
    """Prints and writes what the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--hf-questions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    need("lm_eval", "torch", "transformers")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from qwen_moe_jax import QwenMoe
    from qwen_moe_jax.host import processor_says

    model = QwenMoe.from_pretrained(args.folder, dtype="bfloat16")
    found: dict[str, Any] = {"processor": processor_says("model name"), "kernels": model.kernels.native}
    found["captures"] = captures(model, args.tokens, args.rounds)
    base = found["captures"]["logits"]
    for name, value in found["captures"].items():
        print(f"{name:<20}{value:8.3f} s {value / base:6.2f} of logits", flush=True)

    vocab = model.config.vocab_size
    warm = questions(vocab, 1, 1)
    model.score([c for _, c, _ in warm], [t for _, _, t in warm])
    asked = questions(vocab, args.questions, 2)
    ours = seconds(lambda: model.score([c for _, c, _ in asked], [t for _, _, t in asked]))
    print(f"ours: {args.questions / ours:.3f} questions a second", flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    reference = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
    few = questions(vocab, args.hf_questions, 2)
    rates = {}
    make_harness: Any = HFLM  # whose class hides what it takes
    for batch in (1, 4, 8):
        harness = make_harness(
            pretrained=reference, tokenizer=some_tokenizer(), batch_size=batch, max_length=2048
        )
        harness._loglikelihood_tokens(few[:batch], disable_tqdm=True)  # warm
        rates[batch] = args.hf_questions / seconds(
            lambda h=harness: h._loglikelihood_tokens(few, disable_tqdm=True)
        )
        print(f"hf, batches of {batch}: {rates[batch]:.3f} questions a second", flush=True)
    found["scores"] = {"ours": args.questions / ours, "hf": rates}
    print(f"{args.questions / ours / max(rates.values()):.2f} times as many questions a second")
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def some_tokenizer() -> Any:
    """What HFLM looks at of a tokenizer, of token ids that are given."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    main()

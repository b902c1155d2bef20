"""Measures the small checkpoint with the PyTorch reference: greedy decoding, answers compared.

    python checkpoints/measure_abacus.py

Prints accuracy on seen templates with held-out numbers and on unseen templates, for the weights loaded
as bfloat16 and as float32, with and without the empty thought; then what is left of it when the shared
expert's branch is counted several times, as summing a replicated branch over devices would do.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5MoeForCausalLM
from transformers.utils import logging

from qwen_moe_jax.evaluation.accuracy import wilson_interval
from qwen_moe_jax.evaluation.word_problems import Problem, extract_answer, held_out

# Longer than any solution; a reply this long is a loop and counts as wrong.
MAX_NEW_TOKENS = 96
OVER_COUNTS = (1, 2, 4, 8)


@torch.no_grad()
def replies(
    model: Qwen3_5MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch: int,
    **template_options: bool,
) -> list[str]:
    """Greedy replies, in the order of the problems. Prompts of equal length share a batch: no padding."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_dict=False,
            **template_options,
        )
        for problem in problems
    ]
    texts = [""] * len(problems)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for _, group in itertools.groupby(by_length, key=lambda row: len(prompts[row])):
        rows = list(group)
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            ids = torch.tensor([prompts[row] for row in some])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
            for row, tokens in zip(some, out[:, ids.shape[1] :], strict=True):
                texts[row] = tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


def report(label: str, problems: Sequence[Problem], texts: Sequence[str]) -> None:
    """Prints one line of accuracy with its 95 % interval."""
    right = sum(extract_answer(text) == p.answer for text, p in zip(texts, problems, strict=True))
    low, high = wilson_interval(right, len(problems))
    print(
        f"{label}: {100 * right / len(problems):.1f} % ({right} of {len(problems)}; "
        f"{100 * low:.1f} to {100 * high:.1f} %)",
        flush=True,
    )


def scale_shared_expert(model: Qwen3_5MoeForCausalLM, factor: float) -> None:
    """Multiplies what the shared expert adds; exact for powers of two in any float format."""
    for layer in model.model.layers:
        layer.mlp.shared_expert.down_proj.weight.data.mul_(factor)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(Path(__file__).parent / "abacus"))
    parser.add_argument("--seen", type=int, default=1000, help="problems on seen templates")
    parser.add_argument("--unseen", type=int, default=400, help="problems on unseen templates")
    parser.add_argument("--seed", type=int, default=1, help="the curve in training_log.csv uses seed 0")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    seen = held_out(options.seen, options.seed)
    unseen = held_out(options.unseen, options.seed, unseen_templates=True)
    for dtype in (torch.bfloat16, torch.float32):
        model = Qwen3_5MoeForCausalLM.from_pretrained(options.checkpoint, dtype=dtype).eval()
        name = str(dtype).removeprefix("torch.")
        report(f"{name}, seen", seen, replies(model, tokenizer, seen, options.batch))
        report(f"{name}, unseen", unseen, replies(model, tokenizer, unseen, options.batch))
        texts = replies(model, tokenizer, seen, options.batch, enable_thinking=False)
        report(f"{name}, seen, empty thought", seen, texts)
    # `model` is the float32 one from here on.
    for previous, factor in itertools.pairwise((1, *OVER_COUNTS)):
        scale_shared_expert(model, factor / previous)
        texts = replies(model, tokenizer, seen, options.batch)
        report(f"float32, seen, shared expert counted {factor} times", seen, texts)


if __name__ == "__main__":
    main()

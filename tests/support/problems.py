"""Word problems as the reference sees them: its tokenizer, its chat template, its generate."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

import support.reference  # noqa: F401  (sets torch's threads, silences its start-up messages)
from qwen_moe_jax.evaluation.evaluate import MAX_SOLUTION_TOKENS
from qwen_moe_jax.evaluation.word_problems import Problem

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "abacus"


def chats(problems: Sequence[Problem]) -> list[list[dict[str, str]]]:
    """One user message each."""
    return [[{"role": "user", "content": problem.question}] for problem in problems]


@functools.cache
def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3_5MoeForCausalLM:
    """The reference with a checkpoint's weights."""
    return Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@functools.cache
def _tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(folder: Path, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of each problem's chat, up to where the reply starts."""
    return [
        list(_tokenizer(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats(problems)
    ]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both int64 [batch, longest]."""
    longest = max(map(len, rows))
    ids = np.array([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def reference_generate(
    model: Qwen3_5MoeForCausalLM, rows: Sequence[Sequence[int]], batch_size: int = 50
) -> list[list[int]]:
    """Greedy replies by the reference's own `generate`, end token included, left-padded in batches."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    pad = model.generation_config.pad_token_id or 0
    replies: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        ids, mask = (torch.as_tensor(x) for x in left_padded(rows[start : start + batch_size], pad))
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=MAX_SOLUTION_TOKENS, do_sample=False, pad_token_id=pad
        )
        for tokens in out[:, ids.shape[1] :].tolist():
            stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            replies.append(tokens[:stop])
    return replies


def teacher_forced(folder: Path, problems: Sequence[Problem]) -> np.ndarray:
    """Prompt and worked solution, int [batch, shortest]: cut to the shortest so that no row has a pad."""
    tokenizer = _tokenizer(folder)
    rows = [
        prompt + tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        for prompt, problem in zip(prompt_ids(folder, problems), problems, strict=True)
    ]
    shortest = min(map(len, rows))
    return np.array([row[:shortest] for row in rows])

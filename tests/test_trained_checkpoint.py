"""The trained checkpoint: every token of our replies to held-out problems is the reference's."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.problems import CHECKPOINT, chats, load, prompt_ids, reference_generate

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.evaluation.evaluate import MAX_SOLUTION_TOKENS
from qwen_moe_jax.evaluation.word_problems import held_out

PROBLEMS = held_out(200, seed=0)
BATCH = 40  # also the default run's share; one compiled shape for all batches

SOME_BATCHED = pytest.param(BATCH, id="40 problems")
SOME_ALONE = pytest.param(5, id="5 problems")
ALL = pytest.param(len(PROBLEMS), id="all problems", marks=pytest.mark.slow)


@functools.cache
def ours(dtype: str = "float32") -> QwenMoe:
    return QwenMoe.from_pretrained(CHECKPOINT, dtype=jnp.dtype(dtype))


@functools.cache
def prompts() -> list[list[int]]:
    return prompt_ids(CHECKPOINT, PROBLEMS)


@functools.cache
def replies(first: int, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """The reference's replies to one batch, decoded together."""
    return reference_generate(load(CHECKPOINT, dtype), prompts()[first : first + BATCH])


def expected(count: int) -> list[list[int]]:
    return [reply for first in range(0, count, BATCH) for reply in replies(first)][:count]


def generate(rows: list[list[int]], dtype: str = "float32") -> list[list[int]]:
    return ours(dtype).generate(rows, max_new_tokens=MAX_SOLUTION_TOKENS).sequences


def test_our_chat_template_and_tokenizer_give_the_references_prompts() -> None:
    texts = chats(PROBLEMS[:BATCH])
    by_chat = ours().generate(texts, max_new_tokens=2).sequences
    by_ids = ours().generate(prompts()[:BATCH], max_new_tokens=2)
    assert by_chat == by_ids.sequences
    assert ours().generate(texts, max_new_tokens=2).usage.prompt_tokens == by_ids.usage.prompt_tokens
    assert by_ids.usage.prompt_tokens == sum(map(len, prompts()[:BATCH]))


@pytest.mark.parametrize("count", [SOME_BATCHED, ALL])
def test_batched_replies_equal_the_references(count: int) -> None:
    found = [
        reply for first in range(0, count, BATCH) for reply in generate(prompts()[first : first + BATCH])
    ]
    assert found == expected(count)


@pytest.mark.parametrize("count", [SOME_ALONE, ALL])
def test_replies_alone_equal_the_references(count: int) -> None:
    assert [generate([prompt])[0] for prompt in prompts()[:count]] == expected(count)


@pytest.mark.parametrize("count", [SOME_ALONE, ALL])
def test_the_reference_alone_replies_as_it_does_in_a_batch(count: int) -> None:
    """So that equality with its batch is equality with its single run."""
    alone = reference_generate(load(CHECKPOINT), prompts()[:count], batch_size=1)
    assert alone == expected(count)


@pytest.mark.parametrize("count", [SOME_BATCHED, ALL])
def test_prefill_of_the_replies_predicts_each_of_their_tokens(count: int) -> None:
    """The same tokens come out of one forward over prompt and reply as out of decoding."""
    for first in range(0, count, BATCH):
        rows = prompts()[first : first + BATCH]
        longest = max(len(row) + len(reply) for row, reply in zip(rows, replies(first), strict=True))
        ids, mask = np.zeros((2, len(rows), longest), np.int64)
        for i, (row, reply) in enumerate(zip(rows, replies(first), strict=True)):
            ids[i, : len(row) + len(reply)] = row + reply
            mask[i, : len(row) + len(reply)] = 1
        best = np.asarray(ours().logits(ids, mask)).argmax(-1)
        for i, (row, reply) in enumerate(zip(rows, replies(first), strict=True)):
            assert best[i, len(row) - 1 : len(row) + len(reply) - 1].tolist() == reply

"""bfloat16: next-token distributions as close to the reference's as its own lie to its float32 ones."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.configs import random_ids
from support.divergence import (
    LARGEST_RATIO,
    bfloat16_checkpoint,
    bfloat16_config,
    measure,
    pooled,
    random_rows,
)
from support.problems import CHECKPOINT, teacher_forced
from support.reference import build_reference, reference_logits, save_reference
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.evaluation.word_problems import held_out

# Both layer kinds, mixed and alone; every convolution kernel; top-1 to top-8.
SEEDS = (7, 2, 12, 29, 3)


@pytest.mark.slow
def test_mean_kl_over_random_models_is_within_the_bar(tmp_path: Path) -> None:
    found = [measure(bfloat16_checkpoint(seed, tmp_path / str(seed)), random_rows(seed)) for seed in SEEDS]
    assert pooled(found).ratio <= LARGEST_RATIO, found


@pytest.mark.slow
def test_mean_kl_on_the_trained_checkpoint_is_within_the_bar() -> None:
    found = measure(CHECKPOINT, teacher_forced(CHECKPOINT, held_out(400, seed=1)))
    assert found.ratio <= LARGEST_RATIO, found


def test_bar_passes_another_path_of_the_reference_and_fails_a_doubled_shared_expert(tmp_path: Path) -> None:
    """Row by row and batched the reference rounds its bfloat16 sums differently; that is no mistake."""
    folder = bfloat16_checkpoint(SEEDS[0], tmp_path)
    other = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rows = random_rows(SEEDS[0])

    def one_by_one(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([reference_logits(other, row) for row in rows])

    assert measure(folder, rows, ours=one_by_one).ratio <= LARGEST_RATIO
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("shared_expert.down_proj.weight"):
                weight.mul_(2)
    assert measure(folder, rows, ours=one_by_one).ratio > 3 * LARGEST_RATIO


def test_decay_parameters_are_not_rounded_to_bfloat16(tmp_path: Path) -> None:
    """A_log and dt_bias that a checkpoint stores in float32 act in float32, also in a bfloat16 model."""
    reference = build_reference(bfloat16_config(1), 1).bfloat16()
    ids = random_ids(bfloat16_config(1), 64, 1)[None]

    def logits(folder: Path) -> np.ndarray:
        return np.asarray(QwenMoe.from_pretrained(folder, dtype=jnp.bfloat16).logits(ids))

    before = logits(save_reference(reference, tmp_path / "rounded"))
    for name, module in reference.named_modules():
        if name.endswith("linear_attn"):
            for parameter in (module.A_log, module.dt_bias):
                rounded = parameter.data
                # a quarter of a bfloat16 step or less: rounding to bfloat16 would undo it
                parameter.data = rounded.float() * (1 + 2**-10)
                assert torch.equal(parameter.data.bfloat16(), rounded)
    after = logits(save_reference(reference, tmp_path / "exact"))
    assert (before != after).any()

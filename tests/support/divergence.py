"""How bfloat16 parity is measured: mean KL of next-token distributions, beside the reference's own.

KL(p || q) with p the side compared against. The yardstick is KL(reference float32 || reference bfloat16)
for the same bfloat16 weights: what the rounding of activations costs. Were our roundings in other
places than the reference's, two independent errors would add up and give about twice that.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax import QwenMoe
from support.configs import random_config, random_ids
from support.reference import build_reference, reference_logits, save_reference

LARGEST_RATIO = 1.2  # the bar: mean KL, ours over the reference's own
ROWS, LENGTH = 8, 64  # many short rows: a wrong expert choice by rounding stays in its row


def mean_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Mean over all positions of KL(p || q) in nats, in float64."""
    p, q = (torch.as_tensor(np.array(x)).double().log_softmax(-1) for x in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Mean KL of ours against the bfloat16 reference, and of that against the float32 reference."""

    ours: float
    yardstick: float

    @property
    def ratio(self) -> float:
        """To be at most `LARGEST_RATIO`."""
        return self.ours / self.yardstick


def pooled(found: list[Divergence]) -> Divergence:
    """The mean over models: one expert flipped by rounding in one of them would else decide its ratio."""
    return Divergence(
        ours=sum(one.ours for one in found) / len(found),
        yardstick=sum(one.yardstick for one in found) / len(found),
    )


def measure(
    folder: Path, rows: np.ndarray, ours: Callable[[np.ndarray], np.ndarray] | None = None
) -> Divergence:
    """Compares on int rows [batch, length]; `ours` stands in for this library in the controls."""
    wide = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    narrow = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected = reference_logits(narrow, rows)
    if ours is None:
        ours = QwenMoe.from_pretrained(folder, dtype=jnp.bfloat16).logits
    return Divergence(
        ours=mean_kl(expected, np.asarray(ours(rows))),
        yardstick=mean_kl(reference_logits(wide, rows), expected),
    )


def bfloat16_config(seed: int) -> dict[str, Any]:
    """A random configuration that torch's grouped bfloat16 product takes: rows of whole 16 bytes."""
    config = random_config(seed)
    return config | {"moe_intermediate_size": -(-config["moe_intermediate_size"] // 8) * 8}


def bfloat16_checkpoint(seed: int, folder: Path) -> Path:
    """A random model rounded to bfloat16, saved."""
    return save_reference(build_reference(bfloat16_config(seed), seed).bfloat16(), folder)


def random_rows(seed: int) -> np.ndarray:
    """Ids [ROWS, LENGTH] for a seed's model."""
    return random_ids(bfloat16_config(seed), ROWS * LENGTH, seed).reshape(ROWS, LENGTH)

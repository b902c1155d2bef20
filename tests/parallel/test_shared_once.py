"""Linearity probes: with one branch silenced in the checkpoint, a layout gives the other one exactly once."""

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.configs import random_config, random_ids
from support.reference import build_reference, save_reference

from qwen_moe_jax import QwenMoe, make_mesh

SEED = 22
CONFIG = random_config(SEED)
IDS = np.stack([random_ids(CONFIG, 16, i) for i in range(4)])
MODES = ("prescaled", "outside", "sharded", "fused")
DISPATCHES = ("psum", "all_to_all")
MESHES = ((1, 2, 1), (1, 4, 2), (1, 8, 1), (2, 2, 2), (1, 3, 1))

# Float32 through two layers, in another order of summation: largest difference over the largest logit.
TOLERANCE = 5e-6
# Counted twice, the shared branch moves the logits by more than this in every checkpoint used here.
UNMISTAKABLE = 0.05


@functools.cache
def checkpoint(routed: float, shared: float, router: float = 1.0) -> Path:
    """The random model with both branches' last matrices, and the router's, times a factor."""
    model = build_reference(CONFIG, SEED)
    factors = {"experts.down_proj": routed, "shared_expert.down_proj": shared, "mlp.gate.weight": router}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for part, factor in factors.items():
                if part in name:
                    weight.mul_(factor)
    return save_reference(model, Path(tempfile.mkdtemp()))


@functools.cache
def one_device(*factors: float) -> np.ndarray:
    return np.asarray(QwenMoe.from_pretrained(checkpoint(*factors), dtype=jnp.float32).logits(IDS))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def on_mesh(factors: tuple[float, ...], sizes: tuple[int, int, int], **layout: Any) -> np.ndarray:
    model = QwenMoe.from_pretrained(checkpoint(*factors), dtype=jnp.float32, mesh=make_mesh(*sizes), **layout)
    return np.asarray(model.logits(IDS))


CASES = list(itertools.product(MODES, DISPATCHES, ("tensor", "data"), MESHES))


@pytest.mark.parametrize(
    ("mode", "dispatch", "attention", "sizes"),
    # by default every mode and dispatch once, on meshes and kinds of attention that go round
    [pytest.param(*case, marks=() if i % 22 == 0 else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_with_silent_routed_experts_the_shared_branch_counts_exactly_once(
    mode: str, dispatch: str, attention: str, sizes: tuple[int, int, int]
) -> None:
    found = on_mesh((0, 1), sizes, shared_expert=mode, expert_dispatch=dispatch, attention=attention)
    assert difference(found, one_device(0, 1)) <= TOLERANCE


@pytest.mark.parametrize("count", [0.5, 2, 4])
def test_another_count_of_the_shared_branch_would_be_noticed(count: float) -> None:
    assert difference(one_device(0, count), one_device(0, 1)) > UNMISTAKABLE


@pytest.mark.parametrize("mode", MODES)
def test_with_a_silent_shared_expert_the_routed_sum_counts_exactly_once(mode: str) -> None:
    found = on_mesh((1, 0), (1, 2, 2), shared_expert=mode)
    assert difference(found, one_device(1, 0)) <= TOLERANCE
    assert difference(one_device(2, 0), one_device(1, 0)) > UNMISTAKABLE


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_no_token_is_dropped_when_all_go_to_the_experts_of_one_rank(dispatch: str) -> None:
    """A router of zeros ties all experts, and every token goes to the first three, all on the first rank."""
    found = on_mesh((1, 1, 0), (1, 2, 1), shared_expert="sharded", expert_dispatch=dispatch)
    assert difference(found, one_device(1, 1, 0)) <= TOLERANCE
    assert difference(one_device(1, 1, 0), one_device(0, 1, 0)) > UNMISTAKABLE

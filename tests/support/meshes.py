"""Running a model on a layout: prefill, then greedy decoding token by token, with all logits kept.

A case is a random model with eight prompts of different lengths, one device's own run of it, and the float64
truth about prompts and continuations. Its prompts are drawn again until the truth has no router tie, where
rounding alone decides which expert a token gets (`parity.py`).
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.engine.shapes import right_pad
from support import oracle, parity
from support.configs import QWEN35_MOE, random_ids
from support.reference import save_reference

PROMPT_LENGTHS = (13, 5, 16, 9, 16, 11, 3, 14)  # one compiled chunk of 16
NEW_TOKENS = 5
CAPACITY = 64

# The bar for a layout's RMS error against the truth, over one device's own.
LARGEST_RATIO = 1.5
# Where configurations are drawn at random, one prompt may sit where a rounding is amplified, and decide the
# RMS of all eight. So the bar is for the geometric mean over prompts, and all of them together get the margin
# that the reference's own paths have (`parity.py`).
LARGEST_POOLED_RATIO = 3.0


@dataclasses.dataclass(frozen=True)
class Run:
    """What a model said.

    Attributes:
        logits: for each row float32 [prompt + new tokens - 1, vocab].
        tokens: for each row the greedy continuation.
    """

    logits: list[np.ndarray]
    tokens: list[list[int]]


@dataclasses.dataclass(frozen=True)
class MeshCase:
    """A model on disk, prompts, and what one device and the truth say of them."""

    seed: int
    folder: Path
    rows: list[np.ndarray]
    one_device: Run
    truth: list[np.ndarray]

    def rms(self, run: Run) -> float:
        """RMS error of all logits over the largest true one."""
        largest = max(np.abs(truth).max() for truth in self.truth)
        errors = np.concatenate([(a - b).ravel() for a, b in zip(run.logits, self.truth, strict=True)])
        return float(np.sqrt((errors**2).mean()) / largest)

    def ratio(self, run: Run) -> float:
        """RMS error over one device's own; to be at most LARGEST_RATIO."""
        return self.rms(run) / self.rms(self.one_device)

    def mean_ratio(self, run: Run) -> float:
        """Geometric mean over the prompts of a prompt's RMS error over one device's own."""
        errors = [
            [math.sqrt(((a - b) ** 2).mean()) for a, b in zip(side.logits, self.truth, strict=True)]
            for side in (run, self.one_device)
        ]
        return parity.geometric_mean([a / b for a, b in zip(*errors, strict=True)])


def run(model: QwenMoe, rows: list[np.ndarray]) -> Run:
    """Prefill in one chunk, then NEW_TOKENS greedy tokens, through the compiled forward with all logits."""
    forward = model.sequence_logits
    batch = forward.padded(len(rows))
    tokens, valid = right_pad(rows + [np.zeros(0, np.int32)] * (batch - len(rows)), 16)
    cache = forward.new_cache(batch, CAPACITY)
    logits, cache = forward(tokens, valid, cache)
    found = [[np.asarray(logits[i, : len(row)])] for i, row in enumerate(rows)]
    chosen: list[list[int]] = [[] for _ in rows]
    for step in range(NEW_TOKENS):
        for one, seen in zip(chosen, found, strict=True):
            one.append(int(seen[-1][-1].argmax()))
        if step == NEW_TOKENS - 1:
            break
        last = [np.array([one[-1]], np.int32) for one in chosen]
        tokens, valid = right_pad(last + [np.zeros(0, np.int32)] * (batch - len(rows)), 1)
        logits, cache = forward(tokens, valid, cache)
        for i, seen in enumerate(found):
            seen.append(np.asarray(logits[i]))
    return Run([np.concatenate(seen) for seen in found], chosen)


def mesh_case(seed: int, model_type: str = QWEN35_MOE) -> MeshCase:
    """Made once a process."""
    return _mesh_case(seed, model_type)


@functools.cache
def _mesh_case(seed: int, model_type: str) -> MeshCase:
    built = parity.random_model(seed, model_type)
    folder = save_reference(built.reference, Path(tempfile.mkdtemp()))
    model = QwenMoe.from_pretrained(folder, dtype=jnp.float32)
    for draw in range(20):
        rows = [
            random_ids(built.config, n, 100 * draw + i).astype(np.int32) for i, n in enumerate(PROMPT_LENGTHS)
        ]
        one_device = run(model, rows)
        truths = [
            oracle.forward(built.config, built.params, np.concatenate([row, tokens[:-1]]))
            for row, tokens in zip(rows, one_device.tokens, strict=True)
        ]
        if min(truth.router_margin.min() for truth in truths) >= parity.ROUTER_TIE:
            return MeshCase(seed, folder, rows, one_device, [truth.logits for truth in truths])
    raise RuntimeError(f"seed {seed}: twenty draws all have router ties")


def on_mesh(
    seed: int, data: int, expert: int, tensor: int, model_type: str = QWEN35_MOE, **layout: Any
) -> QwenMoe:
    """The case's model in float32 on a mesh."""
    mesh = make_mesh(data=data, expert=expert, tensor=tensor)
    return QwenMoe.from_pretrained(mesh_case(seed, model_type).folder, dtype=jnp.float32, mesh=mesh, **layout)


def assert_as_one_device(case: MeshCase, found: Run) -> None:
    """The same tokens, and logits as near the truth as one device's."""
    assert found.tokens == case.one_device.tokens
    assert case.ratio(found) <= LARGEST_RATIO


def assert_on_average_as_one_device(case: MeshCase, found: Run) -> None:
    """The same tokens, and logits as near the truth on average, of a configuration drawn at random."""
    assert found.tokens == case.one_device.tokens
    assert case.mean_ratio(found) <= LARGEST_RATIO
    assert case.ratio(found) <= LARGEST_POOLED_RATIO


def factorisations(devices: int) -> Iterator[tuple[int, int, int]]:
    """All (data, expert, tensor) whose product is `devices`."""
    for data in range(1, devices + 1):
        for expert in range(1, devices // data + 1):
            if devices % (data * expert) == 0:
                yield data, expert, devices // (data * expert)

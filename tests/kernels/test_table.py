"""Which implementation runs: one table, and what a user may ask for instead."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import random_ids

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import AMD, IMPLEMENTATIONS, PALLAS, TARGETS, Kernels, make_kernels
from qwen_moe_jax.kernels.target import current_target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", IMPLEMENTATIONS)
def test_every_operation_has_a_known_implementation_everywhere(operation, target, dtype):
    for amount in (0, 1e-3, 1, 7, 1e6):
        assert Kernels(target).pick(operation, dtype, amount) in IMPLEMENTATIONS[operation]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_only_amd_targets_run_pallas_kernels(target, dtype):
    kernels = Kernels(target)
    for operation, known in IMPLEMENTATIONS.items():
        for amount in (0.1, 1, 1000):
            assert known[kernels.pick(operation, dtype, amount)] != PALLAS


@pytest.mark.parametrize("target", AMD)
def test_few_slots_an_expert_are_gathered_and_many_are_sorted(target):
    kernels = Kernels(target)
    # decode of the 397B, 512 experts and 10 slots a token: one row, 8 rows; then 64 rows and a prompt
    picked = [kernels.pick("experts", "bfloat16", n * 10 / 512) for n in (1, 8, 64, 4096)]
    assert picked == ["pallas_gathered", "pallas_gathered", "pallas_grouped", "pallas_grouped"]


def test_what_is_asked_for_wins_and_is_said():
    kernels = make_kernels("gfx950", {"experts": "grouped"})
    assert kernels.pick("experts", "bfloat16", 0.1) == "grouped"
    assert kernels.pick("attention", "bfloat16", 1) == "flash"
    lines = kernels.lines("bfloat16")
    assert "  experts       grouped, asked for" in lines
    assert any(line.startswith("  attention     flash") for line in lines)


def test_xla_means_no_kernel_of_our_own():
    for target in TARGETS:
        kernels = make_kernels(target, "xla")
        for operation, known in IMPLEMENTATIONS.items():
            for amount in (0.1, 1, 1000):
                assert known[kernels.pick(operation, "bfloat16", amount)] != PALLAS


@pytest.mark.parametrize(
    ("target", "asked", "words"),
    [
        ("cpu", "triton", 'expected "auto", "xla" or a mapping'),
        ("cpu", {"expert": "grouped"}, "operations are embedding, linear, experts"),
        ("cpu", {"experts": "fastest"}, "it is done by gathered, grouped, dense"),
        ("cpu", {"experts": "pallas_grouped"}, "a kernel for gfx942 and gfx950, and this is cpu"),
        ("gfx90a", "auto", "the target is 'gfx90a'"),
    ],
)
def test_what_cannot_be_is_one_sentence(target, asked, words):
    with pytest.raises(InputError) as caught:
        make_kernels(target, asked)
    assert words in str(caught.value)


def test_this_machine_is_a_cpu():
    assert current_target() == "cpu"


ABACUS = Path(__file__).resolve().parents[2] / "checkpoints" / "abacus"

# The trained checkpoint in float32: sums in another order in every layer, over the largest logit.
LOGITS_TOLERANCE = 2e-5


def test_a_model_takes_the_experts_asked_for_and_describes_them():
    rng_ids = random_ids({"vocab_size": 400}, 20, 0)[None]
    usual = QwenMoe.from_pretrained(ABACUS, dtype=jnp.float32)
    asked = QwenMoe.from_pretrained(ABACUS, dtype=jnp.float32, kernels={"experts": "dense"})
    assert "experts       dense, asked for" in str(asked.describe())
    name = usual.kernels.pick("experts", "float32", 0.1)
    assert f"experts       {name}" in str(usual.describe())
    wanted, found = np.asarray(usual.logits(rng_ids)), np.asarray(asked.logits(rng_ids))
    assert (wanted != found).any()  # other programs
    np.testing.assert_allclose(found, wanted, rtol=0, atol=LOGITS_TOLERANCE * np.abs(wanted).max())
    with pytest.raises(InputError, match="kernels names 'expert'"):
        QwenMoe.from_pretrained(ABACUS, kernels={"expert": "dense"})

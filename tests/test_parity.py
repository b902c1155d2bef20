"""Parity: our float32 logits are as close to the float64 truth as the reference's, and our tokens are its.

The default run takes a subset of the configurations that covers every length and every kind of layer;
the slow run takes all of them. `benchmarks/parity.py` prints the whole table.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import oracle, parity
from support.configs import random_config, random_ids
from support.parity import random_model
from support.reference import (
    build_reference,
    parameters_float64,
    reference_greedy,
    reference_logits,
    save_reference,
)

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.formats.cache import empty_cache
from qwen_moe_jax.generation.loading import load_forward
from qwen_moe_jax.kernels.table import make_kernels

# One or two seeds a group of lengths; together: 1 to 4 KV heads, key/value head ratios 1, 2, 4, all
# kernels, all-linear and all-full models, YaRN, tied embeddings, top-1 to top-8.
DEFAULT_SEEDS = (0, 2, 3, 4, 5, 7, 8, 29)
GREEDY_SEEDS = (29,)


def seeds(default: tuple[int, ...]) -> list:
    """All seeds, those outside `default` marked slow."""
    return [seed if seed in default else pytest.param(seed, marks=pytest.mark.slow) for seed in parity.SEEDS]


@functools.cache
def our_model(seed: int) -> QwenMoe:
    with tempfile.TemporaryDirectory() as folder:
        return QwenMoe.from_pretrained(save_reference(random_model(seed).reference, folder), dtype="auto")


@functools.cache
def errors(seed: int) -> dict[int, parity.Errors]:
    """Errors by prompt length."""
    found = {}
    for length in parity.lengths_of(seed):
        case = random_model(seed).case(length)
        ours = np.asarray(our_model(seed).logits(case.ids[None]))
        assert ours.shape == (1, *case.truth.shape)
        assert ours.dtype == np.float32
        found[length] = parity.measure(case, ours[0], parity.reference_on(case))
    return found


@pytest.mark.parametrize("seed", seeds(DEFAULT_SEEDS))
def test_logits_are_close_to_the_truth(seed: int) -> None:
    for length, error in errors(seed).items():
        assert error.ours_max <= parity.LARGEST_DIFFERENCE, (length, error)
        assert error.ratio <= parity.LARGEST_RATIO, (length, error)


@pytest.mark.parametrize(
    "seeds", [DEFAULT_SEEDS, pytest.param(tuple(parity.SEEDS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_errors_are_no_larger_than_the_references_on_the_whole(seeds: tuple[int, ...]) -> None:
    ratios = [error.ratio for seed in seeds for error in errors(seed).values()]
    assert parity.geometric_mean(ratios) <= parity.GEOMETRIC_MEAN_RATIO, ratios


@pytest.mark.parametrize("seed", seeds(GREEDY_SEEDS))
def test_128_greedy_tokens_equal_the_references(seed: int) -> None:
    case = random_model(seed).case(parity.lengths_of(seed)[0])
    out = our_model(seed).generate(case.ids[None], max_new_tokens=parity.GREEDY_TOKENS)
    found = parity.compare_greedy(
        random_model(seed), case.ids, out.sequences[0], parity.reference_tokens(case)
    )
    assert found is None or found.excused, found


def test_three_rows_of_positions_give_the_truths_logits(tmp_path: Path) -> None:
    """MRoPE with different temporal, height and width positions, which text alone never shows."""
    config = random_config(5)  # with YaRN
    config["rope_parameters"] |= {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
    config["head_dim"] = 8
    reference = build_reference(config, 5)
    ids = random_ids(config, 40, 5)
    positions = np.random.default_rng(5).integers(0, 300, (3, len(ids)))
    truth = oracle.forward(config, parameters_float64(reference), ids, positions).logits

    folder = save_reference(reference, tmp_path)
    own = ModelConfig.from_file(folder)
    float32 = jnp.dtype(jnp.float32)
    forward = load_forward(folder, own, float32, make_kernels("cpu"), progress=False).forward
    decoder = forward.decoder

    @jax.jit
    def logits(tokens: jax.Array, rope_positions: jax.Array) -> jax.Array:
        cache = empty_cache(own, 1, 64, float32, float32)
        hidden, _ = decoder(tokens, jnp.ones(tokens.shape, bool), cache, rope_positions)
        return decoder.logits(hidden)

    def difference(rope_positions: np.ndarray) -> float:
        ours = np.asarray(logits(ids[None].astype(np.int32), rope_positions[:, None].astype(np.int32)))[0]
        return float(np.abs(ours - truth).max() / np.abs(truth).max())

    assert difference(positions) <= parity.LARGEST_DIFFERENCE
    assert difference(positions[[0, 2, 1]]) > 10 * parity.LARGEST_DIFFERENCE, "height and width are one"


def test_default_seeds_cover_every_length_and_layer_kind() -> None:
    lengths = {length for seed in DEFAULT_SEEDS for length in parity.lengths_of(seed)}
    assert lengths == {1, 2, 63, 64, 65, 127, 128, 129, 200}
    configs = [random_model(seed).config for seed in DEFAULT_SEEDS]
    assert {frozenset(config["layer_types"]) for config in configs} == {
        frozenset({"linear_attention"}),
        frozenset({"full_attention"}),
        frozenset({"linear_attention", "full_attention"}),
    }
    assert {c["linear_num_value_heads"] // c["linear_num_key_heads"] for c in configs} == {1, 2, 4}
    assert {config["num_key_value_heads"] for config in configs} == {1, 2, 3, 4}
    assert {config["linear_conv_kernel_dim"] for config in configs} == {2, 3, 4}
    assert {config["rope_parameters"]["rope_type"] for config in configs} == {"default", "yarn"}
    assert {config["tie_word_embeddings"] for config in configs} == {False, True}


# Controls: the measurement passes the reference in our place, and fails a reference with one mistake in it.

CONTROL_SEED = 0


def test_measurement_passes_the_reference_itself() -> None:
    case = random_model(CONTROL_SEED).case(65)
    logits = parity.reference_on(case)
    error = parity.measure(case, logits, logits)
    assert error.ratio == 1
    assert error.ours_max <= parity.LARGEST_DIFFERENCE
    tokens = parity.reference_tokens(case)
    assert parity.compare_greedy(random_model(CONTROL_SEED), case.ids, tokens, tokens) is None


@pytest.mark.parametrize(
    ("ending", "mistake"),
    [
        ("shared_expert.down_proj.weight", lambda w: w.mul_(2)),  # the shared expert counted twice
        ("input_layernorm.weight", lambda w: w.add_(1)),  # a zero-centred norm shifted a second time
        ("A_log", lambda w: w.copy_(w.bfloat16())),  # the decay computed in the model dtype
        ("experts.down_proj", lambda w: w[-1].zero_()),  # one expert's tokens dropped
    ],
    ids=["shared expert doubled", "norm shifted twice", "A_log in bfloat16", "one expert dropped"],
)
def test_measurement_fails_a_mistaken_model(ending: str, mistake) -> None:
    case = random_model(CONTROL_SEED).case(65)
    mistaken = parity.RandomModel(CONTROL_SEED).reference
    with torch.no_grad():
        for name, weight in mistaken.named_parameters():
            if name.endswith(ending):
                mistake(weight)
    error = parity.measure(case, reference_logits(mistaken, case.ids)[0], parity.reference_on(case))
    assert error.ratio > 10 * parity.LARGEST_RATIO
    assert error.ours_max > 3 * parity.LARGEST_DIFFERENCE


def test_greedy_comparison_does_not_excuse_a_mistaken_model() -> None:
    case = random_model(CONTROL_SEED).case(65)
    mistaken = parity.RandomModel(CONTROL_SEED).reference
    with torch.no_grad():
        for name, weight in mistaken.named_parameters():
            if name.endswith("shared_expert.down_proj.weight"):
                weight.mul_(2)
    tokens = reference_greedy(mistaken, case.ids, parity.GREEDY_TOKENS)
    found = parity.compare_greedy(random_model(CONTROL_SEED), case.ids, tokens, parity.reference_tokens(case))
    assert found is not None
    assert not found.excused


def test_greedy_comparison_excuses_only_a_tie_of_the_truth() -> None:
    one = parity.Disagreement(step=3, ours=5, reference=6, gap=1e-6, best_two=(6, 5), router_margin=1.0)
    assert one.excused
    wide = parity.Disagreement(step=3, ours=5, reference=6, gap=1e-2, best_two=(6, 5), router_margin=1.0)
    assert not wide.excused
    other = parity.Disagreement(step=3, ours=4, reference=6, gap=1e-6, best_two=(6, 5), router_margin=1.0)
    assert not other.excused

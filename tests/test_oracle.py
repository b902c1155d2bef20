"""The float64 oracle is the reference's function: both in float64, they agree to rounding."""

import numpy as np
import pytest
import torch
from support import oracle
from support.configs import random_config, random_ids
from support.reference import (
    build_reference,
    float64_reference,
    parameters_float64,
    reference_logits,
)

# Largest difference over the largest logit. Both sides are float64 all the way; 48 configurations at 200
# tokens lie between 1e-15 and 1e-13, and what amplifies rounding in them is the depth of the model.
FLOAT64_ROUNDING = 1e-11
# A change of meaning must move the logits by more than this for the comparison above to be worth something.
VISIBLE = 1e-6

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200)


def relative(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(ours - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("seed", range(18))
def test_oracle_equals_reference_in_true_float64(seed: int) -> None:
    config = random_config(seed)
    model = build_reference(config, seed)
    ids = random_ids(config, LENGTHS[seed % len(LENGTHS)], seed)
    with float64_reference(config, model) as twin:
        expected = reference_logits(twin, ids)[0]
    assert expected.dtype == np.float64
    truth = oracle.forward(config, parameters_float64(model), ids)
    assert relative(truth.logits, expected) < FLOAT64_ROUNDING


@pytest.mark.parametrize("seed", [0, 5, 6, 11])  # with full attention; 5 and 11 with YaRN
def test_oracle_equals_reference_with_three_rows_of_positions(seed: int) -> None:
    config = random_config(seed)
    config["rope_parameters"] |= {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
    config["head_dim"] = 8
    model = build_reference(config, seed)
    ids = random_ids(config, 40, seed)
    positions = np.random.default_rng(seed).integers(0, 300, (3, 40))
    with float64_reference(config, model) as twin, torch.no_grad():
        given = torch.as_tensor(positions)[:, None]
        expected = twin(torch.as_tensor(ids)[None], position_ids=given, use_cache=False).logits[0].numpy()
    params = parameters_float64(model)
    assert relative(oracle.forward(config, params, ids, positions).logits, expected) < FLOAT64_ROUNDING
    text = oracle.forward(config, params, ids).logits
    assert relative(text, expected) > VISIBLE, "positions change nothing here: the comparison is void"


def test_float64_reference_leaves_the_reference_as_it_was() -> None:
    config = random_config(0)
    model = build_reference(config, 0)
    ids = random_ids(config, 30, 0)
    before = reference_logits(model, ids)
    with float64_reference(config, model):
        pass
    assert torch.ones(1).float().dtype == torch.float32
    assert reference_logits(model, ids).dtype == np.float32
    np.testing.assert_array_equal(reference_logits(model, ids), before)


def test_model_double_alone_is_not_float64() -> None:
    """Why the twin exists: `.double()` leaves float32 roundings that hide errors a million times larger."""
    config = random_config(0)
    model = build_reference(config, 0)
    ids = random_ids(config, 100, 0)
    truth = oracle.forward(config, parameters_float64(model), ids).logits
    model.set_experts_implementation("eager")  # the default has no float64 kernel
    assert relative(reference_logits(model.double(), ids)[0], truth) > 1e3 * FLOAT64_ROUNDING


def test_oracle_refuses_float32_parameters() -> None:
    config = random_config(1)
    params = parameters_float64(build_reference(config, 1))
    params["norm.weight"] = params["norm.weight"].astype(np.float32)
    with pytest.raises(TypeError, match=r"norm\.weight"):
        oracle.forward(config, params, [1, 2, 3])


def test_oracle_is_causal() -> None:
    config = random_config(6)
    params = parameters_float64(build_reference(config, 6))
    ids = random_ids(config, 70, 6)
    whole = oracle.forward(config, params, ids)
    part = oracle.forward(config, params, ids[:33])
    assert relative(whole.logits[:33], part.logits) < FLOAT64_ROUNDING


@pytest.mark.parametrize("seed", [0, 2, 7])
def test_router_margin_is_where_the_expert_choice_changes(seed: int) -> None:
    """Raising the first expert left out by the margin flips the choice; by a little less does not."""
    config = random_config(seed)
    rng = np.random.default_rng(seed)
    hidden, experts = config["hidden_size"], config["num_experts"]
    layer = {
        name.split("layers.0.mlp.")[1]: value
        for name, value in parameters_float64(build_reference(config, seed)).items()
        if name.startswith("layers.0.mlp.")
    }
    x = rng.normal(size=(1, hidden))
    top_k = config["num_experts_per_tok"]
    _, margin = oracle.mixture_of_experts(config, layer, x)
    order = np.argsort(-(x @ layer["gate.weight"].T)[0])
    assert len(order) == experts

    def chosen(raise_by: float) -> set[int]:
        logits = (x @ layer["gate.weight"].T)[0]
        logits[order[top_k]] += raise_by
        return set(np.argsort(-logits)[:top_k].tolist())

    assert chosen(0.999 * margin[0]) == chosen(0.0)
    assert chosen(1.001 * margin[0]) != chosen(0.0)


def test_forty_configurations_cover_the_claimed_ranges() -> None:
    configs = [random_config(seed) for seed in range(40)]

    def seen(key: str) -> set:
        return {config[key] for config in configs}

    assert seen("num_key_value_heads") == {1, 2, 3, 4}
    assert any(config["num_attention_heads"] % 2 for config in configs)
    assert {c["linear_num_value_heads"] // c["linear_num_key_heads"] for c in configs} == {1, 2, 4}
    assert seen("linear_num_key_heads") >= {1, 2, 3, 5}
    assert any(c["linear_key_head_dim"] != c["linear_value_head_dim"] for c in configs)
    assert {min(seen("num_experts")), max(seen("num_experts"))} == {4, 32}
    assert {min(seen("num_experts_per_tok")), max(seen("num_experts_per_tok"))} == {1, 8}
    assert seen("linear_conv_kernel_dim") == {2, 3, 4}
    assert seen("vocab_size") >= {67, 131, 257}
    assert seen("tie_word_embeddings") == {False, True}
    ropes = [config["rope_parameters"] for config in configs]
    assert {rope["partial_rotary_factor"] for rope in ropes} == {0.25, 0.5, 0.75, 1.0}
    assert {rope["rope_type"] for rope in ropes} == {"default", "yarn"}
    assert sum(min(rope["mrope_section"]) > 0 for rope in ropes) >= 5
    patterns = {frozenset(config["layer_types"]) for config in configs}
    assert len(patterns) == 3, "all linear, all full and mixed"
    assert {config["num_hidden_layers"] for config in configs} == {2, 3, 4, 5}
    assert any(c["shared_expert_intermediate_size"] != c["moe_intermediate_size"] for c in configs)


# Controls: what the field has got wrong must be far outside every tolerance used against this truth.


def _truth_with(seed: int, change: dict[str, float | str]) -> tuple[np.ndarray, np.ndarray]:
    """The logits before and after a change of parameters: {name ending: operation}."""
    config = random_config(seed)
    params = parameters_float64(build_reference(config, seed))
    ids = random_ids(config, 65, seed)
    before = oracle.forward(config, params, ids).logits
    operations = {
        "doubled": lambda w: 2 * w,
        "plus one": lambda w: w + 1,
        "rounded": lambda w: torch.as_tensor(w).bfloat16().double().numpy(),
        "reversed": lambda w: w[..., ::-1],
    }
    changed = 0
    for ending, operation in change.items():
        for name in [name for name in params if name.endswith(ending)]:
            params[name] = operations[operation](params[name])
            changed += 1
    assert changed, "the control changed no parameter"
    return before, oracle.forward(config, params, ids).logits


PARITY_TOLERANCE = 3e-4  # the largest relative difference that tests/test_parity.py allows
SEEDS_WITH_BOTH_LAYER_KINDS = (0, 1, 2, 5)


@pytest.mark.parametrize("seed", SEEDS_WITH_BOTH_LAYER_KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"shared_expert.down_proj.weight": "doubled"},
        {"input_layernorm.weight": "plus one"},
        {"q_norm.weight": "plus one"},
        {"A_log": "rounded"},
        {"dt_bias": "rounded"},
        {"conv1d.weight": "reversed"},
    ],
    ids=lambda change: " ".join((*change.keys(), *change.values())),
)
def test_known_mistakes_are_far_outside_the_parity_tolerance(seed: int, change: dict[str, str]) -> None:
    before, after = _truth_with(seed, change)
    assert relative(after, before) > 3 * PARITY_TOLERANCE

"""The routed expert forms against a float64 loop and the reference's own experts."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.rounding import to_numpy, to_torch, ulp
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model import experts as experts_module
from qwen_moe_jax.model.experts import (
    choose_experts,
    dense_experts,
    gathered_experts,
    grouped_experts,
)

FORMS = {
    "dense": jax.jit(dense_experts),
    "gathered": jax.jit(gathered_experts),
    "grouped 1": jax.jit(functools.partial(grouped_experts, block=1)),
    "grouped 5": jax.jit(functools.partial(grouped_experts, block=5)),
    "grouped 64": jax.jit(functools.partial(grouped_experts, block=64)),
}

# (experts, top_k, hidden, intermediate, tokens): odd sizes, top-1, one token, more slots than experts.
SHAPES = [(4, 1, 7, 5, 23), (32, 8, 24, 12, 1), (8, 4, 33, 9, 17)]

# float32: sums of at most 33 products of order one, twice, largest difference over the largest value.
FLOAT32_TOLERANCE = 2e-6
# bfloat16: each of gate, up, silu(gate) * up, output and weighted output is rounded to 8 bits, the first
# three before a product that averages them. An output is then off by its own two roundings (1 ulp together),
# plus about 1.5 ulp times a sum of random signs; per slot, of the largest slot's size.
BFLOAT16_ULPS = 4


def draw(shape: tuple[int, ...], seed: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Inputs with distinct experts for each token, weights summing to about one."""
    experts, top_k, hidden, inner, tokens = shape
    rng = np.random.default_rng([seed, *shape])
    ids = np.argsort(rng.uniform(size=(tokens, experts)), axis=1)[:, :top_k]
    weights = rng.dirichlet(np.ones(top_k), tokens)
    return {
        "x": jnp.asarray(rng.normal(size=(tokens, hidden)), dtype),
        "expert_ids": jnp.asarray(ids, jnp.int32),
        "weights": jnp.asarray(weights, dtype),
        "gate_up": jnp.asarray(rng.normal(size=(experts, 2 * inner, hidden)) * 2 * hidden**-0.5, dtype),
        "down": jnp.asarray(rng.normal(size=(experts, hidden, inner)) * inner**-0.5, dtype),
    }


def loop_float64(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """(the sum over slots, the largest |slot| of each token), token by token in float64."""
    x, weights, gate_up, down = (to_numpy(a) for a in (x, weights, gate_up, down))
    inner = down.shape[2]
    total, largest = np.zeros(x.shape), np.zeros(len(x))
    for t, chosen in enumerate(np.asarray(expert_ids)):
        for slot, e in enumerate(chosen):
            if e == len(down):
                continue
            gate, up = gate_up[e, :inner] @ x[t], gate_up[e, inner:] @ x[t]
            part = weights[t, slot] * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
            total[t] += part
            largest[t] = max(largest[t], np.abs(part).max())
    return total, largest


def routings(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Even and as uneven as can be; the last ones with slots, tokens and finally all without an expert."""
    ids = np.asarray(given["expert_ids"])
    experts = len(given["down"])
    rng = np.random.default_rng(0)
    drawn = {
        "distinct": ids,
        "all to the last expert": np.full_like(ids, experts - 1),
        "all to the first expert": np.zeros_like(ids),
        "two experts, the rest empty": np.where(ids % 2, experts - 2, 1),
        "some slots without expert": np.where(rng.uniform(size=ids.shape) < 0.5, experts, ids),
        "only the last token": np.where(np.arange(len(ids))[:, None] < len(ids) - 1, experts, ids),
        "no expert at all": np.full_like(ids, experts),
    }
    return {name: jnp.asarray(value) for name, value in drawn.items()}


def reference(given: dict[str, jax.Array]) -> torch.Tensor:
    """The reference's module with these weights on these inputs, in their dtype."""
    experts, hidden, inner = given["down"].shape
    config = SimpleNamespace(
        num_experts=experts,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    module = Qwen3_5MoeExperts(config)
    module.gate_up_proj.data, module.down_proj.data = to_torch(given["gate_up"]), to_torch(given["down"])
    with torch.no_grad():
        return module(to_torch(given["x"]), to_torch(given["expert_ids"]).long(), to_torch(given["weights"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_forms_equal_the_loop_whatever_the_routing(form: str, shape: tuple[int, ...]) -> None:
    given = draw(shape, 0, jnp.float32)
    for name, ids in routings(given).items():
        routed = given | {"expert_ids": ids}
        truth, _ = loop_float64(**routed)
        ours = FORMS[form](**routed)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(
            ours, truth, rtol=0, atol=FLOAT32_TOLERANCE * max(np.abs(truth).max(), 1e-30), err_msg=name
        )


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_forms_stay_within_the_roundings_of_the_model(form: str) -> None:
    for seed in range(3):
        given = draw(SHAPES[2], seed, jnp.bfloat16)
        truth, largest = loop_float64(**given)
        ours = FORMS[form](**given)
        assert ours.dtype == jnp.float32
        apart = np.abs(to_numpy(ours) - truth) / ulp(largest, jnp.bfloat16)[:, None]
        assert apart.max() <= BFLOAT16_ULPS


def test_holding_bfloat16_weights_in_float32_moves_no_form_beyond_one_rounding() -> None:
    """Held in float32 or in bfloat16: the same values, rounded at the same places."""
    given = draw(SHAPES[2], 5, jnp.bfloat16)
    held = given | {key: given[key].astype(jnp.float32) for key in ("gate_up", "down")}
    _, largest = loop_float64(**given)
    for name in ("dense", "gathered", "grouped 5"):
        form = FORMS[name]
        ours, wide = form(**given), form(**held)
        assert wide.dtype == jnp.float32, name
        apart = np.abs(to_numpy(ours) - to_numpy(wide)) / ulp(largest, jnp.bfloat16)[:, None]
        # a sum in another order may tip one intermediate rounding
        assert apart.max() <= 1, name


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_forms_equal_the_reference(shape: tuple[int, ...]) -> None:
    given = draw(shape, 1, jnp.float32)
    theirs = reference(given)
    for name, form in FORMS.items():
        np.testing.assert_allclose(
            form(**given),
            theirs,
            rtol=0,
            atol=FLOAT32_TOLERANCE * float(theirs.abs().max()),
            err_msg=name,
        )


def test_bfloat16_error_is_no_larger_than_the_references() -> None:
    ours_squared = dict.fromkeys(FORMS, 0.0)
    theirs_squared = 0.0
    for seed in range(6):
        given = draw(SHAPES[2], 10 + seed, jnp.bfloat16)
        truth, _ = loop_float64(**given)
        theirs_squared += np.square(to_numpy(reference(given)) - truth).sum()
        for name, form in FORMS.items():
            ours_squared[name] += np.square(to_numpy(form(**given)) - truth).sum()
    for name, squared in ours_squared.items():
        assert squared <= 1.1**2 * theirs_squared, name


def test_a_token_without_expert_gets_exactly_zero_whatever_the_last_experts_weights() -> None:
    """The last expert's are the ones that an id clamped into range would read."""
    given = draw(SHAPES[2], 2, jnp.float32)
    experts = len(given["down"])
    ids = np.array(given["expert_ids"])
    ids[3:] = experts
    ids[:3] %= experts - 1
    broken = given | {
        "expert_ids": jnp.asarray(ids),
        "gate_up": given["gate_up"].at[-1].set(jnp.nan),
    }
    for name, form in FORMS.items():
        if name == "dense":  # multiplies every expert and masks with zero weights
            continue
        ours = np.asarray(form(**broken))
        assert (ours[3:] == 0).all(), name
        assert np.isfinite(ours).all(), name


def test_grouped_runs_one_block_for_each_started_block_of_an_experts_slots(monkeypatch) -> None:
    """So slots without an expert, and experts without slots, cost nothing."""
    runs = []

    def counted(*args: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: runs.append(1))
        return expert(*args)

    expert = experts_module._expert
    monkeypatch.setattr(experts_module, "_expert", counted)
    given = draw(SHAPES[2], 3, jnp.float32)
    form = jax.jit(functools.partial(grouped_experts, block=5))
    for name, ids in routings(given).items():
        runs.clear()
        jax.block_until_ready(form(**given | {"expert_ids": ids}))
        jax.effects_barrier()
        counts = np.bincount(np.ravel(ids), minlength=9)[:8]
        assert len(runs) == np.ceil(counts / 5).sum(), name


def test_no_token_is_dropped_when_every_slot_goes_to_one_expert() -> None:
    given = draw((8, 2, 16, 8, 200), 4, jnp.float32)
    same = jnp.full_like(given["expert_ids"], 5)
    routed = given | {"expert_ids": same}
    truth, _ = loop_float64(**routed)
    assert (np.abs(truth).max(axis=1) > 0).all()
    ours = FORMS["grouped 5"](**routed)
    np.testing.assert_allclose(ours, truth, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(truth).max())


@pytest.mark.parametrize(
    ("target", "tokens", "experts", "top_k", "block"),
    [
        # None: one token at a time. Decode, of one row and of several:
        ("cpu", 1, 64, 8, None),
        ("cpu", 1, 512, 10, None),
        ("cpu", 16, 64, 8, None),
        ("gpu", 8, 64, 8, None),
        # blocks of about two deviations above an expert's mean number of slots
        ("cpu", 17, 64, 8, 8),
        ("cpu", 128, 64, 8, 24),
        ("cpu", 512, 64, 8, 80),
        ("cpu", 512, 256, 8, 24),
        ("cpu", 2048, 4, 1, 560),
        ("gpu", 9, 64, 8, 64),
        ("gpu", 512, 64, 8, 64),
    ],
)
def test_the_form_follows_target_and_slots_an_expert(
    target: str, tokens: int, experts: int, top_k: int, block: int | None
) -> None:
    chosen = choose_experts(Kernels(target), jnp.dtype("bfloat16"), tokens, experts, top_k)
    assert isinstance(chosen, functools.partial)
    assert chosen.func is (gathered_experts if block is None else grouped_experts)
    assert chosen.keywords.get("block") == block

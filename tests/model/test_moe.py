"""Router, shared expert and their sum against the reference's block."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from flax import nnx
from support.rounding import assert_within_ulps, to_numpy, to_torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeMLP,
    Qwen3_5MoeSparseMoeBlock,
    Qwen3_5MoeTopKRouter,
)

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.moe import SparseMoe, gated_mlp, route
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.model.ranks import OneDevice

HIDDEN, INNER, SHARED, EXPERTS, TOP_K, TOKENS = 24, 10, 14, 8, 3, 18
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": SHARED,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": 1,
        "vocab_size": 16,
    }
)
REFERENCE_CONFIG = SimpleNamespace(
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    hidden_size=HIDDEN,
    moe_intermediate_size=INNER,
    shared_expert_intermediate_size=SHARED,
    hidden_act="silu",
    _experts_implementation="eager",
)

# Two products in a row with sums of up to 24 terms, relative to the largest value.
FLOAT32_TOLERANCE = 2e-6
# A softmax and a division in float32: exponentials of a few ulps in either library.
ROUTER_ULPS = 8
# The same differences can only tip the last rounding.
BFLOAT16_ROUTER_ULPS = 1

router = jax.jit(partial(route, renormalise=True), static_argnums=1)


def router_logits(seed: int, tokens: int, experts: int, dtype: jnp.dtype) -> jax.Array:
    """Random logits without ties, whose order libraries may settle differently."""
    rng = np.random.default_rng([seed, experts])
    steps = np.stack([rng.permutation(experts) for _ in range(tokens)])
    return jnp.asarray((steps - experts / 2) * 0.125, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (16, 4), (32, 8), (6, 6)])
def test_routing_equals_the_reference(experts: int, top_k: int, dtype: jnp.dtype) -> None:
    config = SimpleNamespace(num_experts_per_tok=top_k, num_experts=experts, hidden_size=experts)
    module = Qwen3_5MoeTopKRouter(config)
    # an identity for a weight: the logits are the input
    module.weight.data = torch.eye(experts, dtype=torch.float32 if dtype == jnp.float32 else torch.bfloat16)
    logits = router_logits(0, 40, experts, dtype)
    _, expected, chosen = module(to_torch(logits))
    ids, weights = router(logits, top_k)
    assert ids.dtype == jnp.int32
    assert weights.dtype == dtype
    np.testing.assert_array_equal(ids, chosen)
    ulps = ROUTER_ULPS if dtype == jnp.float32 else BFLOAT16_ROUTER_ULPS
    assert_within_ulps(weights, expected.detach(), ulps)


def test_without_renormalisation_weights_are_the_references_probabilities() -> None:
    config = SimpleNamespace(num_experts_per_tok=3, num_experts=16, hidden_size=16, norm_topk_prob=False)
    module = Qwen2MoeTopKRouter(config)
    module.weight.data = torch.eye(16)
    logits = router_logits(0, 40, 16, jnp.float32)
    _, expected, chosen = module(to_torch(logits))
    ids, weights = route(logits, 3, renormalise=False)
    np.testing.assert_array_equal(ids, chosen)
    assert_within_ulps(weights, expected.detach(), ROUTER_ULPS)
    assert (weights.sum(axis=-1) < 0.9999).all(), "the others have a share too"


def test_weights_of_the_chosen_experts_sum_to_one_however_small_their_share() -> None:
    logits = router_logits(1, 40, 256, jnp.float32) / 100  # nearly even: 8 of 256 hold about 1 / 32
    _, weights = router(logits, 8)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    assert (np.diff(weights, axis=-1) <= 0).all(), "the most likely expert comes first"


def test_routing_is_in_float32_also_for_bfloat16_logits() -> None:
    """Over 256 even experts a bfloat16 softmax sum would stop growing."""
    ids, weights = router(jnp.zeros((1, 256), jnp.bfloat16), 8)
    np.testing.assert_array_equal(to_numpy(weights), 0.125)
    assert len(set(np.ravel(ids).tolist())) == 8


@pytest.fixture(scope="module")
def block() -> Qwen3_5MoeSparseMoeBlock:
    torch.manual_seed(0)
    module = Qwen3_5MoeSparseMoeBlock(REFERENCE_CONFIG)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    return module


@pytest.fixture(scope="module")
def ours(block: Qwen3_5MoeSparseMoeBlock) -> SparseMoe:
    dtype = jnp.dtype(jnp.float32)
    module = SparseMoe(CONFIG, DtypePolicy(compute=dtype, matrix=dtype), Kernels("cpu"), OneDevice())
    for name, weight in block.named_parameters():
        target = module
        *path, leaf = name.split(".")
        for part in path:
            target = getattr(target, part)
        getattr(target, leaf)[...] = jnp.asarray(weight.detach().numpy())
    return module


@nnx.jit
def whole(module: SparseMoe, x: jax.Array, valid: jax.Array) -> jax.Array:
    return module(x, valid)


@nnx.jit
def branches(module: SparseMoe, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    return module.routed(x, valid), module.shared(x)


def tokens(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(TOKENS, HIDDEN)), jnp.float32)


def assert_close(got: jax.Array, expected: torch.Tensor | np.ndarray) -> None:
    wanted = to_numpy(expected)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=FLOAT32_TOLERANCE * np.abs(wanted).max())


def test_the_block_equals_the_reference(block: Qwen3_5MoeSparseMoeBlock, ours: SparseMoe) -> None:
    for seed in range(3):
        x = tokens(seed).reshape(2, -1, HIDDEN)
        assert_close(whole(ours, x, jnp.ones(x.shape[:2], bool)), block(to_torch(x)))


def test_a_gated_mlp_equals_the_reference() -> None:
    torch.manual_seed(1)
    module = Qwen3_5MoeMLP(REFERENCE_CONFIG, SHARED)
    x = tokens(1)
    weights = [jnp.asarray(w.detach().numpy()) for w in module.parameters()]  # gate, up, down
    assert_close(jax.jit(gated_mlp)(x, *weights), module(to_torch(x)))


def test_the_shared_expert_is_gated_by_its_sigmoid(block: Qwen3_5MoeSparseMoeBlock, ours: SparseMoe) -> None:
    x = tokens(2)
    _, shared = branches(ours, x, jnp.ones(TOKENS, bool))
    t = to_torch(x)
    assert_close(shared, torch.sigmoid(block.shared_expert_gate(t)) * block.shared_expert(t))


def test_the_shared_expert_counts_exactly_once(block: Qwen3_5MoeSparseMoeBlock, ours: SparseMoe) -> None:
    """Counted twice, the block is far from the reference: no tolerance here could hide it."""
    x = tokens(3)
    valid = jnp.ones(TOKENS, bool)
    routed, shared = (np.asarray(part) for part in branches(ours, x, valid))
    theirs = to_numpy(block(to_torch(x[None]))[0])
    once, twice = (np.abs(routed + n * shared - theirs).max() / np.abs(theirs).max() for n in (1, 2))
    assert once <= FLOAT32_TOLERANCE
    assert twice > 0.1


def test_pads_reach_no_expert_and_disturb_no_token(ours: SparseMoe) -> None:
    x = tokens(4)
    valid = jnp.arange(TOKENS) < 11
    clean, _ = branches(ours, x, valid)
    dirty, _ = branches(ours, x.at[11:].set(jnp.nan), valid)
    np.testing.assert_array_equal(np.asarray(clean)[11:], 0)
    np.testing.assert_array_equal(np.asarray(dirty)[:11], np.asarray(clean)[:11])
    every, _ = branches(ours, x, jnp.ones(TOKENS, bool))
    assert_close(clean[:11], np.asarray(every)[:11])

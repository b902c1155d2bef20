"""A whole model on kernels: interpreted, against the float64 truth; on meshes, lowered for ROCm."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.meshes import assert_as_one_device, mesh_case, run

from qwen_moe_jax import make_mesh
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.engine.logits import SequenceLogits
from qwen_moe_jax.generation.loading import load_forward
from qwen_moe_jax.kernels.table import Kernels, make_kernels
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.caches import empty_cache
from qwen_moe_jax.parallel.forward import MeshForward
from qwen_moe_jax.parallel.layout import Layout

SEED = 22  # a layer of either kind; fusable
KERNELS = (
    "gathered_gate_up",
    "gathered_down",
    "grouped_gate_up",
    "grouped_down",
    "combine",
    "flash_attention",
    "delta_step",
    "delta_chunks",
)
EVERYTHING = {"attention": "flash", "delta_step": "pallas_step", "delta_chunks": "pallas_chunks"}


def on(kernels: Kernels, dtype: str) -> Any:
    """The case's model compiled for a target's table."""
    folder = mesh_case(SEED).folder
    loaded = load_forward(folder, ModelConfig.from_file(folder), jnp.dtype(dtype), kernels, False)
    return SimpleNamespace(sequence_logits=SequenceLogits(loaded.forward))


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["pallas_grouped", "pallas_gathered"])
def test_in_float32_a_model_on_kernels_is_as_near_the_truth_as_plain_xla(experts):
    case = mesh_case(SEED)
    kernels = make_kernels("gfx950", EVERYTHING | {"experts": experts}, interpret=True)
    found = run(on(kernels, "float32"), case.rows)
    assert_as_one_device(case, found)


@pytest.mark.parametrize(
    "layout",
    [
        {"shared_expert": "prescaled"},
        {"shared_expert": "fused"},
        {"shared_expert": "sharded", "expert_dispatch": "all_to_all"},
        {"shared_expert": "outside", "exact": True},
        {"shared_expert": "sharded", "attention": "data"},
    ],
    ids=["prescaled", "fused", "all_to_all", "exact", "data"],
)
@pytest.mark.parametrize("tokens", [1, 16])
def test_on_a_mesh_kernels_lower_for_rocm_with_their_sums_typed(layout, tokens):
    """Interpreted kernels cannot run under `shard_map`'s checks of types, which tracing makes."""
    case = mesh_case(SEED)
    config = ModelConfig.from_file(case.folder)
    laid = Layout(config, make_mesh(1, 2, 2), **layout)
    policy = DtypePolicy(compute=jnp.dtype(jnp.bfloat16), matrix=jnp.dtype(jnp.bfloat16))
    structs = {name: target.struct for name, target in laid.targets(policy).items()}
    forward = MeshForward(laid, policy, Kernels("gfx950"), structs)
    cache = jax.eval_shape(lambda: empty_cache(laid, 4, 64, policy.matrix, policy.compute))
    given = jnp.zeros((4, tokens), jnp.int32), jnp.ones((4, tokens), bool), cache
    lowered = jax.jit(forward.hidden).trace(structs, *given).lower(lowering_platforms=("rocm",))
    text = lowered.as_text()
    calls = {name: len(re.findall(rf'name = "{name}"', text)) for name in KERNELS}
    layers = config.num_hidden_layers
    attention = config.layer_types.count("full_attention")
    form = "gathered" if tokens * 4 * config.num_experts_per_tok <= config.num_experts / 4 else "grouped"
    assert calls[f"{form}_gate_up"] == calls[f"{form}_down"] == layers
    assert calls["flash_attention"] == attention
    assert calls["delta_step"] == (layers - attention if tokens == 1 else 0)
    assert calls["delta_chunks"] == (layers - attention if tokens > 1 else 0)


# Two ways to round a bfloat16 model differ in their distance to the truth by less than that; with a wrong
# operation it is several times as far.
BFLOAT16_RATIO = 1.3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_in_bfloat16_the_tables_own_kernels_are_as_near_the_truth_as_plain_xla(target):
    case = mesh_case(SEED)
    plain = run(on(make_kernels(target, "xla"), "bfloat16"), case.rows)
    found = run(on(Kernels(target, interpret=True), "bfloat16"), case.rows)
    first = [slice(0, len(row)) for row in case.rows]  # prompts: what follows depends on what was chosen

    def rms(got) -> float:
        errors = [(a[s] - t[s]).ravel() for a, t, s in zip(got.logits, case.truth, first, strict=True)]
        return float(np.sqrt((np.concatenate(errors) ** 2).mean()))

    assert rms(found) <= BFLOAT16_RATIO * rms(plain)

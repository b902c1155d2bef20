"""Sequence parallelism: a residual stream that is scattered among ranks says what one device says."""

from collections import Counter

import jax
import numpy as np
import pytest
from support import parity
from support.collectives import collectives, programs
from support.configs import random_config
from support.layouts import Layout, drawn, layouts, name
from support.meshes import assert_as_one_device, assert_on_average_as_one_device, mesh_case, on_mesh, run
from support.slow import some

from qwen_moe_jax.parallel import ranks
from qwen_moe_jax.parallel.ranks import is_scattered

SEED = 22  # a layer of either kind; fusable
LAYERS = random_config(SEED)["num_hidden_layers"]
PREFILL = 16  # tokens of the cases' chunk


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are scattered whatever their length, where they divide: prefill, and not decoding."""
    monkeypatch.setattr(ranks, "_FEWEST_SCATTERED", 1)


def scatters(layout: Layout) -> bool:
    alone = layout["shared_expert"] == "outside" and layout["tensor"] > 1
    group = layout["expert"] * layout["tensor"]
    inside = layout["expert_dispatch"] == "psum" and layout["attention"] == "tensor"
    return inside and not alone and group > 1 and PREFILL % group == 0


EVERY = [layout for layout in layouts((2, 4, 8)) if scatters(layout)]


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("layout", some(EVERY, lambda i: i in (8, 21)), ids=name)
def test_every_layout_that_scatters_equals_one_device(layout: Layout) -> None:
    case, model = mesh_case(SEED), on_mesh(SEED, **layout)
    assert model.layout is not None
    assert is_scattered(model.layout.scatter_ranks, 1, PREFILL)
    found = run(model, case.rows)
    assert_as_one_device(case, found)


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize(
    "model_type", some(["qwen3_5_text", "qwen3_next", "qwen3_moe", "qwen2_moe"], lambda i: i == 0)
)
def test_every_family_scattered_equals_one_device(model_type: str) -> None:
    check_drawn(6, {"data": 1, "expert": 2, "tensor": 2}, model_type=model_type)


@pytest.mark.slow
@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("seed", range(0, 36, 3))
def test_random_configurations_scattered_equal_one_device(seed: int) -> None:
    check_drawn(seed, drawn(seed) | {"expert_dispatch": "psum", "attention": "tensor"})


def check_drawn(seed: int, layout: Layout, **family: str) -> None:
    case = mesh_case(seed, **family)
    found = run(on_mesh(seed, **layout, **family), case.rows)
    assert_on_average_as_one_device(case, found)


@pytest.mark.usefixtures("any_length")
def test_a_scattered_layer_gathers_and_scatters_twice_and_reduces_nothing() -> None:
    model = on_mesh(SEED, 1, 2, 2, shared_expert="sharded")
    found = {of: collectives(compiled)[0] for of, compiled in programs(model, batch=4).items()}
    # the embedding's sum is scattered, hidden states are gathered
    both = 2 * LAYERS + 1
    assert found["prefill"] == Counter({"all-gather": both, "reduce-scatter": both})
    assert found["decode"] == Counter({"all-reduce": both})


def test_short_streams_and_those_that_do_not_divide_are_whole() -> None:
    assert is_scattered(8, 1, 1024)
    assert is_scattered(8, 8, 128)
    assert not is_scattered(8, 1, 1016)
    assert not is_scattered(8, 1, 1028)
    assert not is_scattered(1, 1, 4096)


@pytest.mark.parametrize(
    "layout",
    [
        {"exact": True},
        {"expert_dispatch": "all_to_all"},
        {"attention": "data"},
        {"shared_expert": "outside"},
    ],
)
def test_layouts_whose_tokens_or_sums_are_divided_otherwise_are_never_scattered(layout: Layout) -> None:
    model = on_mesh(SEED, 1, 2, 2, **layout)
    assert model.layout is not None
    assert model.layout.scatter_ranks == 1


def test_with_the_limit_as_it_is_two_rows_of_512_tokens_are_scattered() -> None:
    """Pads included; their logits mean nothing."""
    mesh, one = on_mesh(SEED, 1, 2, 2, shared_expert="sharded"), on_mesh(SEED, 1, 1, 1)
    tokens = np.random.default_rng(0).integers(3, one.config.vocab_size, (2, 512)).astype(np.int32)
    valid = np.arange(512) < np.array([[512], [300]])
    found, wanted = (
        np.asarray(model.sequence_logits(tokens, valid, model.sequence_logits.new_cache(2, 512))[0])[valid]
        for model in (mesh, one)
    )
    assert np.abs(found - wanted).max() <= parity.LARGEST_DIFFERENCE * np.abs(wanted).max()
    forward = mesh.sequence_logits.forward
    lowered = jax.jit(forward.hidden).lower(forward.parameters, tokens, valid, forward.new_cache(2, 512))
    assert lowered.as_text().count("stablehlo.reduce_scatter") == 2 * LAYERS + 1

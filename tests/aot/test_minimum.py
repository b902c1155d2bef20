"""The least work of a step, against XLA's own counts, simulations and sums over devices."""

import dataclasses
import functools
import math
import re
from collections import Counter
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import DIVISIBLE_BY_8, random_config
from support.slow import some

from qwen_moe_jax.aot.minimum import (
    Collective,
    Work,
    collective_bytes,
    expected_experts,
    least_work,
    roofline,
)
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.configs import find_config, released
from qwen_moe_jax.devices import find_device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.caches import empty_cache
from qwen_moe_jax.parallel.forward import MeshForward
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh, make_mesh

FLOAT32, BFLOAT16 = (DtypePolicy(compute=d, matrix=d) for d in map(jnp.dtype, (jnp.float32, jnp.bfloat16)))

# XLA counts an operation for each element of norms, softmax and gates too, which are not in the least work:
# 1.9 to 2.6 % of all at these sizes.
ELEMENTWISE = 0.03
# On a mesh, with smaller sizes, the sums over ranks are counted too, and of the loop over tokens' experts one
# turn, and what keeps unwritten keys out: 2.0 to 7.3 %.
ELEMENTWISE_ON_A_MESH = 0.08
# The plain form puts a row's state back into its slot by a scatter, in which XLA counts four to five
# operations an element (`write_slots`); the delta rule has seven.
SCATTER = 5 / 7

# Wide enough for products to be nearly all there is; every kind of product is a good part of it.
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "vocab_size": 1024,
    "head_dim": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "num_experts": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "rope_parameters": {"mrope_section": [0, 0, 0]},
}
# Divides well, and its routed experts are next to nothing, since XLA counts loops over them in its own way.
ON_A_MESH: dict[str, Any] = WIDE | {
    "hidden_size": 256,
    "vocab_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
}
MESH_SEED = 22  # a layer of either kind

LAYOUTS: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
    ((1, 2, 2), {"shared_expert": "prescaled"}),
    ((2, 2, 2), {"shared_expert": "outside"}),
    ((1, 3, 1), {"shared_expert": "sharded", "attention": "data"}),
    ((1, 2, 2), {"shared_expert": "outside", "attention": "data"}),
    ((1, 4, 2), {"shared_expert": "prescaled", "expert_dispatch": "all_to_all"}),
    ((1, 2, 2), {"shared_expert": "outside", "expert_dispatch": "all_to_all", "attention": "data"}),
    ((1, 4, 2), {"shared_expert": "outside", "exact": True}),
]
BATCH, CAPACITY = 12, 128


def abstract(config: ModelConfig, sizes: tuple[int, int, int] = (1, 1, 1), **choices: Any) -> Layout:
    return Layout(config, abstract_mesh(*sizes), **choices)


def divisible(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(random_config(MESH_SEED) | DIVISIBLE_BY_8 | {"num_experts": 16} | changes)


def compiled_step(layout: Layout, batch: int, capacity: int) -> Any:
    """The program of the layout that gives every row a token and its logits; nothing is allocated."""
    parameters: Any = {name: target.struct for name, target in layout.targets(FLOAT32).items()}
    forward = MeshForward(layout, FLOAT32, Kernels("cpu"), parameters)
    dtype = FLOAT32.compute
    cache = jax.eval_shape(lambda: empty_cache(layout, batch, capacity, dtype, dtype))

    def step(parameters, tokens, valid, cache):
        hidden, cache = forward.hidden(parameters, tokens, valid, cache)
        return forward.logits(parameters, hidden[:, -1]), cache

    tokens, valid = (jax.ShapeDtypeStruct((batch, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
    return jax.jit(step).lower(parameters, tokens, valid, cache).compile()


@functools.cache
def on_a_mesh(index: int) -> tuple[Layout, Any]:
    sizes, choices = LAYOUTS[index]
    config = ModelConfig.from_dict(random_config(MESH_SEED) | ON_A_MESH)
    mesh = make_mesh(*sizes, devices=jax.devices()[: prod(sizes)])
    layout = Layout(config, mesh, **choices)
    return layout, compiled_step(layout, BATCH, CAPACITY)


SEEDS = (0, 2, 3)


def wide_work(seed: int) -> tuple[Layout, Work]:
    """Of one token behind 255: one block of keys, all visible, since XLA counts the body of a loop once."""
    config = ModelConfig.from_dict(random_config(seed) | WIDE)
    layout = Layout(config, make_mesh(devices=jax.devices()[:1]))
    return layout, least_work(layout, FLOAT32, batch=1, tokens=1, context=255)


@pytest.mark.parametrize("seed", SEEDS)
def test_flops_of_a_token_are_those_that_xla_counts(seed: int) -> None:
    layout, work = wide_work(seed)
    counted = compiled_step(layout, 1, 256).cost_analysis()["flops"]
    scatter = SCATTER * work.flops["delta rule"]
    assert work.total_flops <= counted <= (1 + ELEMENTWISE) * work.total_flops + scatter


def test_no_part_is_so_small_that_a_wrong_one_would_hide_in_the_tolerance() -> None:
    works = [work for _, work in map(wide_work, SEEDS)]
    for part in {part for work in works for part in work.flops}:
        assert max(work.flops.get(part, 0) / work.total_flops for work in works) > ELEMENTWISE, part


@pytest.mark.parametrize("index", some(range(len(LAYOUTS)), lambda i: i % 3 == 0))
def test_flops_of_a_device_of_a_mesh_are_those_that_xla_counts(index: int) -> None:
    layout, compiled = on_a_mesh(index)
    work = least_work(layout, FLOAT32, batch=BATCH, tokens=1, context=CAPACITY - 1)
    counted = compiled.cost_analysis()["flops"]
    routed = work.flops["routed experts"]
    most = (1 + ELEMENTWISE_ON_A_MESH) * work.total_flops + SCATTER * work.flops["delta rule"]
    assert work.total_flops - routed <= counted <= most
    assert routed < ELEMENTWISE_ON_A_MESH * work.total_flops


@pytest.mark.parametrize("index", some(range(len(LAYOUTS)), lambda i: i % 3 == 0))
def test_collectives_move_the_bytes_that_the_compiled_program_moves(index: int) -> None:
    layout, compiled = on_a_mesh(index)
    expected: Counter[str] = Counter()
    for each in collective_bytes(layout, FLOAT32, batch=BATCH, tokens=1):
        # HLO names the part of a scattered sum that a device is left with
        share = each.ranks if each.operation == "reduce-scatter" else 1
        expected[each.operation] += int(each.count * each.bytes / share)
    assert bytes_of_collectives(compiled.as_text()) == expected


def bytes_of_collectives(hlo: str) -> Counter[str]:
    """Operation -> bytes of all its results."""
    found: Counter[str] = Counter()
    operations = "all-reduce|all-gather|reduce-scatter|all-to-all"
    for shapes, operation in re.findall(rf" = (\(?[a-z0-9]+\[.*?) ({operations})(?:-start)?\(", hlo):
        for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            assert dtype in ("f32", "s32")
            found[operation] += 4 * prod(int(size) for size in shape.split(",") if size)
    return found


DIVIDED = ("lm_head", "Gated DeltaNet", "attention", "attention over keys", "delta rule", "routed experts")


@pytest.mark.parametrize("dispatch", ["psum", "all_to_all"])
@pytest.mark.parametrize("attention", ["tensor", "data"])
@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_flops_of_all_devices_are_those_of_one(
    sizes: tuple[int, int, int], attention: str, dispatch: str
) -> None:
    config, step = divisible(), {"batch": 16, "tokens": 3, "context": 20}
    alone = least_work(abstract(config), FLOAT32, **step).flops
    layout = abstract(config, sizes, attention=attention, expert_dispatch=dispatch)
    shared = least_work(layout, FLOAT32, **step).flops
    for part in DIVIDED:
        assert prod(sizes) * shared[part] == pytest.approx(alone[part], rel=1e-12), part
    # what all ranks with the same tokens route, they route alike
    _, expert, tensor = sizes
    times = tensor if dispatch == "all_to_all" else expert * tensor
    assert prod(sizes) * shared["router"] == times * alone["router"]


@pytest.mark.parametrize("attention", ["tensor", "data"])
def test_bytes_that_are_divided_are_read_once_in_the_whole_mesh(attention: str) -> None:
    config, step = divisible(), {"batch": 16, "tokens": 3, "context": 20}
    alone = least_work(abstract(config), FLOAT32, **step).bytes
    shared = least_work(abstract(config, (1, 4, 2), attention=attention), FLOAT32, **step).bytes
    for part in ("routed experts", "keys and values", "recurrent state"):
        assert 8 * shared[part] == pytest.approx(alone[part], rel=1e-12), part
    # attention data parallelism reads them on every rank of the expert axis
    assert (2 if attention == "data" else 8) * shared["lm_head"] == alone["lm_head"]


@pytest.mark.parametrize(("mode", "copies"), [("prescaled", 4), ("outside", 4), ("sharded", 1), ("fused", 1)])
def test_the_shared_expert_is_computed_as_often_as_its_mode_says(mode: str, copies: int) -> None:
    config, step = divisible(), {"batch": 16, "tokens": 1, "context": 0}
    # its gate is computed for every token on every rank
    gate = 2 * 16 * config.hidden_size * config.num_hidden_layers
    alone = least_work(abstract(config), FLOAT32, **step).flops["shared expert"] - gate
    layout = abstract(config, (1, 4, 2), shared_expert=mode)
    shared = least_work(layout, FLOAT32, **step).flops["shared expert"] - gate
    assert 8 * shared == copies * alone


def test_a_fused_shared_expert_is_read_whole_by_every_rank_and_no_routed_expert_more() -> None:
    config, step = divisible(), {"batch": 16, "tokens": 1, "context": 0}
    works = {
        mode: least_work(abstract(config, (1, 4, 1), shared_expert=mode), FLOAT32, **step)
        for mode in ("prescaled", "fused", "sharded")
    }
    read = {mode: work.bytes["shared expert"] for mode, work in works.items()}
    assert read["fused"] == read["prescaled"] > read["sharded"]
    assert len({work.bytes["routed experts"] for work in works.values()}) == 1


def test_rows_of_other_data_ranks_cost_a_device_nothing() -> None:
    config, step = divisible(), {"tokens": 1, "context": 9}
    for choices in ({}, {"attention": "data"}, {"expert_dispatch": "all_to_all"}):
        one = least_work(abstract(config, (1, 2, 1), **choices), FLOAT32, batch=4, **step)
        three = least_work(abstract(config, (3, 2, 1), **choices), FLOAT32, batch=12, **step)
        assert (one.bytes, one.flops) == (three.bytes, three.flops)
        assert three.tokens == 3 * one.tokens


def test_the_device_with_the_most_rows_counts() -> None:
    config, step = divisible(), {"tokens": 1, "context": 9}
    of_five = least_work(abstract(config, (2, 1, 1)), FLOAT32, batch=5, **step)
    assert of_five.flops == least_work(abstract(config), FLOAT32, batch=3, **step).flops


def test_key_heads_that_several_ranks_need_are_read_by_each() -> None:
    """The 397B has 2 key/value heads: eight ranks hold one each, attention data parallelism other rows."""
    config, step = find_config("397b"), {"batch": 64, "tokens": 1, "context": 1000}
    alone = least_work(abstract(config), BFLOAT16, **step).bytes["keys and values"]
    assert alone == 64 * 1001 * 30 * 1024
    for attention, part in (("tensor", 2), ("data", 8)):
        layout = abstract(config, (1, 8, 1), attention=attention)
        assert part * least_work(layout, BFLOAT16, **step).bytes["keys and values"] == alone


def test_a_prompt_at_once_sees_as_many_keys_as_token_by_token() -> None:
    layout = abstract(divisible())
    at_once = least_work(layout, FLOAT32, batch=3, tokens=7, context=11)
    steps = [least_work(layout, FLOAT32, batch=3, tokens=1, context=11 + i) for i in range(7)]
    for part in ("attention over keys", "delta rule", "Gated DeltaNet", "attention", "router"):
        assert at_once.flops[part] == sum(step.flops[part] for step in steps)
    # but reads weights once, and gives the logits of one position
    assert at_once.bytes["attention"] == steps[0].bytes["attention"]
    assert at_once.flops["lm_head"] == steps[0].flops["lm_head"]


# Four standard errors of the mean of the draws: one run in 16,000 would lie outside by chance.
STANDARD_ERRORS = 4
DRAWS = 4000


def routings(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Even choices, int [draws, tokens, top_k]."""
    return np.argsort(rng.random((DRAWS, tokens, experts)), axis=-1)[..., :top_k]


def assert_mean(samples: np.ndarray, expected: float) -> None:
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - expected) <= STANDARD_ERRORS * error


@pytest.mark.parametrize(("experts", "top_k", "tokens", "held"), [(16, 3, 5, 4), (8, 2, 3, 8), (32, 8, 2, 4)])
def test_as_many_experts_are_read_as_even_routing_chooses(
    experts: int, top_k: int, tokens: int, held: int
) -> None:
    chosen = routings(np.random.default_rng(experts), tokens, experts, top_k)
    distinct = np.array([len({e for e in draw.ravel() if e < held}) for draw in chosen])
    assert_mean(distinct, expected_experts(held, experts, top_k, tokens))
    config = divisible(num_experts=experts, num_experts_per_tok=top_k)
    layout = abstract(config, (1, experts // held, 1))
    read = least_work(layout, FLOAT32, batch=tokens, tokens=1, context=0).bytes["routed experts"]
    an_expert = 3 * config.moe_intermediate_size * config.hidden_size * 4 * config.num_hidden_layers
    assert_mean(distinct, read / an_expert)


def test_one_token_reads_its_own_experts_and_many_read_all() -> None:
    assert expected_experts(512, 512, 10, 1) == pytest.approx(10, rel=1e-12)
    assert expected_experts(64, 512, 10, 10_000) == pytest.approx(64, rel=1e-12)


def test_ragged_exchange_sends_the_rows_that_even_routing_sends() -> None:
    config = divisible(num_experts=16, num_experts_per_tok=3)
    layout = abstract(config, (1, 4, 1), expert_dispatch="all_to_all", attention="data", ragged=True)
    chosen = routings(np.random.default_rng(7), 5, 16, 3)
    rows = np.array([sum(len({e // 4 for e in token}) for token in draw) for draw in chosen])
    sent = {c.what: c.bytes for c in collective_bytes(layout, FLOAT32, batch=20, tokens=1)}
    assert_mean(rows, sent["tokens"] / (4 * config.hidden_size))
    assert_mean(rows, sent["outputs"] / (4 * config.hidden_size))


# Published figures are whole billions, and do not say whether embedding and lm_head (0.5 to 1 each) count.
PUBLISHED_ACTIVE = 0.12


@pytest.mark.parametrize(("name", "billions"), [("35b", 3), ("122b", 10), ("397b", 17)])
def test_a_token_reads_the_active_parameters_that_the_models_are_named_for(name: str, billions: int) -> None:
    work = least_work(abstract(find_config(name)), BFLOAT16, batch=1, tokens=1, context=0)
    caches = work.bytes["keys and values"] + work.bytes["recurrent state"]
    active = (work.total_bytes - caches) / 2
    assert active == pytest.approx(billions * 1e9, rel=PUBLISHED_ACTIVE)
    # two operations for each of them, and the delta rule
    assert work.total_flops / 2 == pytest.approx(active, rel=0.03)


SCALED = ("Gated DeltaNet", "attention", "routed experts", "shared expert", "dense MLP")


@pytest.mark.parametrize("name", released())
def test_float8_halves_what_is_quantised_and_nothing_else(name: str) -> None:
    step = {"batch": 4, "tokens": 1, "context": 100}
    wide, narrow = (
        least_work(
            abstract(find_config(name, dtype="float8" if float8 else None), (1, 2, 2)), BFLOAT16, **step
        )
        for float8 in (False, True)
    )
    assert narrow.flops == wide.flops
    scaled = {part for part in SCALED if part in wide.bytes}
    assert {part for part in wide.bytes if narrow.bytes[part] != wide.bytes[part]} == scaled
    if "routed experts" in scaled:
        # one byte instead of two, and four for each block of 128 x 128, or what two ranks cut it into
        block = 128 * math.gcd(128, find_config(name).moe_intermediate_size // 2)
        whole = narrow.bytes["routed experts"] / wide.bytes["routed experts"]
        assert whole == pytest.approx((1 + 4 / block) / 2, rel=1e-12)
    for part in scaled:
        assert 0.5 < narrow.bytes[part] / wide.bytes[part] < 0.52


def test_a_tied_embedding_is_read_as_lm_head() -> None:
    step = {"batch": 1, "tokens": 1, "context": 0}
    tied, untied = (
        least_work(abstract(divisible(tie_word_embeddings=tied)), FLOAT32, **step) for tied in (True, False)
    )
    assert (tied.bytes, tied.flops) == (untied.bytes, untied.flops)


def test_one_device_exchanges_nothing() -> None:
    for dispatch in ("psum", "all_to_all"):
        layout = abstract(divisible(), (4, 1, 1), expert_dispatch=dispatch, ragged=True)
        assert collective_bytes(layout, FLOAT32, batch=8, tokens=2) == ()


def test_a_ring_sends_all_but_its_own_part_and_of_a_sum_twice() -> None:
    sent = {kind: Collective(kind, "", 3, 4, 800).sent for kind in ("all-reduce", "all-gather", "all-to-all")}
    assert sent == {"all-reduce": 3 * 2 * 600, "all-gather": 3 * 600, "all-to-all": 3 * 600}


def test_a_group_on_a_host_of_amd_devices_has_the_links_between_them() -> None:
    """Two devices have one of seven links; behind NVIDIA's switch they have all."""
    for name, share in (("mi300x", 7), ("mi355x", 7), ("h100", 1)):
        device = find_device(name)
        two, eight = (Collective("all-gather", "", 1, ranks, 1000) for ranks in (2, 8))
        assert two.seconds(device) == pytest.approx(share * 500 / device.link_bandwidth)
        assert eight.seconds(device) == pytest.approx(875 / device.link_bandwidth)


def test_the_slower_of_memory_and_products_bounds_a_step_and_exchanges_add() -> None:
    device = dataclasses.replace(
        find_device("h100"), bandwidth=100.0, peak_flops={"bfloat16": 1000.0}, link_bandwidth=10.0
    )
    work = Work(bytes={"a": 150.0, "b": 50.0}, flops={"a": 1000.0}, tokens=6)
    found = roofline(work, device)
    assert (found.memory_seconds, found.flop_seconds, found.seconds) == (2, 1, 2)
    assert (found.bound, found.tokens_per_second) == ("memory", 3)
    sums = [Collective("all-reduce", "heads", 2, 2, 20)]
    found = roofline(work, device, collectives=sums)
    assert (found.exchange_seconds, found.bound, found.tokens_per_second) == (4, "links", 1)
    busy = dataclasses.replace(work, flops={"a": 3000.0})
    assert (roofline(busy, device).bound, roofline(busy, device).seconds) == ("FLOPs", 3)
    with pytest.raises(
        InputError, match=r"dtype is 'float8'; expected what .*H100 has a peak for: bfloat16\."
    ):
        roofline(work, device, dtype="float8")


def test_the_table_shows_every_part_and_their_sum() -> None:
    work = least_work(abstract(find_config("35b")), BFLOAT16, batch=1, tokens=1, context=1023)
    lines = [line.split() for line in str(work).splitlines()]
    shown = {" ".join(line[:-3]): line[-3:] for line in lines[1:]}
    assert shown.keys() == {*work.bytes, *work.flops, "total"}
    assert shown["keys and values"] == ["20", "MiB", "0"]
    assert float(shown["total"][2]) == pytest.approx(work.total_flops / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "given"), [("batch", 0), ("tokens", 0), ("context", -1), ("batch", 1.5), ("tokens", True)]
)
def test_sizes_that_are_none_are_refused(size: str, given: Any) -> None:
    step = {"batch": 1, "tokens": 1, "context": 0} | {size: given}
    with pytest.raises(InputError, match=f"{size} is {given}; expected a whole number"):
        least_work(abstract(divisible()), FLOAT32, **step)

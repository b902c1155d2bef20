"""The time model: its formulas, its limits, and what it prints. Nothing here is a measurement."""

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import pytest

from qwen_moe_jax.aot.assumptions import OPERATIONS, Assumptions, assumptions_for
from qwen_moe_jax.aot.commands import assumptions_asked
from qwen_moe_jax.aot.curve import rate_curve
from qwen_moe_jax.aot.drafting import expected_tokens, verify_collectives, verify_work
from qwen_moe_jax.aot.hlo import Module
from qwen_moe_jax.aot.launches import kernel_launches
from qwen_moe_jax.aot.minimum import Collective, Work, collective_bytes, least_work, roofline
from qwen_moe_jax.aot.plan import plan
from qwen_moe_jax.aot.times import DECODING, READING, Program, TimeModel, step_time
from qwen_moe_jax.cli import main
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.configs import find_config
from qwen_moe_jax.devices import DEVICES, find_device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

FULL = find_config("397b")
SMALL = FULL.with_layers(FULL.layers[:4])
POLICY = DtypePolicy(compute=jnp.dtype(jnp.bfloat16), matrix=jnp.dtype(jnp.bfloat16))
MI300X, MI355X = find_device("mi300x"), find_device("mi355x")
NOTHING = Program()

# RCCL's all-reduce among eight MI300X, bytes -> us, one after the other (rocm.blogs.amd.com, 2025-03-02). The
# fit of one latency and one bandwidth is within these factors of it.
RCCL = {
    1 << 10: 13.11,
    1 << 15: 13.31,
    1 << 18: 16.87,
    1 << 20: 27.42,
    1 << 22: 51.72,
    1 << 24: 148.8,
    1 << 26: 429.1,
    1 << 28: 1537.1,
    1 << 30: 5970.6,
}
FIT = (0.69, 1.27)


def perfect() -> Assumptions:
    return Assumptions(
        memory=1,
        flops={"bfloat16": 1, "float8": 1},
        launch=0,
        gap=0,
        latency=dict.fromkeys(OPERATIONS, 0),
        links={8: 1},
        network_latency=0,
        network_bandwidth=math.inf,
    )


def model(
    *, config: ModelConfig = SMALL, sizes: tuple[int, int, int] = (1, 2, 2), **changed: Any
) -> TimeModel:
    layout = Layout(config, abstract_mesh(*sizes), "tensor", "sharded", "psum", ragged=True)
    given = {"assumptions": assumptions_for(MI355X), "decoding": DECODING, "reading": READING} | changed
    return TimeModel(layout, POLICY, MI355X, **given)


def with_room(*sizes: tuple[int, int, int]) -> list[tuple[Layout, int]]:
    return [(model(sizes=each).layout, 1000) for each in sizes]


def reduced(size: float, ranks: int = 8, count: int = 1, operation: str = "all-reduce") -> Collective:
    return Collective(operation, "something", count, ranks, size)


def test_a_collective_is_its_latency_and_the_bytes_it_sends() -> None:
    given = dataclasses.replace(assumptions_for(MI300X), links={2: 0.5, 8: 0.25})
    # eight: 2 x 7/8 of 8e6 bytes over a quarter of 448 GB/s; two: 2 x 1/2 of them over half of one link, 64
    # GB/s
    eight = 3 * (13.1e-6 + 14e6 / (0.25 * 448e9))
    two = 13.1e-6 + 8e6 / (0.5 * 64e9)
    assert given.collective_seconds(reduced(8e6, count=3), MI300X) == pytest.approx(eight)
    assert given.collective_seconds(reduced(8e6, ranks=2), MI300X) == pytest.approx(two)
    # once for the others, of which a device sends all but its own eighth
    for operation in ("all-gather", "reduce-scatter", "all-to-all"):
        found = given.collective_seconds(reduced(8e6, operation=operation), MI300X)
        assert found == pytest.approx(13.1e-6 + 7e6 / (0.25 * 448e9))
    assert given.collective_seconds(reduced(8e6, ranks=1), MI300X) == 0


def test_a_group_of_another_size_has_the_share_of_the_next_larger_one() -> None:
    given = dataclasses.replace(perfect(), links={2: 0.5, 8: 0.25})
    three = given.collective_seconds(reduced(1e6, ranks=3), MI300X)
    assert three == pytest.approx(4 / 3 * 1e6 / (0.25 * 2 * 64e9))


def test_a_group_beyond_a_host_goes_over_the_network() -> None:
    given = dataclasses.replace(perfect(), network_latency=50e-6, network_bandwidth=100e9)
    found = given.collective_seconds(reduced(16e6, ranks=16, count=2), MI300X)
    assert found == pytest.approx(2 * (50e-6 + 30e6 / 100e9))


def test_the_all_reduce_is_near_the_published_one() -> None:
    given = assumptions_for(MI300X)
    for size, microseconds in RCCL.items():
        found = 1e6 * given.collective_seconds(reduced(size), MI300X) / microseconds
        assert FIT[0] <= found <= FIT[1], size


def test_latency_is_all_of_a_small_message_and_nothing_of_a_large_one() -> None:
    given = assumptions_for(MI355X)
    without = given.changed({"latency": 0})
    small, large = reduced(1024), reduced(1 << 32)
    assert given.collective_seconds(small, MI355X) > 100 * without.collective_seconds(small, MI355X)
    assert given.collective_seconds(large, MI355X) < 1.001 * without.collective_seconds(large, MI355X)


@pytest.mark.parametrize("name", ["mi300x", "mi355x"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 1), (1, 2, 2), (2, 2, 2)])
def test_with_nothing_in_the_way_it_is_the_roofline(name: str, sizes: tuple[int, int, int]) -> None:
    device = DEVICES[name]
    for choices in (("tensor", "psum"), ("data", "all_to_all")):
        layout = Layout(SMALL, abstract_mesh(*sizes), choices[0], "sharded", choices[1], ragged=True)
        timed = TimeModel(layout, POLICY, device, perfect(), NOTHING, NOTHING)
        for batch, tokens, found in ((8, 1, timed.decode(8, 1000)), (sizes[0], 512, None)):
            if found is None:
                found, batch = timed.prefill(512, 1000), layout.batch_multiple
            work = least_work(layout, POLICY, batch=batch, tokens=tokens, context=1000)
            exchanged = collective_bytes(layout, POLICY, batch=batch, tokens=tokens)
            bound = roofline(work, device, collectives=exchanged)
            assert found.seconds == pytest.approx(bound.seconds)
            assert found.bound == bound.bound
            assert found.tokens == bound.tokens


def test_a_step_by_hand() -> None:
    work = Work(bytes={"x": 4e9}, flops={"x": 1e12}, tokens=2)
    given = dataclasses.replace(perfect(), memory=0.5, flops={"bfloat16": 0.25}, launch=1e-6, gap=2e-6)
    found = step_time(work, [], MI355X, given, kernels=100, activations=4e9)
    assert found.memory_seconds == pytest.approx(8e9 / 4e12)
    assert found.flop_seconds == pytest.approx(1e12 / (0.25 * 2516.6e12))
    assert found.seconds == pytest.approx(2e-3 + 100 * 2e-6)
    assert found.bound == "memory"
    assert found.tokens_per_second == pytest.approx(2 / found.seconds)
    # the host needs longer: nothing else counts
    slow = step_time(work, [], MI355X, given.changed({"launch": 1e-4}), kernels=100)
    assert slow.seconds == pytest.approx(1e-2)
    assert slow.bound == "launches"
    many = step_time(work, [], MI355X, given.changed({"gap": 1e-4}), kernels=100)
    assert many.bound == "gaps"
    waiting = step_time(work, [], MI355X, given, chain=2.4e9)
    assert waiting.chain_seconds == pytest.approx(1)
    assert waiting.seconds == pytest.approx(1 + step_time(work, [], MI355X, given).seconds)
    assert waiting.bound == "chain"


def test_kernels_are_counted_by_layer_kind_and_draft() -> None:
    program = Program(linear=10, full=7, gathered=4, step=5, draft=30, passes=3, chain=100)
    layout = model(sizes=(2, 1, 1)).layout
    # three linear layers and one of attention; 13 rows of a rank are 130 slots of 512 experts, 12 are 120
    assert program.kernels(layout, 26) == 3 * 10 + 7 + 5
    assert program.kernels(layout, 24) == 3 * (10 - 4) + (7 - 4) + 5
    assert program.kernels(layout, 24, tokens=4, drafts=3) == 3 * 10 + 7 + 5 + 3 * 30
    assert program.kernels(layout, 2, tokens=130) == 3 * 10 + 7 + 5
    assert program.chain_cycles(layout, 130) == 3 * 130 * 100
    # eight rows on two data ranks
    assert program.activations(layout, 8, 5) == 3 * 4 * 4096 * 4 * (4 * 5)


@pytest.mark.parametrize("name", ["launch", "gap", "latency"])
def test_what_takes_longer_makes_no_step_shorter(name: str) -> None:
    given = assumptions_for(MI355X)
    times = [
        model(assumptions=given.changed({name: seconds})).decode(8, 4096).seconds
        for seconds in (0, 1e-6, 1e-5, 1e-4)
    ]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("name", ["memory", "flops", "links"])
def test_what_is_reached_less_makes_no_step_shorter(name: str) -> None:
    given = assumptions_for(MI355X)
    for tokens in (1, 4096):
        times = []
        for share in (1.0, 0.8, 0.4, 0.1):
            timed = model(assumptions=given.changed({name: share}))
            times.append((timed.decode(8, 4096) if tokens == 1 else timed.prefill(tokens)).seconds)
        assert times == sorted(times)


def test_more_rows_tokens_and_context_take_no_less_time() -> None:
    timed = model()
    for times in (
        [timed.decode(batch, 4096).seconds for batch in (1, 2, 8, 64, 512)],
        [timed.decode(8, context).seconds for context in (0, 100, 10_000, 200_000)],
        [timed.prefill(tokens).seconds for tokens in (1, 64, 1000, 4096)],
        [timed.prompt(tokens) for tokens in (0, 1, 4096, 4097, 20_000)],
    ):
        assert all(a < b for a, b in pairwise(times))


def test_a_prompt_is_its_chunks_each_behind_those_before() -> None:
    timed = model()
    chunks = (
        timed.prefill(4096).seconds + timed.prefill(4096, 4096).seconds + timed.prefill(808, 8192).seconds
    )
    assert timed.prompt(9000) == pytest.approx(chunks)
    assert timed.prompt(0) == 0
    behind = timed.prefill(100, 500).seconds
    assert timed.prompt(100, before=500) == pytest.approx(behind)


def test_a_mixed_step_is_one_of_each() -> None:
    timed = model()
    wanted = timed.prefill(1024, 2000).seconds + timed.decode(16, 4000).seconds
    assert timed.mixed(16, 4000, chunk=1024) == pytest.approx(wanted)


def test_requests_wait_for_their_own_steps_and_for_the_prompts_of_all() -> None:
    """Of 16 requests of 100 tokens on two data ranks, 8 prompts of each rank are read while one decodes."""
    timed = model(sizes=(2, 1, 2))
    found = timed.serve(16, context=3100, prompt=3000, reply=100)
    step = timed.decode(16, 3050).seconds
    assert found.seconds_a_token == pytest.approx(step + 8 * timed.prompt(3000) / 100)
    assert found.user_rate == pytest.approx(1 / found.seconds_a_token)
    assert found.gpu_rate == pytest.approx(16 / found.seconds_a_token / 4)
    assert found.total_gpu_rate == pytest.approx(31 * found.gpu_rate)
    # what was in the cache is not read
    cached = timed.serve(16, context=3100, prompt=0, reply=100)
    assert cached.seconds_a_token == pytest.approx(step)


def test_drafts_are_the_bytes_and_exchanges_of_their_steps_and_pay_by_how_often_they_hold() -> None:
    timed = model(assumptions=perfect(), decoding=NOTHING)
    work = verify_work(timed.layout, POLICY, batch=8, drafts=3, context=4000)
    exchanged = verify_collectives(timed.layout, POLICY, batch=8, drafts=3)
    bound = roofline(work, MI355X, collectives=exchanged).seconds
    assert timed.decode(8, 4000, drafts=3).seconds == pytest.approx(bound)
    rates = []
    for acceptance in (0.0, 0.5, 0.8, 1.0):
        served = timed.serve(8, context=4001, prompt=0, reply=1, drafts=3, acceptance=acceptance)
        assert served.user_rate == pytest.approx(expected_tokens(acceptance, 3) / served.step.seconds)
        rates.append(served.user_rate)
    assert rates == sorted(rates)
    plain = timed.serve(8, context=4001, prompt=0, reply=1)
    assert rates[0] < plain.user_rate < rates[-1]


def test_a_curve_gives_a_gpu_more_only_where_a_user_gets_less() -> None:
    layouts = with_room((1, 1, 4), (1, 4, 1), (4, 1, 1), (2, 2, 1))
    found = rate_curve(
        layouts, POLICY, MI355X, assumptions_for(MI355X), context=9216, prompt=8192, drafts=2, acceptance=0.7
    )
    assert len(found.points) > 3
    for before, after in pairwise(found.points):
        assert before.serving.batch < after.serving.batch
        assert before.best.user_rate > after.best.user_rate
        assert before.best.gpu_rate < after.best.gpu_rate
    text = str(found)
    assert "A model, not a measurement" in text
    assert "prompts of 8,192 and replies of 1,024 tokens" in text
    assert "2 drafts a step" in text
    table = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [int(cells[0].replace(",", "")) for cells in table] == [one.serving.batch for one in found.points]
    for cells, point in zip(table, found.points, strict=True):
        assert cells[-1] == f"{point.drafting.gpu_rate:,.0f}" if point.drafting else False


def test_no_layout_beats_the_curve() -> None:
    layouts = with_room((1, 1, 4), (1, 4, 1))
    given = assumptions_for(MI355X)
    found = rate_curve(layouts, POLICY, MI355X, given, context=4096)
    assert max(point.serving.batch for point in found.points) <= 1000
    for layout, _ in layouts:
        timed = TimeModel(layout, POLICY, MI355X, given, DECODING, READING)
        for batch in (1, 8, 128):
            one = timed.serve(batch, context=4096, prompt=0, reply=1)
            assert any(
                point.best.user_rate >= one.user_rate and point.best.gpu_rate >= one.gpu_rate * (1 - 1e-9)
                for point in found.points
            )


def test_a_plan_has_the_curve_where_it_is_asked_for() -> None:
    asked = {"batch": 8, "context": 2048, "top": 1}
    assert plan(SMALL, MI355X, 2, **asked).curve is None
    found = plan(SMALL, MI355X, 2, curve=True, prompt=1024, draft_tokens=1, assume={"launch": 0}, **asked)
    assert found.curve is not None
    assert found.curve.assumptions.launch == 0
    assert (found.curve.prompt, found.curve.reply, found.curve.count) == (1024, 1024, 2)
    assert str(found.curve) in str(found)
    said = json.loads(found.to_json())
    assert said == json.loads(json.dumps(found.to_dict()))
    assert said["curve"]["points"][0]["serving"]["user_rate"] == found.curve.points[0].serving.user_rate
    # decoding alone is that of the whole context
    alone = plan(SMALL, MI355X, 2, curve=True, **asked).curve
    assert alone is not None
    assert "decoding rows of 2,048 tokens" in str(alone)
    none = plan(SMALL, dataclasses.replace(MI355X, memory=1 << 30), 2, curve=True, **asked)
    assert "no curve" in str(none)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "35b", "--count", "1", "--context", "2048", "--batch", "1", "--prompt", "1024"]
    assert main([*command, "--assume", "gap=0", "--assume", "memory=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed
    assert "memory at 50 %" in printed.replace("50%", "50 %")
    assert main([*command, "--assume", "memory=fast"]) == 2
    assert "--assume is 'memory=fast'; expected NAME=NUMBER" in capsys.readouterr().err


def test_assumptions_are_given_as_names_and_numbers() -> None:
    assert assumptions_asked(["gap=0", "memory = 0.5"]) == {"gap": 0.0, "memory": 0.5}
    changed = assumptions_for(MI355X).changed({"latency": 1e-6, "links": 0.5, "host": 4.0})
    assert set(changed.latency.values()) == {1e-6}
    assert set(changed.links.values()) == {0.5}
    assert changed.host == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": 0}, "memory is 0; expected a share, above 0 and at most 1"),
        ({"memory": 1.2}, r"memory is 1\.2; expected a share"),
        ({"flops": -1}, "flops is -1; expected a share"),
        ({"links": 2}, "links is 2; expected a share"),
        ({"launch": -1e-6}, "launch is -1e-06; expected seconds, 0 or more"),
        ({"gap": math.nan}, "gap is nan; expected seconds"),
        ({"latency": math.inf}, "latency is inf; expected seconds"),
        ({"network_bandwidth": 0}, "network_bandwidth is 0; expected bytes a second"),
        ({"host": 0}, "host is 0; expected how many devices a host has"),
        ({"host": 2.5}, r"host is 2\.5; expected how many"),
        ({"speed": 1}, "'speed' is no assumption; they are memory, flops, launch, gap"),
        ({"memory": "fast"}, "memory is 'fast'; expected a number"),
    ],
)
def test_assumptions_that_cannot_be_are_refused_in_a_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assumptions_for(MI355X).changed(given)


def test_what_cannot_be_asked_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="nothing is known of what NVIDIA H100 reaches"):
        plan(SMALL, find_device("h100"), 2, batch=1, context=64, curve=True)
    with pytest.raises(InputError, match="prompt is 64; expected 0 to fewer than the context's 64 tokens"):
        plan(SMALL, MI355X, 2, batch=1, context=64, curve=True, prompt=64)
    with pytest.raises(InputError, match=r"acceptance is 1\.5; expected a probability"):
        plan(SMALL, MI355X, 2, batch=1, context=64, curve=True, draft_tokens=1, acceptance=1.5)
    timed = model()
    with pytest.raises(InputError, match="context is 10; expected at least prompt and reply, 11"):
        timed.serve(1, context=10, prompt=10, reply=1)
    with pytest.raises(InputError, match="reply is 0; expected a whole number, 1 or more"):
        timed.serve(1, context=10, prompt=1, reply=0)
    with pytest.raises(InputError, match="chunk is 0; expected a positive number"):
        timed.prompt(10, chunk=0)
    with pytest.raises(InputError, match="dtype is 'int4'; expected one of bfloat16, float8"):
        step_time(Work(bytes={}, flops={}, tokens=1), [], MI355X, perfect(), dtype="int4")


def test_every_amd_device_has_assumptions_and_graphs_take_no_longer() -> None:
    for device in DEVICES.values():
        if device.arch.startswith("gfx"):
            eager, graphs = assumptions_for(device), assumptions_for(device, graphs=True)
            assert graphs.launch == 0
            assert graphs.latency["all-reduce"] < eager.latency["all-reduce"]
            assert graphs.memory == eager.memory < 1


def test_kernels_of_a_program_are_counted_by_how_often_they_run() -> None:
    """Two of the entry, three turns of a loop of two, and neither what names memory nor a collective."""
    text = """HloModule m, num_partitions=2

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %next = s32[] add(%i, %i)
  %y = f32[8] multiply(%x, %x)
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %b = f32[8] negate(%a)
  %sum = f32[8] all-reduce(%b), replica_groups={{0,1}}, to_apply=%condition
  %start = (s32[], f32[8]) tuple(%zero, %sum)
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body, TRIPS
  %out = f32[8] get-tuple-element(%loop), index=1
  ROOT %copy = f32[8] copy(%out)
}
"""
    text = text.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')
    assert kernel_launches(Module(text)) == 2 + 3 * 2

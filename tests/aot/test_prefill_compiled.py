"""Prefill of the 397B compiled for eight AMD GPUs: bytes and FLOPs near the least, and half the link bytes.

Five layers at full width, so that one of attention is among those whose experts are wanted. Nothing is run.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.rocm import rocm  # noqa: F401
from support.slow import some
from support.whole_prompts import whole_prompts

from qwen_moe_jax.aot.compile import compile_deployment, make_deployment
from qwen_moe_jax.aot.hlo import Module
from qwen_moe_jax.aot.programs import PROGRAMS
from qwen_moe_jax.aot.report import ProgramReport
from qwen_moe_jax.config import FULL_ATTENTION
from qwen_moe_jax.configs import find_config
from qwen_moe_jax.devices import DEVICES
from qwen_moe_jax.parallel import ranks

pytestmark = pytest.mark.usefixtures("rocm")

LAYERS, RANKS = 5, 8
# (rows, tokens, what is divided): of many rows each rank has its own, with the shared expert outside of the
# sum, and meets no other row's activations; of one row each has some heads.
MANY, ONE = (8, 1024, "data"), (1, 4096, "tensor")
LARGEST_TRAFFIC, LARGEST_FLOPS = 2.5, 1.1


def program(
    layers: int, device: str, dtype: str, shape: tuple[int, int, str], **choices: Any
) -> ProgramReport:
    rows, tokens, attention = shape
    config = find_config("397b", dtype=dtype)
    deployment = whole_prompts(
        config.with_layers(config.layers[:layers]),
        DEVICES[device],
        rows=rows,
        tokens=tokens,
        expert=RANKS,
        attention=attention,
        shared_expert="outside" if attention == "data" else "sharded",
        **choices,
    )
    report = compile_deployment(deployment, DEVICES[device], model="397b", programs=("prefill",))
    return report.programs[0]


def of_four_layers(*given: Any, **choices: Any) -> dict[str, float]:
    """Bytes and FLOPs of a layer of attention and three others, and the least: five layers without one, since
    prefill does without the last layer's experts."""
    five, one = (program(layers, *given, **choices) for layers in (LAYERS, 1))
    return {
        "bytes": five.traffic - one.traffic,
        "least bytes": five.least.total_bytes - one.least.total_bytes,
        "flops": five.flops - one.flops,
        "least flops": five.least.total_flops - one.least.total_flops,
    }


def link_bytes(program: ProgramReport) -> float:
    """What a device sends of all collectives, but for its own part; an all-reduce is a reduce-scatter, whose
    result is a rank's slice, and an all-gather."""
    times = {"all-reduce": 2, "reduce-scatter": RANKS}
    return sum(one.count * one.bytes * times.get(one.kind, 1) for one in program.collectives)


CASES = [(d, t, s) for d in ("mi300x", "mi355x") for t in ("bfloat16", "float8") for s in (MANY, ONE)]


@pytest.mark.parametrize(("device", "dtype", "shape"), some(CASES, lambda i: i in (1, 6)))
def test_bytes_and_flops_of_prefill_are_near_the_least(device: str, dtype: str, shape: Any) -> None:
    found = of_four_layers(device, dtype, shape)
    assert found["bytes"] <= LARGEST_TRAFFIC * found["least bytes"]
    assert found["flops"] <= LARGEST_FLOPS * found["least flops"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        (MANY, {"delta_chunks": "products"}),
        (MANY, {"scaled": "multiplied_out"}),
        ((8, 1024, "tensor"), {}),
        (ONE, {}),
    ],
)
def test_without_any_of_what_it_takes_they_are_not(
    shape: Any, kernels: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape == ONE:  # its residual stream whole on every rank
        monkeypatch.setattr(ranks, "_FEWEST_SCATTERED", 1 << 30)
    found = of_four_layers("mi355x", "float8", shape, kernels=kernels)
    assert found["bytes"] > LARGEST_TRAFFIC * found["least bytes"]


def test_convolution_and_silu_are_one_pass_in_front_of_the_delta_rule(tmp_path: Path) -> None:
    """Of what is convolved, a layer writes the product and what its kernel reads, and nothing longer."""
    rows, tokens, _ = ONE
    config = find_config("397b", dtype="bfloat16")
    layers = 2
    deployment = whole_prompts(
        config.with_layers(config.layers[:layers]),
        DEVICES["mi300x"],
        rows=rows,
        tokens=tokens,
        expert=RANKS,
        attention="tensor",
        shared_expert="sharded",
    )
    compile_deployment(deployment, DEVICES["mi300x"], model="397b", programs=("prefill",), save=tmp_path)
    module = Module(next(tmp_path.glob("*.hlo.txt")).read_text())
    width = config.conv_channels // RANKS
    written = Counter(
        shape.dims[-2]
        for _, instruction, _ in module.executed()
        if instruction.opcode == "fusion"
        for shape in instruction.shapes
        if len(shape.dims) >= 2 and shape.dims[-1] == width and shape.dims[-2] >= tokens
    )
    assert written == {tokens: 2 * layers}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY, ONE])
def test_links_carry_half_of_what_sums_in_float32_do(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:  # all-reduces, of a residual stream that is whole on every rank
        patched.setattr(ranks, "_FEWEST_SCATTERED", 1 << 30)
        before = program(LAYERS, "mi355x", "bfloat16", (*shape[:2], "tensor"), sums="float32")
    assert link_bytes(program(LAYERS, "mi355x", "bfloat16", shape)) <= 0.51 * link_bytes(before)


@pytest.mark.parametrize("device", some(["mi355x", "mi300x"], lambda i: i == 0))
def test_attention_data_parallelism_stores_no_key_twice_and_moves_less(device: str) -> None:
    """64 rows of 32,768 tokens on eight ranks: two key heads divided as heads would be copied four times."""
    config = find_config("397b", dtype="float8")
    few = config.with_layers(config.layers[:4])
    found = {}
    for attention in ("tensor", "data"):
        options: dict[str, Any] = {"expert": RANKS, "attention": attention, "shared_expert": "auto"}
        deployment = make_deployment(few, DEVICES[device], batch=64, context=32_768, **options)
        found[attention] = compile_deployment(deployment, DEVICES[device], model="397b", programs=("decode",))
    tensor, data = found["tensor"], found["data"]
    layers = config.layer_types.count(FULL_ATTENTION)
    assert layers * data.kv <= 8 * 2**30  # of one layer of attention here
    assert tensor.kv == 4 * data.kv
    step, other = data.programs[0], tensor.programs[0]
    assert step.traffic_by_part["gated_attention"] < 0.5 * other.traffic_by_part["gated_attention"]
    of_layers = [one for one in step.collectives if one.bytes > 1024 and one.count >= few.num_hidden_layers]
    assert sum(one.count for one in of_layers) <= 2 * few.num_hidden_layers
    assert link_bytes(step) < link_bytes(other)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "attention"), [(1, "tensor"), (8, "data")])
def test_the_longest_context_compiles_with_caches_in_place(rows: int, attention: str) -> None:
    config = find_config("397b", dtype="float8")
    deployment = make_deployment(
        config.with_layers(config.layers[:4]),
        DEVICES["mi355x"],
        batch=rows,
        context=config.max_position_embeddings,
        expert=RANKS,
        attention=attention,
        shared_expert="auto",
    )
    report = compile_deployment(deployment, DEVICES["mi355x"], model="397b", programs=PROGRAMS)
    assert config.max_position_embeddings == 262_144
    for found in report.programs:
        assert report.kv + report.state <= found.donated <= 1.05 * (report.kv + report.state)
        # no scores of a whole context: those of one row, head and chunk alone would be 4 GiB
        assert found.temporaries < 5 * 2**30
    assert report.programs[-1].program == "decode"
    assert report.programs[-1].traffic_ratio <= 1.1

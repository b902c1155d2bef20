"""Generation's programs compiled through XLA's ROCm backend: what the HLO promises, and what must fail.

Widths are the 397B's, on 8 devices; layers are two, one of each kind, but for one test. Nothing is run.
"""

import dataclasses
import functools
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import PartitionSpec
from support.rocm import rocm  # noqa: F401
from support.slow import some

from qwen_moe_jax.aot import toolchain
from qwen_moe_jax.aot.compile import compile_deployment, compile_lowered, make_deployment
from qwen_moe_jax.aot.drafting import verify_collectives
from qwen_moe_jax.aot.hlo import Instruction, Module
from qwen_moe_jax.aot.programs import PROGRAMS, VERIFY, Deployment
from qwen_moe_jax.aot.report import CompileReport, ProgramReport
from qwen_moe_jax.aot.times import DECODING
from qwen_moe_jax.config import FULL_ATTENTION, LINEAR_ATTENTION, SPARSE, LayerKind, ModelConfig
from qwen_moe_jax.configs import released_config
from qwen_moe_jax.devices import DEVICES
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.parallel.mesh import make_mesh
from qwen_moe_jax.schemes.fp8 import FP8
from qwen_moe_jax.schemes.presets import of_dtype

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rocm")]

TARGETS = ("mi300x", "mi355x")  # gfx942, gfx950
BATCH, CONTEXT = 64, 4096
EXPERT_RANKS = 8

# What the report counts of arguments, over what the compiler counts: it leaves out tokens, masks and norms'
# padding.
MEMORY_TOLERANCE = 0.05
# Floors of the project: bytes of a decode step and FLOPs of a chunk of prefill, over the least.
LARGEST_TRAFFIC = 1.3
LARGEST_FLOPS = 1.15
# Of temporaries: a few arrays of 8,192 tokens' slots and activations. `lax.ragged_dot` alone, where it is a
# dense product, broadcasts its slots to every expert held here, 64 times as much.
MOST_TEMPORARIES = 2 << 30

# collectives a layer, where every rank of 8 holds other experts and heads; the embedding adds one all-reduce
PSUM = {"all-reduce": 2}
EXCHANGE = {"all-reduce": 1, "all-to-all": 1, "ragged-all-to-all": 2, "all-gather": 1}

# they hand an array on, or are one
_PASS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}


def two_layers(*, float8: bool = False, dtype: str | None = None) -> ModelConfig:
    """The 397B's widths, a layer of each kind."""
    kinds = [LayerKind(mixer, SPARSE) for mixer in (LINEAR_ATTENTION, FULL_ATTENTION)]
    quantization = FP8 if float8 else of_dtype(dtype or "bfloat16", experts=512)
    return dataclasses.replace(released_config("397b").with_layers(kinds), quantization=quantization)


@functools.cache
def saved(folder: Path) -> dict[str, Module]:
    """The programs of a folder that was saved to."""
    return {file.name.split(".")[0]: Module(file.read_text()) for file in folder.glob("*.hlo.txt")}


def compiled(
    device: str,
    program: str,
    folder: Path,
    *,
    float8: bool = False,
    dtype: str | None = None,
    batch: int = BATCH,
    **choices: Any,
) -> tuple[Deployment, CompileReport, ProgramReport, Module]:
    deployment = make_deployment(
        two_layers(float8=float8, dtype=dtype),
        DEVICES[device],
        expert=EXPERT_RANKS,
        batch=batch,
        context=CONTEXT,
        **{"shared_expert": "sharded", **choices},
    )
    report = compile_deployment(
        deployment, DEVICES[device], model="two layers", programs=(program,), save=folder
    )
    return deployment, report, report.programs[0], saved(folder)[program]


def made(module: Module) -> list[Instruction]:
    """Every instruction that writes an array to memory; what is inside fusions does not."""
    return [i for _, i, _ in module.executed() if i.opcode not in _PASS]


def elements(instruction: Instruction) -> int:
    return max((prod(shape.dims) for shape in instruction.shapes), default=0)


def assert_collectives(program: ProgramReport, a_layer: dict[str, int], layers: int = 2) -> None:
    found: Counter[str] = Counter()
    for one in program.collectives:
        found[one.kind] += round(one.count)
        assert one.group == EXPERT_RANKS
    if program.program == "prefill":
        layers -= 1  # of the last one only keys and values are wanted
    expected = Counter({kind: layers * count for kind, count in a_layer.items()})
    expected["all-reduce"] += 1
    if program.program == "decode":
        expected["all-gather"] += 1  # of logits
    elif a_layer == PSUM:
        # the residual stream is scattered: a reduce-scatter instead, and an all-gather before its next use
        sums = expected.pop("all-reduce")
        expected |= {"reduce-scatter": sums, "all-gather": sums}
    assert found == expected


def assert_no_stack_is_copied(deployment: Deployment, module: Module) -> None:
    """Nothing of an expert stack's shape is written: none is copied, cast, transposed or gathered."""
    layout = deployment.layout
    held, hidden = layout.splits["expert"].local_size, layout.config.hidden_size
    inner = layout.config.moe_intermediate_size
    stacks = [
        shape
        for rows in (inner, 2 * inner)
        for shape in ([held, rows, hidden], [held * rows, hidden], [held * hidden, rows])
    ]
    shapes = {i.name: [sorted(n for n in s.dims if n > 1) for s in i.shapes] for i in made(module)}
    assert [name for name, found in shapes.items() if any(sorted(s) in found for s in stacks)] == []


def assert_memory_is_as_planned(report: CompileReport, program: ProgramReport) -> None:
    planned = sum(report.weights.values()) + report.kv + report.state
    if program.program == "prefill":
        planned -= report.weights["lm_head"]  # a chunk does not need it
    assert program.arguments == pytest.approx(planned, rel=MEMORY_TOLERANCE)
    # caches are updated where they are, and so is what else a call is donated: what is known of rows, and
    # here a snapshot's place on each data rank
    assert report.kv + report.state <= program.donated <= 1.05 * (report.kv + report.state)


def assert_only_known_calls(program: ProgramReport) -> None:
    """Our kernels, and radix sort where XLA has it: no library solves or multiplies."""
    ours = {
        "gathered_gate_up",
        "gathered_down",
        "grouped_gate_up",
        "grouped_down",
        "combine",
        "flash_attention",
        "delta_step",
        "delta_chunks",
        "scaled_matmul",
    }
    assert {
        name for name in program.custom_calls if name not in ours and "DeviceRadixSort" not in name
    } == set()


@pytest.mark.parametrize("shared_expert", ["prescaled", "outside", "sharded", "fused"])
@pytest.mark.parametrize(("dispatch", "a_layer"), [("psum", PSUM), ("all_to_all", EXCHANGE)])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("device", TARGETS)
def test_every_program_compiles_and_keeps_its_promises(
    device, program, dispatch, a_layer, shared_expert, tmp_path
):
    deployment, report, found, module = compiled(
        device, program, tmp_path, shared_expert=shared_expert, expert_dispatch=dispatch
    )
    assert_collectives(found, a_layer)
    assert_no_stack_is_copied(deployment, module)
    assert_memory_is_as_planned(report, found)
    assert_only_known_calls(found)
    assert found.temporaries < MOST_TEMPORARIES
    # a layer of each kind; in prefill the last one, of attention, only writes its keys and values
    layers = 2 if program == "decode" else 1
    assert found.custom_calls["grouped_gate_up"] == found.custom_calls["grouped_down"] == layers
    assert found.custom_calls.get("flash_attention", 0) == layers - 1
    if program == "decode":
        assert found.traffic_ratio <= LARGEST_TRAFFIC
    if dispatch == "psum":
        # of all_to_all, the least work counts rows that are there, and kernels those there is room for
        assert program == "decode" or found.flops_ratio <= LARGEST_FLOPS
    executable = tmp_path / f"{program}.executable"
    assert DEVICES[device].arch.encode() in executable.read_bytes()


@pytest.mark.parametrize(
    ("sizes", "choices"),
    [
        ((1, 4, 2), {"attention": "data"}),
        ((2, 2, 2), {"shared_expert": "outside"}),
        ((1, 2, 4), {"expert_dispatch": "all_to_all", "attention": "data", "shared_expert": "prescaled"}),
        ((1, 8, 1), {"exact": True, "shared_expert": "outside"}),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_other_layouts_compile_too(program, sizes, choices):
    data, expert, tensor = sizes
    choices = {"shared_expert": "sharded", **choices}
    deployment = make_deployment(
        two_layers(),
        DEVICES["mi355x"],
        data=data,
        expert=expert,
        tensor=tensor,
        batch=BATCH,
        context=CONTEXT,
        **choices,
    )
    report = compile_deployment(deployment, DEVICES["mi355x"], model="two layers", programs=(program,))
    (found,) = report.programs
    assert_memory_is_as_planned(report, found)
    assert_only_known_calls(found)
    # sums over ranks go to the group that holds the parts; only the chosen tokens go to all devices
    groups = {one.group for one in found.collectives if one.bytes > 256 * BATCH}
    assert groups <= {expert, tensor, expert * tensor}


@pytest.mark.parametrize(
    ("name", "device"),
    some([(n, d) for n in ("80b", "30b", "57b", "27b") for d in TARGETS], lambda i: i in (0, 7)),
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_layer_of_each_kind_of_every_family_compiles(name: str, device: str, program: str) -> None:
    config = released_config(name)
    kinds = list(dict.fromkeys(config.layers))
    deployment = make_deployment(
        config.with_layers(kinds), DEVICES[device], expert=4, batch=BATCH, context=CONTEXT
    )
    report = compile_deployment(deployment, DEVICES[device], model=name, programs=(program,))
    (found,) = report.programs
    assert_only_known_calls(found)
    calls = found.custom_calls
    sparse = sum(kind.mlp == SPARSE for kind in kinds)
    if program == "decode":  # prefill does without the head and the last MLP, which are much of two layers
        assert_memory_is_as_planned(report, found)
        assert found.traffic_ratio <= LARGEST_TRAFFIC
        assert calls.get("grouped_gate_up", 0) + calls.get("gathered_gate_up", 0) == sparse
        assert calls.get("flash_attention", 0) == 1
        assert calls.get("delta_step", 0) == sum(kind.mixer == LINEAR_ATTENTION for kind in kinds)


@pytest.mark.parametrize("device", TARGETS)
def test_a_few_rows_are_gathered_without_a_sort(device, tmp_path):
    _, _, found, module = compiled(device, "decode", tmp_path, batch=8)
    assert found.custom_calls["gathered_gate_up"] == found.custom_calls["gathered_down"] == 2
    # the router's choice of experts is the only sort
    assert {"router" in i.op_name for i in module.instructions() if i.opcode == "sort"} == {True}
    assert found.traffic_ratio <= LARGEST_TRAFFIC


@pytest.mark.parametrize("device", TARGETS)
def test_decode_is_fusions_products_kernels_and_collectives_only(device, tmp_path):
    """Gated norm, router and the convolution's update are fused; keys of grouped heads are not repeated."""
    deployment, _, _, module = compiled(device, "decode", tmp_path, batch=8)
    loop = next(i for i in module.computations[module.entry] if i.opcode == "while")
    body = module.computations[loop.called("body") or ""]
    kinds = Counter(i.opcode for i in body if i.opcode not in _PASS)
    plain = {"fusion", "custom-call", "constant", "copy", "iota", "partition-id"}
    exchanges = {f"all-{kind}-{part}" for kind in ("reduce", "gather") for part in ("start", "done")}
    assert set(kinds) <= plain | exchanges | {"all-reduce", "all-gather", "reduce", "convert"}
    # what is copied is no larger than the convolution's inputs
    layout = deployment.layout
    conv = 3 * layout.splits["qkv"].local_size * 8 * 2
    assert max((i.bytes for i in body if i.opcode == "copy"), default=0) <= conv
    # one a product (8 a DeltaNet layer, 7 an attention layer, with router and shared expert), what is between
    # them, and whose states go where at the border of a page
    assert kinds["fusion"] <= 66
    # no array of every query head's keys
    repeated = 8 * CONTEXT * layout.config.head_dim * 2
    assert [i.name for i in made(module) if repeated <= elements(i)] == []


def instructions_of(deployment: Deployment, program: str, folder: Path) -> str:
    """LLVM's optimised code of a program for the GPU."""
    options = {**(deployment.kernels.compiler_options or {}), "xla_dump_to": str(folder)}
    deployment.lower(program).compile(compiler_options=options)
    return "".join(file.read_text() for file in folder.glob("*ir-with-opt.ll"))


CONVERT = re.compile(r"llvm\.amdgcn\.cvt\.[\w.]*fp8[\w.]*")
MFMA = re.compile(r"llvm\.amdgcn\.mfma\.[\w.]+")


@pytest.mark.parametrize("float8", [False, True], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("device", TARGETS)
def test_every_kernel_with_a_product_uses_matrix_units(device, float8, tmp_path):
    """In the kernel's own code; those for single rows and the delta rule's step hardly compute."""
    deployment = make_deployment(
        two_layers(float8=float8), DEVICES[device], expert=EXPERT_RANKS, batch=BATCH, context=CONTEXT
    )
    code = instructions_of(deployment, "decode", tmp_path)
    names = ["grouped_gate_up", "grouped_down", "flash_attention", *(["scaled_matmul"] if float8 else [])]
    bodies = re.split(r"^define ", code, flags=re.MULTILINE)[1:]
    for name in names:
        found = [body for body in bodies if name in body.partition("(")[0]]
        assert found, name
        for body in found:
            assert any("bf16" in one for one in MFMA.findall(body)), name


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("device", TARGETS)
def test_float8_is_converted_by_the_hardware_where_it_is_its_own(device, program, tmp_path):
    """gfx950's float8 is e4m3fn: converted natively. gfx942's is e4m3fnuz: XLA's products go by way of it
    (half the number at the same bits), and kernels, which only have e4m3fn, by way of float16's bits."""
    deployment = make_deployment(
        two_layers(float8=True), DEVICES[device], expert=EXPERT_RANKS, batch=8, context=CONTEXT
    )
    code = instructions_of(deployment, program, tmp_path)
    found = set(CONVERT.findall(code))
    # a chunk of prefill has products of many tokens, which are XLA's
    assert bool(found) == (device == "mi355x" or program == "prefill")
    widened_by_hand = "lshr" in code and "half" in code and "fpext" in code
    assert widened_by_hand or device == "mi355x"
    # products are of bfloat16, by matrix units
    assert any("bf16" in name for name in MFMA.findall(code))


@pytest.mark.parametrize("device", TARGETS)
def test_float8_halves_what_a_step_reads(device, tmp_path):
    _, _, wide, _ = compiled(device, "decode", tmp_path / "wide", batch=8)
    deployment, report, narrow, module = compiled(device, "decode", tmp_path / "narrow", batch=8, float8=True)
    assert report.dtype == "float8"
    assert narrow.traffic_ratio <= LARGEST_TRAFFIC
    # half of the layers' matrices; lm_head and router stay bfloat16
    assert narrow.least.bytes["routed experts"] < 0.51 * wide.least.bytes["routed experts"]
    assert narrow.traffic_by_part["experts"] < 0.53 * wide.traffic_by_part["experts"]
    assert_no_stack_is_copied(deployment, module)


@pytest.mark.parametrize(("dtype", "share"), [("mxfp4", 4.25 / 16), ("int4", 4.125 / 16)])
@pytest.mark.parametrize("device", TARGETS)
def test_codes_of_four_bits_are_read_as_they_are_stored(device, dtype, share, tmp_path):
    """The bits of codes and scales, over bfloat16's: nothing is widened in memory."""
    _, _, wide, _ = compiled(device, "decode", tmp_path / "wide", batch=8)
    deployment, report, narrow, module = compiled(device, "decode", tmp_path / "narrow", batch=8, dtype=dtype)
    assert report.dtype == dtype
    assert narrow.traffic_ratio <= LARGEST_TRAFFIC
    assert narrow.least.bytes["routed experts"] < 1.01 * share * wide.least.bytes["routed experts"]
    assert narrow.traffic_by_part["experts"] < 1.1 * share * wide.traffic_by_part["experts"]
    assert_no_stack_is_copied(deployment, module)


@pytest.mark.parametrize("device", TARGETS)
def test_the_delta_rule_of_a_prefill_chunk_is_one_kernel_and_halves_what_its_layer_moves(device, tmp_path):
    """Beside plain XLA, which has no library's triangular solve either."""
    _, _, found, _ = compiled(device, "prefill", tmp_path / "kernel")
    assert_only_known_calls(found)
    assert found.custom_calls["delta_chunks"] == 1
    moved = found.traffic_by_part["gated_delta_net"]
    _, _, plain, module = compiled(
        device, "prefill", tmp_path / "plain", kernels={"delta_chunks": "products"}
    )
    opcodes = Counter(i.opcode for i in module.instructions())
    assert opcodes["triangular-solve"] == 0
    assert plain.traffic_by_part["gated_delta_net"] > 2 * moved


@pytest.mark.parametrize("device", ["mi355x"])
def test_the_whole_397b_decodes_on_eight(device, tmp_path):
    config = released_config("397b")
    deployment = make_deployment(
        config,
        DEVICES[device],
        expert=EXPERT_RANKS,
        batch=BATCH,
        context=32768,
        shared_expert="sharded",
    )
    report = compile_deployment(
        deployment, DEVICES[device], model="397b", programs=("decode",), save=tmp_path
    )
    (found,) = report.programs
    assert_collectives(found, PSUM, layers=60)
    assert_no_stack_is_copied(deployment, saved(tmp_path)["decode"])
    assert_memory_is_as_planned(report, found)
    assert found.custom_calls == {
        "delta_step": 45,
        "flash_attention": 15,
        "grouped_gate_up": 60,
        "grouped_down": 60,
        "combine": 60,
    } | {name: n for name, n in found.custom_calls.items() if "DeviceRadixSort" in name}
    assert found.traffic_ratio <= LARGEST_TRAFFIC
    # counted in few layers of FP8, which has some more
    assert found.kernels == pytest.approx(DECODING.kernels(deployment.layout, BATCH), rel=0.1)
    assert report.fits
    assert report.largest_batch >= BATCH


def test_what_does_not_fit_is_said_to_and_by_how_much(tmp_path):
    config = two_layers()
    # all experts on one device, and caches of a few hundred long rows
    deployment = make_deployment(
        config, DEVICES["mi300x"], batch=2048, context=65536, shared_expert="sharded"
    )
    report = compile_deployment(deployment, DEVICES["mi300x"], model="two layers", programs=("decode",))
    assert not report.fits
    assert report.over == report.peak - report.usable > 0
    assert 0 < report.largest_batch < 2048
    assert f"largest batch {report.largest_batch:,}" in str(report)
    fitting = dataclasses.replace(deployment, batch=report.largest_batch)
    assert compile_deployment(fitting, DEVICES["mi300x"], model="two layers", programs=("decode",)).fits


def on_one(device: str, *shapes: tuple[tuple[int, ...], str]) -> list[jax.ShapeDtypeStruct]:
    mesh = make_mesh(devices=toolchain.topology(DEVICES[device]))
    sharding = jax.NamedSharding(mesh, PartitionSpec())
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]


def test_the_dense_form_would_break_the_bound_on_temporaries():
    """`lax.ragged_dot` in bfloat16 on gfx950, of the slots of 1,024 tokens only."""
    given = on_one("mi355x", ((10240, 4096), "bfloat16"), ((64, 4096, 2048), "bfloat16"), ((64,), "int32"))
    memory: Any = jax.jit(lax.ragged_dot).lower(*given).compile().memory_analysis()
    assert memory.temp_size_in_bytes > MOST_TEMPORARIES


@pytest.mark.parametrize("device", TARGETS)
def test_a_kernel_that_asks_for_more_lds_than_there_is_does_not_compile(device):
    def kernel(x_ref, y_ref, out_ref):
        def one(i, total):
            x = plt.load(x_ref.at[:, pl.ds(i * 256, 256)])
            return total + plt.dot(x, plt.load(y_ref.at[pl.ds(i * 256, 256), :]))

        out_ref[...] = lax.fori_loop(0, 4, one, jnp.zeros((256, 256), jnp.float32))

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=4),
    )
    given = on_one(device, ((256, 1024), "bfloat16"), ((1024, 256), "bfloat16"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)shared memory|LDS|local memory|resource"):
        compile_lowered(jax.jit(call).lower(*given), Kernels(DEVICES[device].arch))


def test_an_ordinary_run_beside_it_is_not_disturbed(tmp_path):
    compiled("mi355x", "decode", tmp_path)
    assert jax.default_backend() == "cpu"
    assert float(jnp.ones(3).sum()) == 3
    assert jax.config.values["jax_enable_compilation_cache"]


@pytest.mark.parametrize("device", TARGETS)
def test_a_step_that_verifies_drafts_moves_little_more_than_the_least_and_sums_what_is_planned(
    device, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("verify")
    deployment, report, program, _ = compiled(device, VERIFY, folder, draft_tokens=3)
    assert program.tokens == 4
    assert program.traffic_ratio < LARGEST_TRAFFIC
    assert report.weights["multi-token prediction"] > 0
    layout, policy = deployment.layout, deployment.policy
    planned: Counter[str] = Counter()
    for one in verify_collectives(layout, policy, batch=BATCH, drafts=3):
        planned[one.operation] += one.count
    found: Counter[str] = Counter()
    for one in program.collectives:
        found[one.kind] += round(one.count)
    assert found == planned

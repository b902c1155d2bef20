"""The reader of optimised HLO, on text in the style of the GPU backend and on programs compiled here."""

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from jaxlib.mlir import ir

from qwen_moe_jax.aot.hlo import (
    CollectiveOperation,
    Module,
    Shape,
    collectives,
    custom_calls,
    item_bytes,
    kernel_name,
)
from qwen_moe_jax.kernels.launch import COST, KernelCost
from qwen_moe_jax.parallel.mesh import make_mesh

# What the GPU backend writes, cut to size: aliased arguments, tables of source lines, types of tuples with
# comments, quoted text with everything in it, attributes with braces, and a loop.
MODULE = r"""HloModule jit__decode, is_scheduled=true,
      input_output_alias={ {0}: (1, {}, may-alias), {1}: (2, {}, must-alias) },
      entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}, replica_count=1, num_partitions=8

FileNames
1 "/somewhere/model = best (final)/norms.py"
2 "{ %not = f32[2] add(%a, %b) }"

%fused_add (param_0: f32[4,8], param_1.1: (f32[8], /*index=1*/(s32[], bf16[2,3]))) -> f32[4,8] {
  %param_0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %constant_1 = f32[2,2]{1,0} constant({ { 1, (2) }, { 3, 4 } })
  ROOT %add.1 = f32[4,8]{1,0} add(%param_0, %param_0), metadata={op_name="experts/add" stack_frame_id=3}
}

%body.1 (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[], f32[4,8]{1,0}) parameter(0)
  %get-tuple-element.1 = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = f32[4,8]{1,0} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused_add,
      metadata={op_name="params[\'layers.0 (\"a\")\'] calls=%wrong, body=%wrong" stack_frame_id=3},
      backend_config={"operation_queue_id":"0","blocks":["{","("],"known":{"n":"3"}}
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(%get-tuple-element.1, /*index=1*/%fusion.1)
}

%condition.1 (arg.1: (s32[], f32[4,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %wrapped_compare = pred[] custom-call(%arg.1), custom_call_target="compare"
}

ENTRY %main.87_spmd (param.1: f32[4,8], param.2: bf16[<=16,2]) -> (s32[], f32[4,8]) {
  %param.1 = f32[4,8]{1,0} parameter(0), sharding={devices=[1,8]<=[8]}, metadata={op_name="state"}
  %param.2 = bf16[<=16,2]{1,0} parameter(1)
  %nested = ((f32[4,8]{1,0}, s32[]), /*index=1*/(bf16[2]{0}, token[])) custom-call(%param.1, %param.2),
      custom_call_target="f({", api_version=API_VERSION_TYPED_FFI
  %copy-start = (f32[4,8]{1,0}, f32[4,8]{1,0:S(5)}, u32[]) copy-start(%param.1)
  ROOT %while.1 = (s32[], f32[4,8]{1,0}) while(%nested), condition=%condition.1, body=%body.1,
      backend_config={"known_trip_count":{"n":"7"}}
}
""".replace("\n      ", " ")  # XLA breaks no lines


def instruction(line: str, *, header: str = "HloModule m, num_partitions=8"):
    """A single instruction of a module's entry."""
    return Module(f"{header}\n\nENTRY %main () -> f32[] {{\n  {line}\n}}\n").computations["main"][0]


def test_every_line_that_computes_is_read_and_no_other():
    module = Module(MODULE)
    assert {name: [i.name for i in found] for name, found in module.computations.items()} == {
        "fused_add": ["param_0", "constant_1", "add.1"],
        "body.1": ["arg", "get-tuple-element.1", "fusion.1", "tuple.1"],
        "condition.1": ["arg.1", "wrapped_compare"],
        "main.87_spmd": ["param.1", "param.2", "nested", "copy-start", "while.1"],
    }
    assert (module.entry, module.aliased, module.devices) == ("main.87_spmd", 2, 8)
    assert [i.name for i in module.instructions() if i.root] == [
        "add.1",
        "tuple.1",
        "wrapped_compare",
        "while.1",
    ]


def test_shapes_and_operands_are_read_through_comments_layouts_and_nesting():
    entry = Module(MODULE).by_name["main.87_spmd"]
    assert entry["nested"].shapes == (
        Shape("f32", (4, 8)),
        Shape("s32", ()),
        Shape("bf16", (2,)),
        Shape("token", ()),
    )
    assert entry["nested"].operands == ("param.1", "param.2")
    assert entry["nested"].bytes == 4 * 32 + 4 + 2 * 2
    assert entry["param.2"].shapes == (Shape("bf16", (16, 2)),)  # of at most 16
    body = Module(MODULE).by_name["body.1"]
    assert body["tuple.1"].operands == ("get-tuple-element.1", "fusion.1")
    assert Module(MODULE).by_name["fused_add"]["constant_1"].shapes == (Shape("f32", (2, 2)),)


def test_quoted_text_is_not_taken_for_attributes():
    fusion = Module(MODULE).by_name["body.1"]["fusion.1"]
    assert fusion.called("calls") == "fused_add"
    assert fusion.called("body") is None
    assert fusion.op_name == """params['layers.0 ("a")'] calls=%wrong, body=%wrong"""


def test_a_copy_that_is_started_writes_its_copy_only():
    start = Module(MODULE).by_name["main.87_spmd"]["copy-start"]
    assert (start.kind, start.bytes) == ("copy", 4 * 32)


def test_items_have_the_bytes_of_their_dtype():
    sizes = {"pred": 1, "s4": 0.5, "u8": 1, "bf16": 2, "f32": 4, "s64": 8, "c64": 8, "c128": 16, "token": 0}
    sizes |= {"f4e2m1fn": 0.5, "f8e4m3fn": 1, "f8e5m2fnuz": 1}
    assert {dtype: item_bytes(dtype) for dtype in sizes} == sizes


def loops(inner: str, outer: str) -> Module:
    """A kernel in a loop in a loop and another in the inner condition; `inner`, `outer` say how long."""
    return Module(f"""HloModule loops

%body.2 (a.2: f32[2]) -> f32[2] {{
  %a.2 = f32[2]{{0}} parameter(0)
  ROOT %k.2 = f32[2]{{0}} custom-call(%a.2), custom_call_target="kernel"
}}

%condition.2 (c.2: f32[2]) -> pred[] {{
  %c.2 = f32[2]{{0}} parameter(0)
  ROOT %k.3 = pred[] custom-call(%c.2), custom_call_target="test"
}}

%body.1 (a.1: f32[2]) -> f32[2] {{
  %a.1 = f32[2]{{0}} parameter(0)
  ROOT %while.2 = f32[2]{{0}} while(%a.1), condition=%condition.2, body=%body.2{inner}
}}

%condition.1 (c.1: f32[2]) -> pred[] {{
  ROOT %c.1 = f32[2]{{0}} parameter(0)
}}

ENTRY %main (p: f32[2]) -> f32[2] {{
  %p = f32[2]{{0}} parameter(0)
  ROOT %while.1 = f32[2]{{0}} while(%p), condition=%condition.1, body=%body.1{outer}
}}
""")


def known(trips: int) -> str:
    return f', backend_config={{"known_trip_count":{{"n":"{trips}"}},"known_init_step":{{"init":"0"}}}}'


@pytest.mark.parametrize(
    ("inner", "outer", "calls"),
    [
        (known(7), known(3), {"kernel": 21}),
        ("", known(3), {"kernel": 3, "test": 3}),
        (known(7), "", {"kernel": 7}),
        ("", "", {"kernel": 1, "test": 1}),
        (known(0), known(3), {"kernel": 0}),
    ],
    ids=["both known", "inner unknown", "outer unknown", "unknown", "never"],
)
def test_loops_multiply_and_count_once_where_their_length_is_unknown(
    inner: str, outer: str, calls: dict[str, float]
):
    assert custom_calls(loops(inner, outer)) == calls


@pytest.mark.parametrize(
    "attributes",
    [
        "branch_computations={%few, %many}",
        "branch_computations={%many, %few}",
        "true_computation=%few, false_computation=%many",
    ],
)
def test_of_a_conditional_the_costlier_branch_runs(attributes: str):
    module = Module(f"""HloModule choice, num_partitions=8

%few (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %psum = f32[8]{{0}} all-reduce(%a), replica_groups={{{{0,1}}}}
}}

%many (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  %gather = f32[16]{{0}} all-gather(%b), replica_groups={{{{0,1}}}}, dimensions={{0}}
  ROOT %k = f32[8]{{0}} custom-call(%gather), custom_call_target="kernel"
}}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {{
  %p = pred[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %choice = f32[8]{{0}} conditional(%p, %x, %x), {attributes}
}}
""")
    assert collectives(module) == [CollectiveOperation("all-gather", 2, 64, 1)]
    assert custom_calls(module) == {"kernel": 1}
    assert [i.name for _, i, _ in module.executed()][-3:] == ["b", "gather", "k"]
    # by another measure the other one
    cheap = module.executed(cost=lambda _, i: i.kind == "all-reduce")
    assert [i.name for _, i, _ in cheap][-1] == "psum"


ALL_REDUCE = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"f32[64]{{0}} all-reduce(%a), {ALL_REDUCE}", ("all-reduce", 4, 256)),
        (f"f32[64]{{0}} all-reduce-start(%a), {ALL_REDUCE}", ("all-reduce", 4, 256)),
        # several at once: the results alone
        (
            f"(f32[64]{{0}}, bf16[8]{{0}}) all-reduce-start(%a, /*index=1*/%b), {ALL_REDUCE}",
            ("all-reduce", 4, 256 + 16),
        ),
        # others hand their operands on
        (
            "(f32[64]{0}, f32[512]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}",
            ("all-gather", 8, 2048),
        ),
        (
            "((f32[64]{0}, bf16[8]{0}), (f32[128]{0}, bf16[16]{0})) all-gather-start(%a, %b), "
            "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
            ("all-gather", 2, 512 + 32),
        ),
        (
            "((f32[64]{0}), f32[8]{0}, u32[]) reduce-scatter-start(%a), replica_groups={}, to_apply=%add",
            ("reduce-scatter", 8, 32),
        ),
        (
            "(f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%a), "
            "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
            ("collective-permute", 2, 256),
        ),
        (
            "f32[64]{0} collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3}}",
            ("collective-permute", 4, 256),
        ),
        (
            "(f32[4]{0}, f32[4]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}",
            ("all-to-all", 2, 32),
        ),
    ],
)
def test_a_collective_is_known_by_its_result_and_its_group(line: str, expected: tuple[str, int, float]):
    module = Module(f"HloModule m, num_partitions=8\n\nENTRY %main () -> f32[] {{\n  %c = {line}\n}}\n")
    assert collectives(module) == [CollectiveOperation(*expected, 1)]


def test_collectives_are_found_behind_asynchronous_starts_and_in_fusions():
    module = Module("""HloModule m, num_partitions=4

%async (a: f32[64]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  ROOT %scatter = f32[16]{0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}

%dynamic-slice-fusion (b: f32[64]) -> f32[16] {
  %b = f32[64]{0} parameter(0)
  ROOT %scatter.1 = f32[16]{0} reduce-scatter(%b), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %start = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%x), calls=%async
  %done = f32[16]{0} async-done(%start), calls=%async
  ROOT %fusion = f32[16]{0} fusion(%x), kind=kCustom, calls=%dynamic-slice-fusion
}
""")
    assert collectives(module) == [CollectiveOperation("reduce-scatter", 4, 64, 2)]


X = jax.ShapeDtypeStruct((16, 64), jnp.float32)


@pytest.mark.parametrize(
    ("program", "spec", "expected"),
    [
        (lambda x: lax.psum(x, "tensor"), ("expert", "tensor"), ("all-reduce", 4, 8 * 16 * 4)),
        (lambda x: lax.all_gather(x, "expert"), ("expert", "tensor"), ("all-gather", 2, 2 * 8 * 16 * 4)),
        (
            lambda x: lax.psum_scatter(x, ("expert", "tensor"), tiled=True),
            (),
            ("reduce-scatter", 8, 2 * 64 * 4),
        ),
        (
            lambda x: lax.all_to_all(x, "tensor", 0, 0, tiled=True),
            ("expert",),
            ("all-to-all", 4, 8 * 64 * 4),
        ),
        (
            lambda x: lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
            ("expert", "tensor"),
            ("collective-permute", 4, 8 * 16 * 4),
        ),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute"],
)
def test_collectives_of_a_compiled_program_are_counted_through_its_loops(
    program: Callable[[jax.Array], Any], spec: tuple[str, ...], expected: tuple[str, int, float]
):
    """In a scan of 5 steps, on 8 devices as 2 x 4."""
    mesh = make_mesh(1, 2, 4)

    def repeated(x: jax.Array) -> jax.Array:
        # each step's operand depends on the step before, so that none can leave the loop
        step = lambda carry, _: (carry + program(jnp.sin(x) * carry).sum(), None)  # noqa: E731
        return lax.scan(step, jnp.float32(1), length=5)[0]

    f = jax.shard_map(
        repeated, mesh=mesh, in_specs=PartitionSpec(*spec), out_specs=PartitionSpec(), check_vma=False
    )
    text = jax.jit(f).lower(X).compile().as_text()
    assert collectives(Module(text or "")) == [CollectiveOperation(*expected, 5)]


def kernel(metadata: dict[str, str]):
    """A kernel's call as XLA prints it, with MLIR's own printing of the metadata."""
    with ir.Context():
        config = str(
            ir.DictAttr.get(
                {
                    "ir": ir.StringAttr.get('ML\x01"serialized_metadata = "'),
                    "serialized_metadata": ir.StringAttr.get(json.dumps(metadata, ensure_ascii=False)),
                    "num_warps": ir.StringAttr.get("4"),
                }
            )
        )
    return instruction(
        '%k = f32[8]{0} custom-call(), custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(f)/experts/gate_up/pallas_call" stack_frame_id=5}}, backend_config={config}'
    )


@pytest.mark.parametrize(
    "other",
    ["plain", 'a "quoted" word', "back\\slash", "\\22 and \\5C", "ends in \\", "line\nfeed, é", '"', "{}()"],
)
def test_what_a_kernel_says_of_itself_survives_escaping(other: str):
    cost = KernelCost(flops=1.5e12, bytes=3072.0)
    found = kernel({"note": other, COST: json.dumps({"flops": 1.5e12, "bytes": 3072.0}), other: "last"})
    assert found.kernel_cost == cost
    assert kernel_name(found) == "gate_up"


def test_a_kernel_of_others_says_nothing():
    assert kernel({"note": "theirs"}).kernel_cost is None
    assert instruction('%k = f32[] custom-call(), custom_call_target="__cublas$gemm"').kernel_cost is None


def test_kernels_are_counted_by_name_and_others_by_target():
    line = (
        '%k = f32[8]{0} custom-call(), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/experts/gate_up/pallas_call"}, backend_config={serialized_metadata = '
        r'"{\22qwen_moe_jax_cost\22: \22{\\\22flops\\\22: 2.0, \\\22bytes\\\22: 3.0}\22}"}'
    )
    text = f"""HloModule m

ENTRY %main () -> f32[] {{
  {line}
  {line.replace("%k", "%k.1")}
  %other = f32[] custom-call(), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %sort = f32[] custom-call(), custom_call_target="__cub$DeviceRadixSort"
}}
"""
    assert custom_calls(Module(text)) == {
        "gate_up": 2,
        "__gpu$xla.gpu.triton": 1,
        "__cub$DeviceRadixSort": 1,
    }


def test_a_whole_compiled_program_is_read():
    """Every line of the text that defines a name becomes an instruction whose operands are known."""

    def f(x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = lax.cond(i[0] > 1, jnp.sort, lambda x: jnp.cumsum(x, 0), x)
        return lax.fori_loop(0, i[1], lambda _, y: jnp.sin(y) @ jnp.ones((64, 64)), picked), x.at[i].add(1.0)

    i = jax.ShapeDtypeStruct((3,), jnp.int32)
    text = jax.jit(f).lower(X, i).compile().as_text() or ""
    module = Module(text)
    lines = re.findall(r"^\s+(?:ROOT )?%([\w.\-]+) = ", text, re.MULTILINE)
    assert [one.name for one in module.instructions()] == lines
    for name, found in module.computations.items():
        assert sum(one.root for one in found) == 1, name
        for one in found:
            if one.opcode not in ("parameter", "constant"):
                assert set(one.operands) <= set(module.by_name[name]), one

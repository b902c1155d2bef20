"""Bytes that programs move, known exactly for small ones: compiled here, or as the GPU backend writes them."""

import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen_moe_jax.aot.hlo import Module
from qwen_moe_jax.aot.traffic import PARTS, Traffic, part_of, traffic

ROWS, WIDTH = 1000, 128
N = ROWS * WIDTH * 4  # bytes of an array
ROW = WIDTH * 4

X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)

# What else a program moves: loop counters, indices and predicates, a few words each time. Arrays here have
# 512 bytes a row and 512,000 in all, so that none can hide in it.
WORDS = 200


def compiled(f: Callable[..., Any], *arguments: Any, **options: Any) -> Traffic:
    return traffic(Module(jax.jit(f, **options).lower(*arguments).compile().as_text() or ""))


def fused(body: str, *, others: str = "", operands: str | None = None) -> float:
    """Bytes of a program that is one fusion of `body`, whose parameters are the program's."""
    parameters = re.findall(r"%(\S+) = (\S+) parameter\(\d+\)", body)
    root = re.search(r"ROOT %\S+ = (\(.*?\)|\S+) [a-z]", body)
    assert root is not None
    lines = "\n".join(f"  %operand{n} = {shape} parameter({n})" for n, (_, shape) in enumerate(parameters))
    passed = operands or ", ".join(f"%operand{n}" for n in range(len(parameters)))
    return traffic(
        Module(f"""HloModule fused

{others}
%fused () -> f32[] {{
{body}
}}

ENTRY %main () -> f32[] {{
{lines}
  ROOT %fusion = {root.group(1)} fusion({passed}), kind=kLoop, calls=%fused
}}
""")
    ).bytes


def alone(line: str, *operands: str) -> float:
    """Bytes of a program that is one operation of operands %a, %b, ... of these shapes."""
    lines = "\n".join(f"  %{'abcdef'[n]} = {shape} parameter({n})" for n, shape in enumerate(operands))
    return traffic(
        Module(f"HloModule one\n\nENTRY %main () -> f32[] {{\n{lines}\n  ROOT %r = {line}\n}}\n")
    ).bytes


# compiled here


def test_an_elementwise_operation_reads_its_operands_and_writes_its_result():
    assert compiled(lambda x, y: jnp.tanh(x) * y + 1, X, X).bytes == 3 * N


def test_a_donated_cache_updated_in_place_counts_the_update():
    def update(cache: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(cache, row[None], (at, 0))

    row = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    donated = compiled(update, X, row, INDEX, donate_argnums=0)
    assert donated.bytes == 2 * ROW + 4
    # one that is kept is copied first
    assert compiled(update, X, row, INDEX).bytes == donated.bytes + 2 * N


def test_a_donated_cache_with_rows_scattered_into_it_counts_the_rows():
    def update(cache: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        return cache.at[jnp.arange(16), at].set(rows)

    cache = jax.ShapeDtypeStruct((16, 100, WIDTH), jnp.float32)
    at, rows = jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)
    # the positions are read, made pairs of indices, and those read again
    indices = 4 * 16 + 2 * 4 * 32
    assert compiled(update, cache, at, rows, donate_argnums=0).bytes == 2 * 16 * ROW + indices


def test_an_embedding_reads_the_rows_it_takes():
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    assert compiled(lambda table, tokens: table[tokens], X, tokens).bytes == 2 * 16 * ROW + 4 * 16


def test_a_matmul_reads_each_matrix_once():
    a, b = jax.ShapeDtypeStruct((512, 256), jnp.float32), jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    assert compiled(jnp.matmul, a, b).bytes == 4 * (512 * 256 + 256 * 1024 + 512 * 1024)


def test_a_loop_counts_as_often_as_it_runs():
    def looped(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 7, lambda _, x: jnp.sin(x) * 2, x)

    found = compiled(looped, X, donate_argnums=0)
    assert found.bytes == pytest.approx(7 * 2 * N, abs=WORDS)
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_counts_once_and_is_told_of():
    def looped(x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.fori_loop(0, n, lambda _, x: jnp.sin(x) * 2, x)

    found = compiled(looped, X, INDEX, donate_argnums=0)
    assert found.bytes == pytest.approx(2 * N, abs=WORDS)
    assert found.unknown_loops == 1


def test_a_cache_carried_through_a_loop_counts_the_rows_written_to_it():
    def looped(cache: jax.Array, row: jax.Array) -> jax.Array:
        def step(i: jax.Array, cache: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(cache, row[None], (i, 0))

        return lax.fori_loop(0, 7, step, cache)

    row = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    found = compiled(looped, X, row, donate_argnums=0)
    assert found.bytes - 7 * 2 * ROW == pytest.approx(2 * ROW, abs=2 * ROW + WORDS)  # the row may be copied


def test_of_a_conditional_the_branch_that_moves_more_counts():
    def choice(p: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.cond(p, lambda x, y: x * 2, lambda x, y: x + y, x, y)

    found = compiled(choice, jax.ShapeDtypeStruct((), jnp.bool_), X, X)
    assert found.bytes == pytest.approx(3 * N, abs=WORDS)


def test_scopes_of_a_compiled_program_are_its_parts():
    def f(x: jax.Array) -> jax.Array:
        with jax.named_scope("experts"), jax.named_scope("router"):
            x = jnp.sort(x)
        with jax.named_scope("lm_head"):
            return x @ x.T

    by_part = compiled(f, X).by_part()
    assert by_part["router"] == 2 * N
    assert by_part["lm_head"] >= N + 4 * ROWS * ROWS
    assert set(by_part) <= {"router", "lm_head", "other"}


# slices


def test_what_is_sliced_counts_as_the_slice_also_behind_arithmetic():
    body = """  %p = f32[8,64]{1,0} parameter(0)
  %e = f32[8,64]{1,0} exponential(%p)
  %b = f32[8,4,16]{2,1,0} bitcast(%e)
  ROOT %s = f32[8,1,16]{2,1,0} slice(%b), slice={[0:8], [1:2], [0:16]}"""
    assert fused(body) == 2 * 4 * 128


def test_regions_of_one_operand_add_up_once_each():
    body = """  %p = f32[8,64]{1,0} parameter(0)
  %s = f32[8,16]{1,0} slice(%p), slice={[0:8], [0:16]}
  %s.clone = f32[8,16]{1,0} slice(%p), slice={[0:8], [0:16]}
  %t = f32[8,16]{1,0} slice(%p), slice={[0:8], [48:64]}
  %a = f32[8,16]{1,0} add(%s, %s.clone)
  ROOT %r = f32[8,16]{1,0} multiply(%a, %t)"""
    assert fused(body) == 4 * (2 * 128 + 128)


def test_an_operand_that_is_sliced_and_taken_whole_counts_whole():
    body = """  %p = f32[8,64]{1,0} parameter(0)
  %z = f32[] constant(0)
  %s = f32[8,1]{1,0} slice(%p), slice={[0:8], [0:1]}
  %b = f32[8]{0} bitcast(%s)
  %sum = f32[8]{0} reduce(%p, %z), dimensions={1}, to_apply=%add
  ROOT %r = f32[8]{0} add(%b, %sum)"""
    assert fused(body) == 4 * (512 + 8)


def test_a_fusion_of_several_results_reads_once_and_writes_each():
    body = """  %p = bf16[64,128]{1,0} parameter(0)
  %q = f32[128]{0} parameter(1)
  %c = f32[64,128]{1,0} convert(%p)
  %w = f32[64,128]{1,0} broadcast(%q), dimensions={1}
  %m = f32[64,128]{1,0} multiply(%c, %w)
  %z = f32[] constant(0)
  %sum = f32[64]{0} reduce(%m, %z), dimensions={1}, to_apply=%add
  ROOT %t = (f32[64,128]{1,0}, /*index=1*/f32[64]{0}) tuple(%m, %sum)"""
    assert fused(body) == 2 * 8192 + 4 * 128 + 4 * (8192 + 64)


def test_an_operand_that_is_passed_twice_is_read_once():
    body = """  %p = f32[64,64]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  ROOT %d = f32[64,64]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}"""
    assert fused(body) == 3 * 4 * 4096
    assert fused(body, operands="%operand0, %operand0") == 2 * 4 * 4096
    assert alone("f32[64]{0} multiply(%a, %a)", "f32[64]{0}") == 2 * 256


def test_constants_that_are_computed_are_only_written():
    assert fused("  %c = f32[] constant(0)\n  ROOT %b = f32[64,16]{1,0} broadcast(%c), dimensions={}") == 4096
    assert alone("s32[64]{0} iota(), iota_dimension=0") == 256


@pytest.mark.parametrize(
    ("line", "operands", "expected"),
    [
        ("f32[1000]{0} gather(%a, %b)", ("f32[8]{0}", "s32[1000,1]{1,0}"), 32 + 4000 + 4000),
        ("f32[2,8]{1,0} gather(%a, %b)", ("f32[100,8]{1,0}", "s32[2,1]{1,0}"), 64 + 8 + 64),
        ("f32[10]{0} pad(%a, %b), padding=1_1", ("f32[8]{0}", "f32[]"), 32 + 4 + 40),
        ("f32[24]{0} concatenate(%a, %b), dimensions={0}", ("f32[8]{0}", "f32[16]{0}"), 2 * 96),
        ("f32[8]{0} reduce(%a, %b), dimensions={0}", ("f32[4,8]{1,0}", "f32[]"), 128 + 4 + 32),
        ("f32[8]{0} reduce-window(%a, %b), window={size=8}", ("f32[8]{0}", "f32[]"), 32 + 4 + 32),
        ("(f32[8]{0}, s32[8]{0}) sort(%a, %b), dimensions={0}", ("f32[8]{0}", "s32[8]{0}"), 4 * 32),
        ("bf16[8,16]{0,1} copy(%a)", ("bf16[8,16]{1,0}",), 2 * 256),
        ("bf16[16,8]{0,1} bitcast(%a)", ("bf16[8,16]{1,0}",), 0),
        # local reads and writes of collectives, which hand their operands on when they only start
        ("f32[64]{0} all-reduce-start(%a)", ("f32[64]{0}",), 512),
        ("(f32[64]{0}, f32[8]{0}) all-reduce-start(%a, %b)", ("f32[64]{0}", "f32[8]{0}"), 2 * (256 + 32)),
        ("(f32[8]{0}, f32[64]{0}) all-gather-start(%a)", ("f32[8]{0}",), 32 + 256),
        ("((f32[64]{0}), f32[8]{0}, u32[]) reduce-scatter-start(%a)", ("f32[64]{0}",), 256 + 32),
        ("f32[64]{0} all-gather-done(%a)", ("(f32[8]{0}, f32[64]{0})",), 0),
        # scratch of a library is not a result
        (
            '(f32[8,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"',
            ("f32[8,8]{1,0}", "f32[8,8]{1,0}"),
            3 * 256,
        ),
        ('(f32[8]{0}, s8[64]{0}) custom-call(%a), custom_call_target="other"', ("f32[8]{0}",), 64 + 64),
    ],
)
def test_operations_on_their_own(line: str, operands: tuple[str, ...], expected: float):
    assert alone(line, *operands) == expected


# updates

CACHE = "  %cache = f32[100,64]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %zero = s32[] constant(0)\n"
UPDATE = "f32[100,64]{1,0} dynamic-update-slice(%cache, %row, %i, %zero)"
CACHE_BYTES, ROW_BYTES = 4 * 6400, 4 * 64


def test_an_update_in_place_is_seen_through_bitcasts():
    body = """  %cache = f32[100,1,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = bf16[1,64]{1,0} parameter(2)
  %c = f32[1,64]{1,0} convert(%row)
  %flat = f32[100,64]{1,0} bitcast(%cache)
  %d = f32[100,64]{1,0} dynamic-update-slice(%flat, %c, %i, %zero)
  ROOT %r = f32[100,1,64]{2,1,0} bitcast(%d)"""
    assert fused(body) == ROW_BYTES // 2 + 4 + ROW_BYTES


def test_an_update_may_read_the_slice_that_it_replaces():
    slice_ = "  %old = f32[1,64]{1,0} dynamic-slice(%cache, %i, %zero), dynamic_slice_sizes={1,64}\n"
    body = f"{CACHE}{slice_}  %row = f32[1,64]{{1,0}} negate(%old)\n  ROOT %r = {UPDATE}"
    assert fused(body) == 2 * ROW_BYTES + 4


def test_an_update_beside_a_reader_of_the_whole_array_makes_another():
    body = f"""{CACHE}  %f = f32[] constant(0)
  %sum = f32[64]{{0}} reduce(%cache, %f), dimensions={{0}}, to_apply=%add
  %row = f32[1,64]{{1,0}} bitcast(%sum)
  ROOT %r = {UPDATE}"""
    assert fused(body) == 2 * CACHE_BYTES + 4


def test_an_updated_array_that_is_computed_with_is_read():
    body = f"""{CACHE}  %row = f32[1,64]{{1,0}} parameter(2)
  %d = {UPDATE}
  ROOT %r = f32[100,64]{{1,0}} exponential(%d)"""
    # but for the row that is replaced
    assert fused(body) == (CACHE_BYTES - ROW_BYTES) + ROW_BYTES + 4 + CACHE_BYTES


def test_updates_are_in_place_where_all_results_are():
    both = f"""{CACHE}  %row = f32[1,64]{{1,0}} parameter(2)
  %cache.2 = f32[100,64]{{1,0}} parameter(3)
  %d = {UPDATE}
  %d.2 = {UPDATE.replace("%cache", "%cache.2")}
"""
    shapes = "(f32[100,64]{1,0}, f32[100,64]{1,0})"
    assert fused(f"{both}  ROOT %t = {shapes} tuple(%d, %d.2)") == 3 * ROW_BYTES + 4
    mixed = f"{both}  %e = f32[100,64]{{1,0}} exponential(%cache.2)\n  ROOT %t = {shapes} tuple(%d, %e)"
    assert fused(mixed) == 4 * CACHE_BYTES + 4


@pytest.mark.parametrize(("combine", "reads"), [("parameter(1)", 0), ("add(%old, %new)", 1)])
def test_a_scatter_reads_its_target_where_it_combines(combine: str, reads: int):
    name = "new" if combine == "parameter(1)" else "sum"
    new = "" if name == "new" else "  %new = f32[] parameter(1)\n"
    others = f"""%combine (old: f32[], new: f32[]) -> f32[] {{
  %old = f32[] parameter(0)
{new}  ROOT %{name} = f32[] {combine}
}}
"""
    body = """  %cache = f32[100,64]{1,0} parameter(0)
  %at = s32[3,1]{1,0} parameter(1)
  %rows = f32[3,64]{1,0} parameter(2)
  ROOT %s = f32[100,64]{1,0} scatter(%cache, %at, %rows), to_apply=%combine"""
    assert fused(body, others=others) == (2 + reads) * 3 * ROW_BYTES + 12


# any fusion


def random_fusion(seed: int, *, chain: bool) -> tuple[str, int, int]:
    """A fusion of one parameter; elements of it that the result depends on, and elements of the result.

    In a chain each operation takes the result before it, and none repeats elements or adds some.
    """
    rng = random.Random(seed)
    lines = ["  %v0 = f32[4,6]{1,0} parameter(0)", "  %zero = f32[] constant(0)"]
    # of each element of a value, which elements of the parameter it is made of, as bits
    values = [1 << np.arange(24).reshape(4, 6)]
    for _ in range(rng.randint(2, 7)):
        source = len(values) - 1 if chain else rng.randrange(len(values))
        x = values[source]
        kinds = ["slice", "transpose", "bitcast"] + ["reverse", "reduce"] * (x.ndim > 0)
        kinds += [] if chain else ["add", "broadcast"] + ["pad"] * (x.ndim > 0)
        kind, more, attribute = rng.choice(kinds), "", ""
        if kind == "slice":
            low = [rng.randrange(d) for d in x.shape]
            high = [rng.randint(start + 1, d) for start, d in zip(low, x.shape, strict=True)]
            ranges = list(zip(low, high, strict=True))
            attribute = f"slice={{{', '.join(f'[{start}:{stop}]' for start, stop in ranges)}}}"
            x = x[tuple(slice(*ends) for ends in ranges)]
        elif kind == "transpose":
            order = rng.sample(range(x.ndim), x.ndim)
            x, attribute = x.transpose(order), f"dimensions={{{','.join(map(str, order))}}}"
        elif kind == "bitcast":
            x = x.reshape(rng.choice([(x.size,), (1, *x.shape), x.shape[::-1]]))
        elif kind == "reverse":
            x, attribute = x[::-1], "dimensions={0}"
        elif kind == "reduce":
            x, more, attribute = np.bitwise_or.reduce(x), ", %zero", "dimensions={0}, to_apply=%add"
        elif kind == "broadcast":
            new = rng.randint(0, x.ndim)
            kept = ",".join(str(d) for d in range(x.ndim + 1) if d != new)
            x, attribute = np.stack([x] * 3, axis=new), f"dimensions={{{kept}}}"
        elif kind == "pad":
            attribute = "padding=" + "x".join(["1_0"] + ["0_0"] * (x.ndim - 1))
            x, more = np.concatenate([np.zeros_like(x[:1]), x]), ", %zero"
        else:
            other = rng.choice([n for n, y in enumerate(values) if y.shape == x.shape])
            x, more = x | values[other], f", %v{other}"
        dims = ",".join(map(str, x.shape))
        lines.append(f"  %v{len(values)} = f32[{dims}] {kind}(%v{source}{more}), {attribute}")
        values.append(np.asarray(x))
    lines[-1] = lines[-1].replace("  %", "  ROOT %", 1)
    made_of = int(np.bitwise_or.reduce(values[-1], axis=None))
    return "\n".join(lines), made_of.bit_count(), values[-1].size


@pytest.mark.parametrize("seed", range(50))
def test_no_fusion_counts_less_than_its_results_depend_on_and_none_more_than_all(seed: int):
    body, needed, written = random_fusion(seed, chain=False)
    assert 4 * needed - 1e-6 <= fused(body) - 4 * written <= 4 * 24 + 1e-6, body  # of rounding


@pytest.mark.parametrize("seed", range(50))
def test_a_chain_counts_exactly_what_its_result_depends_on(seed: int):
    body, needed, written = random_fusion(seed, chain=True)
    assert fused(body) == pytest.approx(4 * (needed + written)), body


# kernels and parts


def kernel(name: str, flops: float, count: float, scope: str = "experts") -> str:
    """A kernel's call, as XLA prints it."""
    cost = rf"{{\22qwen_moe_jax_cost\22: \22{{\\\22flops\\\22: {flops}, \\\22bytes\\\22: {count}}}\22}}"
    return (
        f'%{name} = f32[1000]{{0}} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(f)/{scope}/{name}/pallas_call"}}, '
        f'backend_config={{serialized_metadata = "{cost}"}}'
    )


TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_kernels_count_what_they_say_as_often_as_they_run():
    found = traffic(
        Module(f"""HloModule kernels

%body (p: f32[1000]) -> f32[1000] {{
  %p = f32[1000]{{0}} parameter(0)
  ROOT {kernel("inner", 10.0, 7.0)}
}}

%condition (q: f32[1000]) -> pred[] {{
  ROOT %q = f32[1000]{{0}} parameter(0)
}}

ENTRY %main (p: f32[1000]) -> f32[1000] {{
  %p = f32[1000]{{0}} parameter(0)
  {kernel("outer", 1.0, 5.0, "router")}
  ROOT %w = f32[1000]{{0}} while(%p), condition=%condition, body=%body, {TRIPS}
}}
""")
    )
    assert found.kernel_flops == 3 * 10 + 1
    assert found.by_part() == {"experts": 21, "router": 5}
    assert found.bytes == 26


def test_what_has_no_name_is_where_its_insides_or_its_operands_are():
    found = traffic(
        Module("""HloModule unnamed

%joined (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %neg = f32[10]{0} negate(%p), metadata={op_name="jit(f)/router/neg"}
  %exp = f32[10]{0} exponential(%neg), metadata={op_name="jit(f)/shared_expert/exp"}
  %abs = f32[10]{0} abs(%exp), metadata={op_name="jit(f)/abs"}
  ROOT %convert = bf16[10]{0} convert(%abs)
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %fusion = bf16[10]{0} fusion(%x), kind=kLoop, calls=%joined
  %sort = (f32[10]{0}, s32[10]{0}) sort(%x), metadata={op_name="jit(f)/sampling/sort"}
  %item = f32[10]{0} get-tuple-element(%sort), index=0
  %view = f32[2,5]{1,0} bitcast(%item)
  %copy = f32[2,5]{0,1} copy(%view)
  ROOT %nowhere = f32[10]{0} copy(%x)
}
""")
    )
    assert found.by_operation == {
        ("jit(f)/shared_expert/exp", "fusion"): 60,
        ("jit(f)/sampling/sort", "sort"): 120,
        ("jit(f)/sampling/sort", "copy"): 80,
        ("", "copy"): 80,
    }
    assert found.by_part() == {"sampling": 200, "other": 80, "shared_expert": 60}


def test_the_innermost_scope_is_the_part():
    assert part_of("jit(_decode)/while/body/shard_map/experts/router/add") == "router"
    assert part_of("jit(_decode)/my_experts/add") == "other"
    assert all(part_of(f"jit(f)/{part}/add") == part for part in PARTS)

"""Bytes that programs move, known exactly for small ones: compiled here, or as the GPU backend has them."""

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
from qwen_moe_jax.aot.traffic import Traffic, traffic

ROWS, WIDTH = 1000, 128
N, ROW = ROWS * WIDTH * 4, WIDTH * 4  # bytes of an array, and of a row of it

X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
A_ROW = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)

# What else a program moves: loop counters, indices and predicates, a few words each time. Arrays here have
# 512 bytes a row and 512,000 in all, so that none can hide in it.
WORDS = 200


def compiled(f: Callable[..., Any], *arguments: Any, **options: Any) -> Traffic:
    return traffic(Module(jax.jit(f, **options).lower(*arguments).compile().as_text() or ""))


def program(line: str, *operands: str, others: str = "") -> Traffic:
    """A program of one line, on operands %a, %b, ... of these types."""
    entry = "\n".join(f"  %{'abcdef'[n]} = {type_} parameter({n})" for n, type_ in enumerate(operands))
    return traffic(
        Module(f"HloModule one\n\n{others}\nENTRY %main () -> f32[] {{\n{entry}\n  ROOT %r = {line}\n}}\n")
    )


def fused(body: str, *, others: str = "", passed: str = "") -> float:
    """Bytes of a program that is a fusion, each of whose parameters is an operand of its own, or `passed`."""
    types = re.findall(r" = (\S+) parameter\(", body)
    result = re.search(r"ROOT %\S+ = (\(.*?\)|\S+) [a-z]", body)
    assert result is not None
    passed = passed or ", ".join(f"%{'abcdef'[n]}" for n in range(len(types)))
    line = f"{result.group(1)} fusion({passed}), kind=kLoop, calls=%fused"
    return program(line, *types, others=f"{others}\n%fused () -> f32[] {{\n{body}\n}}\n").bytes


# compiled here


def test_an_elementwise_operation_reads_its_operands_and_writes_its_result():
    assert compiled(lambda x, y: jnp.tanh(x) * y + 1, X, X).bytes == 3 * N


def test_a_donated_cache_updated_in_place_counts_the_update():
    def update(cache: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(cache, row[None], (at, 0))

    donated = compiled(update, X, A_ROW, INDEX, donate_argnums=0)
    assert donated.bytes == 2 * ROW + 4
    # one that is kept is copied first
    assert compiled(update, X, A_ROW, INDEX).bytes == donated.bytes + 2 * N


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


@pytest.mark.parametrize(("known", "times"), [(True, 7), (False, 1)])
def test_a_loop_counts_as_often_as_it_runs_and_once_if_that_is_not_known(known: bool, times: int):
    def looped(x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 7 if known else n, lambda _, x: jnp.sin(x) * 2, x)

    found = compiled(looped, X, INDEX, donate_argnums=0)
    assert found.bytes == pytest.approx(times * 2 * N, abs=WORDS)
    assert found.unknown_loops == (not known)


def test_a_cache_carried_through_a_loop_counts_the_rows_written_to_it():
    def looped(cache: jax.Array, row: jax.Array) -> jax.Array:
        def step(i: jax.Array, cache: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(cache, row[None], (i, 0))

        return lax.fori_loop(0, 7, step, cache)

    found = compiled(looped, X, A_ROW, donate_argnums=0)
    assert found.bytes - 7 * 2 * ROW == pytest.approx(2 * ROW, abs=2 * ROW + WORDS)  # the row may be copied


def test_of_a_conditional_the_branch_that_moves_more_counts():
    def choice(p: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.cond(p, lambda x, y: x + y, lambda x, y: x * 2, x, y)

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


def test_what_is_sliced_counts_as_the_slice_also_behind_arithmetic_and_views():
    body = """  %p = f32[8,64]{1,0} parameter(0)
  %e = f32[8,64]{1,0} exponential(%p)
  %b = u8[8,64,4]{2,1,0} bitcast(%e)
  ROOT %s = u8[8,16,4]{2,1,0} slice(%b), slice={[0:8], [16:32], [0:4]}"""
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
    assert fused(body, passed="%a, %a") == 2 * 4 * 4096
    assert program("f32[64]{0} multiply(%a, %a)", "f32[64]{0}").bytes == 2 * 256


def test_constants_that_are_computed_are_only_written():
    assert fused("  %c = f32[] constant(0)\n  ROOT %b = f32[64,16]{1,0} broadcast(%c), dimensions={}") == 4096
    assert program("s32[64]{0} iota(), iota_dimension=0").bytes == 256


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
        ('(f32[8]{0}, s8[64]{0}) custom-call(%a), custom_call_target="__cublas$gemm"', ("f32[8]{0}",), 64),
        ('(f32[8]{0}, s8[64]{0}) custom-call(%a), custom_call_target="other"', ("f32[8]{0}",), 64 + 64),
    ],
)
def test_operations_on_their_own(line: str, operands: tuple[str, ...], expected: float):
    assert program(line, *operands).bytes == expected


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


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (UPDATE.replace("%cache", "%cache.2"), 3 * ROW_BYTES + 4),
        # XLA writes all of all results where one is anything else
        (UPDATE.replace("%cache", "%cache.2").replace("%row", "%rows"), 4 * CACHE_BYTES + 4),
        (UPDATE.replace("%cache", "%made"), 3 * CACHE_BYTES + 4),
        ("f32[100,64]{1,0} exponential(%cache.2)", 4 * CACHE_BYTES + 4),
    ],
    ids=["an update", "of another size", "of an array made here", "no update"],
)
def test_updates_are_in_place_where_all_results_are(second: str, expected: float):
    body = f"""{CACHE}  %row = f32[1,64]{{1,0}} parameter(2)
  %rows = f32[2,64]{{1,0}} parameter(3)
  %cache.2 = f32[100,64]{{1,0}} parameter(4)
  %f = f32[] constant(0)
  %made = f32[100,64]{{1,0}} broadcast(%f), dimensions={{}}
  %first = {UPDATE}
  %second = {second}
  ROOT %t = (f32[100,64]{{1,0}}, f32[100,64]{{1,0}}) tuple(%first, %second)"""
    assert fused(body) == expected


@pytest.mark.parametrize(
    ("combined", "reads"),
    [
        ("ROOT %new = f32[] parameter(1)", 0),
        ("%new = f32[] parameter(1)\n  ROOT %sum = f32[] add(%old, %new)", 1),
    ],
)
def test_a_scatter_reads_its_target_where_it_combines(combined: str, reads: int):
    others = f"%combine () -> f32[] {{\n  %old = f32[] parameter(0)\n  {combined}\n}}\n"
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
        kinds += [] if chain else ["add", "broadcast"] + ["pad", "sort"] * (x.ndim > 0)
        kind, more, attribute = rng.choice(kinds), "", ""
        if kind == "slice":
            low = [rng.randrange(d) for d in x.shape]
            high = [rng.randint(start + 1, d) for start, d in zip(low, x.shape, strict=True)]
            limits = ", ".join(f"[{start}:{stop}]" for start, stop in zip(low, high, strict=True))
            x, attribute = x[tuple(map(slice, low, high))], f"slice={{{limits}}}"
        elif kind == "transpose":
            order = rng.sample(range(x.ndim), x.ndim)
            x, attribute = x.transpose(order), f"dimensions={{{','.join(map(str, order))}}}"
        elif kind == "bitcast":
            x = x.reshape(rng.choice([(x.size,), (1, *x.shape), x.shape[::-1]]))
        elif kind == "reverse":
            x, attribute = x[::-1], "dimensions={0}"
        elif kind == "reduce":
            x, more, attribute = np.bitwise_or.reduce(x), ", %zero", "dimensions={0}, to_apply=%add"
        elif kind == "sort":
            x, attribute = np.broadcast_to(np.bitwise_or.reduce(x), x.shape), "dimensions={0}"
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
        type_ = f"f32[{','.join(map(str, x.shape))}]"
        lines.append(f"  %v{len(values)} = {type_} {kind}(%v{source}{more}), {attribute}")
        values.append(np.asarray(x))
    lines[-1] = lines[-1].replace("  %", "  ROOT %", 1)
    made_of = int(np.bitwise_or.reduce(values[-1], axis=None))
    return "\n".join(lines), made_of.bit_count(), values[-1].size


@pytest.mark.parametrize("seed", range(50))
def test_what_results_depend_on_is_counted_exactly_in_a_chain_and_never_less(seed: int):
    body, needed, written = random_fusion(seed, chain=True)
    assert fused(body) == pytest.approx(4 * (needed + written)), body
    body, needed, written = random_fusion(seed, chain=False)
    assert 4 * needed - 1e-6 <= fused(body) - 4 * written <= 4 * 24 + 1e-6, body  # of rounding


# kernels and parts


def test_kernels_count_what_they_say_as_often_as_they_run():
    cost = r"{\22qwen_moe_jax_cost\22: \22{\\\22flops\\\22: 10.0, \\\22bytes\\\22: 7.0}\22}"
    others = f"""%body () -> f32[1000] {{
  %p = f32[1000]{{0}} parameter(0)
  ROOT %k = f32[1000]{{0}} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton",\
 metadata={{op_name="jit(f)/experts/k/pallas_call"}}, backend_config={{serialized_metadata = "{cost}"}}
}}
"""
    loop = 'while(%a), body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    found = program(f"f32[1000]{{0}} {loop}", "f32[1000]{0}", others=others)
    assert (found.kernel_flops, found.by_part()) == (3 * 10, {"experts": 3 * 7})


def test_what_has_no_name_is_where_its_insides_or_its_operands_are():
    text = """HloModule unnamed

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
"""
    found = traffic(Module(text))
    assert found.by_operation == {
        ("jit(f)/shared_expert/exp", "fusion"): 60,
        ("jit(f)/sampling/sort", "sort"): 120,
        ("jit(f)/sampling/sort", "copy"): 80,
        ("", "copy"): 80,
    }
    assert found.by_part() == {"sampling": 200, "other": 80, "shared_expert": 60}

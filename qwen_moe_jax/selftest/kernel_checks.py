"""Every kernel of `kernels/` against plain XLA, on random inputs.

Plain XLA runs on the host's processor, where it is tested against the reference: a compiler that gets it
wrong on the device must not agree with itself. Kernels are compiled where the table has them, in the dtypes
that it has them for, also in the sizes of released models; elsewhere they are interpreted, in small sizes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwen_moe_jax.formats.cache import PAGE, pages_for
from qwen_moe_jax.formats.codes import MatrixFormat, widened
from qwen_moe_jax.kernels import delta_chunks as chunks_kernel
from qwen_moe_jax.kernels import delta_step as delta_kernel
from qwen_moe_jax.kernels import experts as expert_kernels
from qwen_moe_jax.kernels import flash_attention, float8x8_matmul, scaled_matmul
from qwen_moe_jax.kernels.table import AMD, Kernels
from qwen_moe_jax.model.attention import blockwise_attention
from qwen_moe_jax.model.delta_net import split_heads
from qwen_moe_jax.model.delta_rule import delta_rule_scan
from qwen_moe_jax.model.experts import dense_experts
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.norms import L2_EPS
from qwen_moe_jax.selftest.coded import FLOAT8, FORMATS, in_codes, multiplied_out
from qwen_moe_jax.selftest.machine import how_kernels_run
from qwen_moe_jax.selftest.report import Outcome, sentence

# Largest difference over the largest value. float32: sums of at most some hundred products in another order.
FLOAT32_TOLERANCE = 1e-5
# bfloat16: gate, up, the activation and the output of an expert are rounded, to either of two neighbours
# (2^-8) where a sum is near their middle, and some slots are added up: 3 x 2^-8 at most on CPU, twice that
# for other exponentials. Of the largest slot; one that is missing or another expert's is at 1.
EXPERTS_TOLERANCE = 6 * 2.0**-8
# Weights of an average are rounded to bfloat16 before it, and what comes out once; the plain form, in
# float32, rounds neither.
ATTENTION_TOLERANCE = 2.0**-7
# Both accumulate in float32; up to 2048 products in the sizes of released models.
SCALED_TOLERANCE = 1e-5

# How float8_e4m3fn becomes a number, by target: in plain XLA, and inside kernels. The other ways are emulated
# there, or do not compile.
WIDENINGS = {
    "cpu": (("bits", "native", "fnuz"), ("bits", "native")),
    "gfx942": (("fnuz", "bits"), ("bits",)),
    "gfx950": (("native", "bits"), ("native", "bits")),
    "gpu": (("bits", "native"), ("bits", "native")),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: of it.
        run: gives the kernel's result, what it has to be, and the size that a difference is measured by.
        tolerance: for the largest difference over that size.
    """

    name: str
    run: Callable[[], tuple[Any, Any, float]]
    tolerance: float


def compare(cases: Sequence[Case], how: str) -> Outcome:
    """Runs all cases, also behind one that raises."""
    found, worst = [], 0.0
    for case in cases:
        entry: dict[str, Any] = {"case": case.name, "tolerance": case.tolerance}
        try:
            result, wanted, size = case.run()
            result, wanted = np.asarray(result, np.float64), np.asarray(wanted, np.float64)
            entry["difference"] = float(np.abs(result - wanted).max()) / size
            entry["ok"] = bool(entry["difference"] <= case.tolerance)  # a NaN is not
            if case.tolerance:
                worst = float(np.maximum(worst, entry["difference"] / case.tolerance))
        except Exception as error:  # one shape that does not compile says nothing of the others
            entry |= {"ok": False, "error": sentence(error)}
        found.append(entry)
    bad = [entry for entry in found if not entry["ok"]]
    agree = f"{len(cases) - len(bad)} of {len(cases)} cases agree"
    summary = f"{how}, {agree}, largest difference {worst:.2g} of what is tolerated"
    if bad:
        why = bad[0].get("error") or f"differs by {bad[0]['difference']:.1e}"
        summary += f"; {bad[0]['case']}: {why}"
    return Outcome(ok=not bad, summary=summary, details={"kernels": how, "cases": found})


def on_device(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives on JAX's default device, compiled.

    float32 means float32, also in an interpreted kernel's products; NVIDIA GPUs have a coarser mode for them.
    """
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*arguments)


def on_host(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same on the host's processor; where JAX was told to leave that alone, on the device."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return on_device(function, *arguments)
    with jax.default_device(host):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def _dtypes(target: str, *, both: bool) -> tuple[str, ...]:
    """That a case runs in. The table has them for bfloat16 only; interpreted, float32 sees more."""
    if target in AMD:
        return ("bfloat16",)
    return ("bfloat16", "float32") if both else ("float32",)


def experts(form: str, target: str) -> Outcome:
    """`gathered_kernels` or `grouped_kernels` against every expert on every token.

    Args:
        form: "gathered" or "grouped".
        target: what programs are compiled for.
    """
    cases = []
    # tokens, top_k, experts, hidden, intermediate
    odd = (37, 2, 3, 130, 70) if form == "grouped" else (5, 3, 7, 48, 40)
    wholes = {
        "one token": _routed((1, 2, 4, 64, 32)),
        "odd sizes, pads": _routed(odd, pads=True),
        "most experts without a slot": _routed((19, 1, 64, 17, 9), pads=True),
        "one expert has every slot": _routed((41, 2, 5, 32, 24), expert=3),
        "no slot has an expert": _routed((9, 2, 5, 32, 24), expert=5),
    }
    if target in AMD:
        tokens = 96 if form == "grouped" else 4
        wholes["as in 35B"] = _routed((tokens, 8, 32, 2048, 512), pads=True)
    for name, given in wholes.items():
        for dtype in _dtypes(target, both=name.startswith("odd")):
            cases.append(_expert_case(form, target, f"{name}, {dtype}", given, dtype))
    sizes = (21, 2, 4, 512, 384) if target in AMD else (21, 2, 4, 160, 140)
    given = _routed(sizes, pads=True)
    for widening in WIDENINGS[target][1]:
        name = f"{FLOAT8} by {widening}"
        cases.append(_expert_case(form, target, name, given, "bfloat16", FLOAT8, widening))
    for name in FORMATS:
        if name != FLOAT8:
            cases.append(_expert_case(form, target, name, given, "bfloat16", name))
    return compare(cases, how_kernels_run(target))


def _routed(
    shape: tuple[int, ...], *, pads: bool = False, expert: int | None = None
) -> dict[str, np.ndarray]:
    """Random inputs; with pads about a fifth of the slots have no expert."""
    tokens, top_k, count, hidden, inner = shape
    rng = np.random.default_rng(shape)
    ids = rng.integers(0, count + (count // 4 + 1 if pads else 0), (tokens, top_k)).clip(0, count)
    return {
        "x": rng.normal(size=(tokens, hidden)),
        "expert_ids": ids if expert is None else np.full_like(ids, expert),
        "weights": rng.dirichlet(np.ones(top_k), tokens),
        "gate_up": rng.normal(size=(count, 2 * inner, hidden)) * 2 * hidden**-0.5,
        "down": rng.normal(size=(count, hidden, inner)) * inner**-0.5,
    }


def _expert_case(
    form: str,
    target: str,
    name: str,
    given: dict[str, np.ndarray],
    dtype: str,
    stored_as: str | None = None,
    widening: str | None = None,
) -> Case:
    def run() -> tuple[Any, Any, float]:
        arrays = {
            key: value.astype({"expert_ids": np.int32, "weights": np.float32}.get(key, jnp.dtype(dtype)))
            for key, value in given.items()
        }
        stored: dict[str, Any] = dict(arrays)
        plain: dict[str, Any] = dict(arrays)
        if stored_as is not None:
            for key in ("gate_up", "down"):
                stored[key] = in_codes(arrays[key], FORMATS[stored_as], target)
                plain[key] = multiplied_out(stored[key])
        kernel = {"gathered": expert_kernels.gathered_kernels, "grouped": expert_kernels.grouped_kernels}[
            form
        ]
        options = {
            "chance": 0.1,
            "widening": widening or Kernels(target).kernel_widening,
            "interpret": target not in AMD,
        }
        found = on_device(lambda given: kernel(**given, **options), stored)
        slots = on_host(lambda given: dense_experts(**given, by_slot=True), plain)
        return found, slots.sum(axis=1), max(float(np.abs(slots).max()), 1e-3)

    return Case(name, run, FLOAT32_TOLERANCE if dtype == "float32" else EXPERTS_TOLERANCE)


def attention(target: str) -> Outcome:
    """`attend`, which chooses its tiles itself, against attention over blocks of keys in float32."""
    # batch, queries, heads, kv heads, head_dim, capacity
    shapes = [(3, 1, 4, 2, 32, 70), (2, 5, 6, 2, 24, 100), (1, 40, 4, 1, 64, 130), (2, 1, 3, 3, 16, 1)]
    if target in AMD:
        shapes += [(4, 1, 16, 2, 256, 4096), (1, 200, 16, 2, 256, 1024)]
    cases = []
    for shape in shapes:
        for dtype in _dtypes(target, both=shape == shapes[0]):
            tolerance = FLOAT32_TOLERANCE if dtype == "float32" else ATTENTION_TOLERANCE
            cases.append(
                Case(f"{shape}, {dtype}", _attention_run(shape, dtype, target not in AMD), tolerance)
            )
    return compare(cases, how_kernels_run(target))


def _attention_run(
    shape: tuple[int, ...], dtype: str, interpret: bool
) -> Callable[[], tuple[Any, Any, float]]:
    def run() -> tuple[Any, Any, float]:
        batch, seq, heads, kv_heads, dim, capacity = shape
        rng = np.random.default_rng(shape)
        query, key, value = (
            rng.normal(size=size).astype(jnp.dtype(dtype))
            for size in ((batch, seq, heads, dim), *[(batch, capacity, kv_heads, dim)] * 2)
        )
        start = rng.integers(0, capacity - seq + 1, (batch, 1))
        positions = (start + np.arange(seq)).astype(np.int32)
        # every row's keys in pages, which lie in any order
        width = pages_for(capacity)
        tables = rng.permutation(batch * width).reshape(batch, width).astype(np.int32)
        pools = []
        for x in (key, value):
            pool = np.zeros((batch * width, PAGE, kv_heads, dim), x.dtype)
            padded = np.pad(x, ((0, 0), (0, width * PAGE - capacity), (0, 0), (0, 0)))
            pool[tables.ravel()] = padded.reshape(pool.shape)
            pools.append(pool)
        given = (query, *pools, positions, tables)
        found = on_device(lambda *given: flash_attention.attend(*given, interpret=interpret), *given)
        wide = (x.astype(np.float32) for x in (query, *pools))
        wanted = on_host(blockwise_attention, *wide, positions, tables)
        return found, wanted, float(np.abs(wanted).max())

    return run


def delta_step(target: str) -> Outcome:
    """A few tokens of the delta rule as a kernel against the plain scan; float32 everywhere."""
    # batch, tokens, value heads, key heads, Dk, Dv
    shapes = [(1, 1, 8, 2, 128, 128), (3, 4, 4, 4, 24, 40), (2, 1, 6, 1, 16, 5), (5, 2, 2, 1, 7, 64)]
    shapes += [(8, 1, 32, 16, 128, 128), (8, 4, 32, 16, 128, 128)] if target in AMD else []
    cases = [Case(str(shape), _delta_run(shape, target not in AMD), FLOAT32_TOLERANCE) for shape in shapes]
    return compare(cases, how_kernels_run(target))


def _delta_run(shape: tuple[int, ...], interpret: bool) -> Callable[[], tuple[Any, Any, float]]:
    def run() -> tuple[Any, Any, float]:
        batch, tokens, heads, key_heads, key_dim, value_dim = shape
        rng = np.random.default_rng(shape)

        def normal(*size: int) -> np.ndarray:
            return rng.normal(size=size).astype(np.float32)

        given = {
            "state": normal(batch, heads, key_dim, value_dim),
            "query": normal(batch, tokens, key_heads, key_dim) * np.float32(key_dim**-0.5),
            "key": normal(batch, tokens, key_heads, key_dim) * np.float32(key_dim**-0.5),
            "value": normal(batch, tokens, heads, value_dim),
            "g": -rng.exponential(size=(batch, tokens, heads)).astype(np.float32),
            "beta": rng.uniform(size=(batch, tokens, heads)).astype(np.float32),
        }
        slots = rng.permutation(batch).astype(np.int32)
        stored = given | {"state": given["state"][np.argsort(slots)]}  # row r's state at slots[r]
        output, after = on_device(
            lambda given, slots: delta_kernel.delta_step(slots=slots, **given, interpret=interpret),
            stored,
            slots,
        )
        found = (output, np.asarray(after)[slots])
        wanted = on_host(lambda given: delta_rule_scan(**given), given)
        return *_joined(found, wanted), 1.0

    return run


def delta_chunks(target: str) -> Outcome:
    """Many tokens of the delta rule as a kernel against the plain scan; float32 everywhere."""
    # batch, tokens, value heads, key heads, Dk, Dv
    shapes = [(1, 40, 4, 2, 128, 128), (3, 17, 2, 2, 24, 40), (2, 33, 6, 1, 16, 5)]
    shapes += [(2, 500, 32, 16, 128, 128), (64, 100, 32, 16, 128, 128)] if target in AMD else []
    cases = [Case(str(shape), _chunks_run(shape, target not in AMD), FLOAT32_TOLERANCE) for shape in shapes]
    return compare(cases, how_kernels_run(target))


def _chunks_run(shape: tuple[int, ...], interpret: bool) -> Callable[[], tuple[Any, Any, float]]:
    def run() -> tuple[Any, Any, float]:
        batch, tokens, heads, key_heads, key_dim, value_dim = shape
        rng = np.random.default_rng(shape)
        counts = rng.integers(1, tokens + 1, batch).astype(np.int32)
        token = (np.arange(tokens) < counts[:, None])[..., None]
        channels = 2 * key_heads * key_dim + heads * value_dim
        mixed = rng.normal(size=(batch, tokens, channels)).astype(np.float32)
        state = rng.normal(size=(batch, heads, key_dim, value_dim)).astype(np.float32)
        gates = {
            "g": np.where(token, -rng.exponential(size=(batch, tokens, heads)), 0).astype(np.float32),
            "beta": np.where(token, rng.uniform(size=(batch, tokens, heads)), 0).astype(np.float32),
        }
        slots = rng.permutation(batch).astype(np.int32)
        given = {"state": state[np.argsort(slots)], "mixed": mixed, "slots": slots, "counts": counts, **gates}
        output, after = on_device(
            lambda given: chunks_kernel.delta_chunks(**given, eps=L2_EPS, interpret=interpret), given
        )

        def plain(mixed: Any, counts: Any, state: Any, gates: dict[str, Any]) -> Any:
            sizes = {"key_dim": key_dim, "heads": heads, "value_dim": value_dim}
            return delta_rule_scan(*split_heads(mixed, counts, **sizes), **gates, state=state)

        wanted = on_host(plain, mixed, counts, state, gates)
        # a pad's output means nothing
        found, wanted = (
            (np.where(token[..., None], output, 0), states)
            for output, states in ((np.asarray(output), np.asarray(after)[slots]), wanted)
        )
        return *_joined(found, wanted), 1.0

    return run


def _joined(found: Sequence[Any], wanted: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All elements of both, each array over the largest value of what is wanted: output and state have sizes
    of their own."""
    sizes = [float(np.abs(x).max()) for x in wanted]
    first, second = (
        np.concatenate([np.asarray(x).ravel() / size for x, size in zip(arrays, sizes, strict=True)])
        for arrays in (found, wanted)
    )
    return first, second


def scaled(target: str) -> Outcome:
    """Every finite float8 code as plain XLA widens it here, and products with one matrix in codes."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    codes = codes[np.isfinite(codes.astype(np.float32))]
    exact = codes.astype(np.float32)
    cases = [
        Case(
            f"all codes by {way}",
            lambda way=way: (on_device(lambda codes: widened(codes, way), codes), exact, 1.0),
            0.0,
        )
        for way in WIDENINGS[target][0]
    ]
    sizes = [(1, 200, 90), (33, 200, 90)] + ([(16, 2048, 1024)] if target in AMD else [])
    for size in sizes:
        tokens, inner, out = size
        named = f"{tokens} tokens, [{out}, {inner}]"
        for name, form in FORMATS.items():
            cases.append(Case(f"{name}, {named}", _scaled_run(size, form, target), SCALED_TOLERANCE))
        run = _float8x8_run(size, target)
        cases.append(Case(f"float8 times float8, {named}", run, SCALED_TOLERANCE))
    return compare(cases, how_kernels_run(target))


def _scaled_run(
    size: tuple[int, int, int], form: MatrixFormat, target: str
) -> Callable[[], tuple[Any, Any, float]]:
    def run() -> tuple[Any, Any, float]:
        tokens, inner, out = size
        rng = np.random.default_rng(size)
        x = rng.normal(size=(tokens, inner)).astype(ml_dtypes.bfloat16)
        matrix = in_codes(rng.normal(size=(out, inner)), form, target)
        options = {"widening": Kernels(target).kernel_widening, "interpret": target not in AMD}
        found = on_device(lambda x, m: scaled_matmul.scaled_matmul(x, m, jnp.float32, **options), x, matrix)
        plain = multiplied_out(matrix)
        if form.block[1] < 64:  # blocks narrower than a step: what is multiplied is rounded
            plain = plain.astype(ml_dtypes.bfloat16)
        wanted = on_host(lambda x, m: linear(x, m, jnp.float32), x, plain)
        return found, wanted, float(np.abs(wanted).max())

    return run


def _float8x8_run(size: tuple[int, int, int], target: str) -> Callable[[], tuple[Any, Any, float]]:
    """Activations that are 8-bit floats already, times a power of two a block: a quotient is then never near
    the middle between two, where it would become either, as divisions round."""

    def run() -> tuple[Any, Any, float]:
        tokens, inner, out = size
        rng = np.random.default_rng(size)
        numbers = rng.normal(size=(tokens, inner)) * 100
        numbers[:, ::128] = -448  # each block's largest
        powers = 2.0 ** rng.integers(-8, 4, (tokens, -(-inner // 128))).repeat(128, axis=1)[:, :inner]
        x = numbers.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * powers
        x = x.astype(ml_dtypes.bfloat16)  # exact
        matrix = in_codes(rng.normal(size=(out, inner)), FORMATS[FLOAT8], target)
        options = {"float8": Kernels(target).float8, "interpret": target not in AMD}
        found = on_device(
            lambda x, m: float8x8_matmul.float8x8_matmul(x, m, jnp.float32, **options), x, matrix
        )
        wanted = x.astype(np.float64) @ multiplied_out(matrix).astype(np.float64).T
        return found, wanted, float(np.abs(wanted).max())

    return run

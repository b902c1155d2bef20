"""Every Pallas kernel of this library beside plain XLA on one GPU: time, and share of what the card can do.

For `gpu.py`. Errors are `qwen_moe_jax.selftest.kernel_checks`' business; here are times, in the sizes of the
35B (tiny ones in a rehearsal, where kernels are interpreted). Bytes and FLOPs are the least that the
operation needs: what a kernel reads twice does not count for it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.cache import PAGE
from qwen_moe_jax.kernels import delta_step as delta_kernel
from qwen_moe_jax.kernels import experts as expert_kernels
from qwen_moe_jax.kernels import flash_attention, scaled_matmul
from qwen_moe_jax.kernels.combine import combine_slots
from qwen_moe_jax.kernels.delta_chunks import delta_chunks
from qwen_moe_jax.kernels.table import AMD
from qwen_moe_jax.model.attention import blockwise_attention
from qwen_moe_jax.model.delta_net import split_heads
from qwen_moe_jax.model.delta_rule import delta_rule_chunked, delta_rule_scan
from qwen_moe_jax.model.experts import gathered_experts, grouped_experts
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.norms import L2_EPS
from qwen_moe_jax.selftest.measure import seconds_a_call
from qwen_moe_jax.selftest.report import sentence

# Of the 35B: hidden, intermediate, experts and top-k; heads, kv heads, head_dim; of the delta rule value
# heads, key heads and head_dim; a matrix of Gated DeltaNet.
EXPERTS, HEADS, DELTA, MATRIX = (2048, 512, 256, 8), (16, 2, 256), (32, 16, 128), (8192, 2048)
TINY_EXPERTS, TINY_HEADS, TINY_DELTA, TINY_MATRIX = (64, 32, 8, 2), (4, 2, 32), (4, 2, 16), (96, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation in one size.

    Attributes:
        name: of the kernel.
        size: in words.
        kernel, plain: functions of `arguments`.
        arguments: arrays.
        bytes, flops: the least.
        carried: the second result takes over the first argument's memory, and is the next call's.
    """

    name: str
    size: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes: float
    flops: float
    carried: bool = False


def kernel_target(target: str) -> str:
    """What kernels are compiled as: any GPU takes those of gfx950, where Triton lowers them."""
    return target if target in (*AMD, "cpu") else "gfx950"


def cases(target: str, rehearse: bool) -> Iterator[Case]:
    """All of them, made one at a time so that one's arrays are in memory.

    Args:
        target: as of `kernel_target`.
        rehearse: tiny sizes, interpreted.
    """
    interpret = target not in AMD
    widening = "native" if target == "gfx950" else "bits"
    yield from _experts(rehearse, interpret)
    yield from _attention(rehearse, interpret)
    yield from _combine(rehearse, interpret)
    yield from _delta_step(rehearse, interpret)
    yield from _delta_chunks(rehearse, interpret)
    yield from _float8(rehearse, interpret, widening)


def measure(case: Case, bandwidth: float | None, peak: float | None) -> dict[str, Any]:
    """Times one case.

    Args:
        case: of `cases`.
        bandwidth: bytes a second of the card, None if unknown.
        peak: FLOP/s of its matrix units in bfloat16, None if unknown.

    Returns:
        A row of the table; what raised has its sentence instead of a time.
    """
    row: dict[str, Any] = {"kernel": case.name, "size": case.size, "bytes": case.bytes, "flops": case.flops}
    for name, function in (("seconds", case.kernel), ("plain_seconds", case.plain)):
        try:
            row[name] = seconds_a_call(_call(function, case))
        except Exception as error:  # one that does not lower here says nothing of the others
            row[f"{name}_error"] = sentence(error)
    if (seconds := row.get("seconds")) is not None:
        row["bytes_share"] = None if bandwidth is None else case.bytes / seconds / bandwidth
        row["flops_share"] = None if peak is None else case.flops / seconds / peak
    return row


def _call(function: Callable[..., Any], case: Case) -> Callable[[], Any]:
    """What runs it once."""
    if not case.carried:
        compiled = jax.jit(function)
        return lambda: compiled(*case.arguments)
    donating = jax.jit(function, donate_argnums=0)
    first, *rest = case.arguments
    held = jnp.copy(first)

    def call() -> Any:
        nonlocal held
        output, held = donating(held, *rest)
        return output

    return call


def _normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def _experts(rehearse: bool, interpret: bool) -> Iterator[Case]:
    hidden, inner, count, top_k = TINY_EXPERTS if rehearse else EXPERTS
    gate_up = _normal(1, count, 2 * inner, hidden) * hidden**-0.5
    down = _normal(2, count, hidden, inner) * inner**-0.5
    matrices = 3 * hidden * inner * 2  # bytes of an expert
    sizes = {"gathered": (1, 4), "grouped": (64, 4096)}
    if rehearse:
        sizes = {"gathered": (1,), "grouped": (16,)}
    plain = {"gathered": gathered_experts, "grouped": grouped_experts}
    kernels = {"gathered": expert_kernels.gathered_kernels, "grouped": expert_kernels.grouped_kernels}
    for form, tokens_of in sizes.items():
        for tokens in tokens_of:
            ids = np.random.default_rng(tokens).permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)
            ids = ids[:, :top_k].astype(np.int32)
            weights = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)
            options = {"chance": top_k / count, "widening": "bits", "interpret": interpret}
            yield Case(
                name=f"{form} experts",
                size=f"{tokens} tokens x {top_k} of {count}",
                kernel=lambda *given, form=form, options=options: kernels[form](*given, **options),
                plain=plain[form],
                arguments=(_normal(3, tokens, hidden), jnp.asarray(ids), weights, gate_up, down),
                bytes=len(np.unique(ids)) * matrices + 2 * tokens * hidden * 2,
                flops=2.0 * tokens * top_k * 3 * hidden * inner,
            )


def _attention(rehearse: bool, interpret: bool) -> Iterator[Case]:
    heads, kv_heads, dim = TINY_HEADS if rehearse else HEADS
    # rows, queries, keys of each row
    sizes = [(2, 1, 128), (1, 16, 64)] if rehearse else [(64, 1, 8192), (1, 2048, 4096)]
    for rows, queries, keys in sizes:
        pages = keys // PAGE
        pool = _normal(4, rows * pages, PAGE, kv_heads, dim), _normal(5, rows * pages, PAGE, kv_heads, dim)
        tables = np.random.default_rng(keys).permutation(rows * pages).reshape(rows, pages).astype(np.int32)
        positions = np.tile(np.arange(keys - queries, keys, dtype=np.int32), (rows, 1))
        pairs = rows * sum(range(keys - queries + 1, keys + 1))
        yield Case(
            name="flash attention",
            size=f"{rows} rows x {queries} queries, {keys} keys",
            kernel=lambda *given: flash_attention.attend(*given, interpret=interpret),
            plain=blockwise_attention,
            arguments=(
                _normal(6, rows, queries, heads, dim),
                *pool,
                jnp.asarray(positions),
                jnp.asarray(tables),
            ),
            bytes=2.0 * (2 * rows * keys * kv_heads * dim + 2 * rows * queries * heads * dim),
            flops=4.0 * pairs * heads * dim,
        )


def _combine(rehearse: bool, interpret: bool) -> Iterator[Case]:
    hidden, _, experts, top_k = TINY_EXPERTS if rehearse else EXPERTS
    tokens, held = (16, experts // 2) if rehearse else (4096, experts // 8)
    outputs = _normal(14, tokens * top_k, hidden)
    ids = jax.random.randint(jax.random.key(15), (tokens, top_k), 0, experts).astype(jnp.int32)
    slots = tokens * top_k * held / experts

    def kernel(outputs: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return combine_slots(outputs, ids, weights, held, expected_slots=slots, interpret=interpret)

    def plain(outputs: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        weighted = outputs.reshape(*ids.shape, -1).astype(jnp.float32) * weights[..., None]
        return jnp.where((ids < held)[..., None], weighted, 0).sum(axis=1).astype(outputs.dtype)

    yield Case(
        name="combine",
        size=f"{tokens} tokens, {top_k} slots, {held} of {experts} experts",
        kernel=kernel,
        plain=plain,
        arguments=(outputs, ids, jnp.full(ids.shape, 1 / top_k)),
        bytes=2.0 * hidden * (slots + tokens),
        flops=2.0 * slots * hidden,
    )


def _delta_chunks(rehearse: bool, interpret: bool) -> Iterator[Case]:
    heads, key_heads, dim = TINY_DELTA if rehearse else DELTA
    for rows, tokens in [(1, 32)] if rehearse else [(1, 4096), (8, 1024)]:
        state = jax.random.normal(jax.random.key(16), (rows, heads, dim, dim), jnp.float32)
        mixed = _normal(17, rows, tokens, (2 * key_heads + heads) * dim)
        g, beta = jnp.full((rows, tokens, heads), -0.1), jnp.full((rows, tokens, heads), 0.5)
        slots, counts = jnp.arange(rows, dtype=jnp.int32), jnp.full(rows, tokens, jnp.int32)

        def plain(
            state: jax.Array, slots: jax.Array, mixed: jax.Array, counts: jax.Array, *gates: jax.Array
        ) -> Any:
            sizes = {"key_dim": state.shape[2], "heads": state.shape[1], "value_dim": state.shape[3]}
            return delta_rule_chunked(*split_heads(mixed, counts, **sizes), *gates, state=state)

        yield Case(
            name="delta chunks",
            size=f"{rows} rows of {tokens} tokens, {heads} heads of {dim} x {dim}",
            kernel=lambda *given: delta_chunks(*given, eps=L2_EPS, interpret=interpret),
            plain=plain,
            arguments=(state, slots, mixed, counts, g, beta),
            bytes=2.0 * 4 * state.size + 2.0 * (mixed.size + rows * tokens * heads * dim) + 8.0 * g.size,
            flops=7.0 * rows * tokens * heads * dim * dim,
            carried=True,
        )


def _delta_step(rehearse: bool, interpret: bool) -> Iterator[Case]:
    heads, key_heads, dim = TINY_DELTA if rehearse else DELTA
    for rows in (2,) if rehearse else (1, 64):
        state = jax.random.normal(jax.random.key(7), (rows, heads, dim, dim), jnp.float32)
        query, key = (
            dim**-0.5 * jax.random.normal(jax.random.key(n), (rows, 1, key_heads, dim), jnp.float32)
            for n in (8, 9)
        )
        value = jax.random.normal(jax.random.key(10), (rows, 1, heads, dim), jnp.float32)
        g, beta = jnp.full((rows, 1, heads), -0.1), jnp.full((rows, 1, heads), 0.5)
        slots = jnp.arange(rows, dtype=jnp.int32)

        def kernel(state: jax.Array, slots: jax.Array, *given: jax.Array) -> Any:
            return delta_kernel.delta_step(state, slots, *given, interpret=interpret)

        def plain(state: jax.Array, slots: jax.Array, *given: jax.Array) -> Any:
            return delta_rule_scan(*given, state=state)

        yield Case(
            name="delta step",
            size=f"{rows} rows, {heads} heads of {dim} x {dim}",
            kernel=kernel,
            plain=plain,
            arguments=(state, slots, query, key, value, g, beta),
            bytes=2.0 * 4 * state.size,
            flops=7.0 * state.size,
            carried=True,
        )


def _float8(rehearse: bool, interpret: bool, widening: str) -> Iterator[Case]:
    rows, columns = TINY_MATRIX if rehearse else MATRIX
    values = np.clip(np.random.default_rng(0).normal(size=(rows, columns)) * 64, -448, 448)
    scales = np.ones((-(-rows // 128), -(-columns // 128)), np.float32) / 64
    matrix = BlockScaled(
        jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn)),
        jnp.asarray(scales),
        (128, 128),
        jnp.dtype("bfloat16"),
        widening,
    )
    for tokens in (4,) if rehearse else (1, 64):
        yield Case(
            name="float8 product",
            size=f"{tokens} tokens, [{rows}, {columns}]",
            kernel=lambda x, m: scaled_matmul.scaled_matmul(
                x, m, jnp.bfloat16, widening=widening, interpret=interpret
            ),
            plain=lambda x, m: linear(x, m, jnp.bfloat16),
            arguments=(_normal(11, tokens, columns), matrix),
            bytes=float(rows * columns + 2 * tokens * (rows + columns)),
            flops=2.0 * tokens * rows * columns,
        )

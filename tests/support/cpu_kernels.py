"""Random cases for the C++ kernels, and what plain XLA makes of them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.cache import KVCache
from qwen_moe_jax.formats.codes import CODES, MatrixFormat
from qwen_moe_jax.kernels.cpu.calls import (
    native_attention,
    native_conv,
    native_delta_chunks,
    native_delta_look,
    native_delta_step,
    native_experts,
    native_linears,
)
from qwen_moe_jax.model.attention import append_keys, blockwise_attention
from qwen_moe_jax.model.delta_net import conv_heads, read_slots
from qwen_moe_jax.model.delta_rule import delta_rule_chunked, delta_rule_scan
from support.delta_oracle import delta_inputs, delta_oracle
from support.paging import in_pages
from support.routed import routed_inputs

BFLOAT16, FLOAT32 = "bfloat16", "float32"
EPS = {FLOAT32: 2.0**-24, BFLOAT16: 2.0**-8}  # half a unit in the last place, or a whole one where two round

# Numbers of tokens on both sides of every border between ways, groups of tokens, and panels of rows; depths
# around vectors, tiles and steps; a single row and column.
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 50, 100, 513)
ROWS = (1, 2, 31, 32, 33, 63, 64, 100)
DEPTHS = (1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 1023, 1056)


# Blocks of codes: groups of formats that are released, one a row, blocks of float8, granules (what a slice of
# a matrix has where it cuts blocks), and some that fit no vector.
BLOCKS = (
    (1, 32),
    (1, 64),
    (1, 128),
    (1, 10**6),
    (128, 128),
    (1, 16),
    (1, 96),
    (64, 64),
    (2, 1024),
    (3, 6),
    (7, 5),
)
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def draw_codes(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    codes: str,
    block: tuple[int, int],
    scale_dtype: str = FLOAT32,
    zeros: bool = False,
) -> BlockScaled:
    """Any codes; numbers of order one over the root of the depth. Of four bits, the depth is even."""
    form = MatrixFormat(codes, (block[0], min(block[1], shape[-1])), scale_dtype, zeros)
    values = rng.integers(0, 256, form.values_shape(shape), np.uint8)
    if codes == "e4m3":
        values = np.where((values & 0x7F) == 0x7F, 0, values).view(jnp.float8_e4m3fn)
    typical = {"e4m3": 130, "int8": 74, "int4": 4.6, "e2m1": 2.9}[codes] * shape[-1] ** 0.5
    scales = rng.uniform(0.5, 2, form.scales_shape(shape)) / typical
    if scale_dtype == "float8_e8m0fnu":
        scales = 2.0 ** np.round(np.log2(scales))
    points = rng.integers(0, 2 ** CODES[codes].bits, scales.shape, np.uint8)
    return BlockScaled(
        jnp.asarray(values),
        jnp.asarray(scales.astype(jnp.dtype(scale_dtype))),
        form.block,
        jnp.dtype(FLOAT32),
        "bits",
        codes,
        jnp.asarray(points) if zeros else None,
    )


def multiplied_out(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Float64, by NumPy: (the matrix, sizes of what the kernels add up to multiply with it).

    These take zero points off sums of codes, so that sizes are |code| + |zero point|; codes of e2m1 are read
    as 6 more than their numbers.
    """
    if not isinstance(matrix, BlockScaled):
        numbers = np.asarray(matrix).astype(np.float64)
        return numbers, np.abs(numbers)
    values = np.asarray(matrix.values)
    if matrix.codes in ("int4", "e2m1"):
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    codes = E2M1[values] if matrix.codes == "e2m1" else values.astype(np.float64)

    def spread(blocks: np.ndarray) -> np.ndarray:
        down, across = matrix.block
        wide = np.repeat(np.repeat(blocks.astype(np.float64), down, axis=-2), across, axis=-1)
        return wide[..., : codes.shape[-2], : codes.shape[-1]]

    scales = spread(np.asarray(matrix.scales))
    if matrix.codes == "e4m3":
        return codes * scales, np.abs(codes * scales)
    if matrix.codes == "e2m1":
        return codes * scales, (np.abs(codes + 6) + 6) * scales
    zero = {"int8": 128.0, "int4": 8.0}[matrix.codes]
    points = zero if matrix.zeros is None else spread(np.asarray(matrix.zeros))
    return (codes - points) * scales, (codes + points) * scales


def draw_matrix(rng: np.random.Generator, shape: tuple[int, ...], held: str) -> Matrix:
    """Of order one over the root of the depth; codes in blocks and with scales of any kind."""
    if held not in CODES:
        return jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, held)
    block, scales = BLOCKS[rng.integers(len(BLOCKS))], str(rng.choice(SCALE_DTYPES))
    return draw_codes(rng, shape, held, block, scales, held.startswith("int") and bool(rng.integers(2)))


HELD = (FLOAT32, BFLOAT16, *CODES)


def whole_bytes(held: str, size: int) -> int:
    """The size, or the next one that has no half a byte."""
    return size + size % 2 if held in ("int4", "e2m1") else size


def linear_cases(seed: int, count: int) -> Iterator[tuple[jax.Array, Matrix, str]]:
    """(x, matrix, dtype of the result)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens, rows, depth = (int(rng.choice(sizes)) for sizes in (TOKENS, ROWS, DEPTHS))
        dtype = str(rng.choice([FLOAT32, BFLOAT16]))
        held = str(rng.choice(HELD))
        depth = whole_bytes(held, depth)
        x = jnp.asarray(rng.normal(size=(tokens, depth)), dtype)
        yield x, draw_matrix(rng, (rows, depth), held), str(rng.choice([FLOAT32, BFLOAT16]))


def check_linear(x: jax.Array, matrix: Matrix, out: str, variant: str) -> None:
    """Against float64."""
    found = jax.jit(lambda x, m: native_linears(x, [m], [out], variant)[0])(x, matrix)
    check_product(found, x, matrix, out, variant)


def check_product(found: jax.Array, x: jax.Array, matrix: Matrix, out: str, variant: str) -> None:
    """Within the rounding of sums in float32 and of the result.

    A sum is made of as many as there are lanes (4 or more), or, token by token, of sums of 128 products.
    Where the processor multiplies bfloat16, more than 8 tokens of it meet the codes' numbers rounded to it.
    """
    numbers, sizes = multiplied_out(matrix)
    pairs = "bf16" in variant or "amx" in variant
    if pairs and isinstance(matrix, BlockScaled) and x.dtype == jnp.bfloat16 and len(x) > 8:
        numbers = numbers.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    tokens = np.asarray(x).astype(np.float64)
    wanted, size = tokens @ numbers.T, np.abs(tokens) @ sizes.T
    depth = x.shape[1]
    bound = (min(depth, 128) + depth / 4 + 8) * EPS[FLOAT32] * size
    if pairs:
        bound += depth * EPS[FLOAT32] * size
    if out == BFLOAT16:
        bound += EPS[BFLOAT16] * np.abs(wanted)
    assert found.dtype == jnp.dtype(out)
    assert found.shape == wanted.shape
    np.testing.assert_array_less(np.abs(np.asarray(found).astype(np.float64) - wanted), bound + 1e-30)


def expert_case(
    seed: int, tokens: int, top_k: int, experts: int, hidden: int, inner: int, dtype: str, held: str
) -> dict:
    """As of `routed_inputs`, with matrices that are held so."""
    rng = np.random.default_rng([seed, tokens, hidden])
    shape = tokens, top_k, experts, hidden, inner
    return routed_inputs(rng, shape, dtype, lambda stack: draw_matrix(rng, stack, held))


def expert_cases(seed: int, count: int) -> Iterator[dict]:
    """Odd sizes, from one token to groups of several hundred."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        held = str(rng.choice(HELD))
        yield expert_case(
            seed + index,
            int(rng.choice([1, 2, 5, 16, 37, 150])),
            int(rng.integers(1, 5)),
            int(rng.choice([1, 3, 8, 64])),
            whole_bytes(held, int(rng.choice([1, 17, 32, 64, 130]))),
            whole_bytes(held, int(rng.choice([1, 9, 32, 70]))),
            str(rng.choice([FLOAT32, BFLOAT16])),
            held,
        )


# float32: sums of a few hundred products, and of codes and zero points, which are a few times as large.
# bfloat16: gate, up, the activation and the output are rounded, the first three before a product that
# averages them. Of the largest slot's size, or of what is summed of a token.
EXPERT_TOLERANCE = {FLOAT32: 6e-6, BFLOAT16: 3 * 2.0**-8}


def expert_slots(given: dict) -> np.ndarray:
    """Weighted slots in float64, never rounded: [tokens, top_k, hidden]."""
    gate_up, down = (multiplied_out(given[name])[0] for name in ("gate_up", "down"))
    x, ids = np.asarray(given["x"]).astype(np.float64), np.asarray(given["expert_ids"])
    slots = np.zeros((*ids.shape, x.shape[1]))
    for token, slot in np.argwhere(ids < len(gate_up)):
        expert = ids[token, slot]
        gate, up = np.split(gate_up[expert] @ x[token], 2)
        slots[token, slot] = down[expert] @ (gate / (1 + np.exp(-gate)) * up)
    return slots * np.asarray(given["weights"], np.float64)[..., None]


def check_experts(given: dict, variant: str, *, by_slot: bool = False) -> None:
    """Against float64."""
    run = functools.partial(native_experts, variant=variant, by_slot=by_slot)
    found = jax.jit(lambda given: run(**given))(given)
    slots = expert_slots(given)
    wanted, sizes = (x if by_slot else x.sum(axis=1) for x in (slots, np.abs(slots)))
    assert found.dtype == jnp.float32
    tolerance = EXPERT_TOLERANCE[given["x"].dtype.name]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(sizes.max(), 1e-3))


def delta_case(seed: int, batch: int, seq: int, key_heads: int, ratio: int, dims: tuple[int, int]) -> dict:
    """A state of order one and some tokens."""
    rng = np.random.default_rng([seed, batch, seq, *dims])
    heads = key_heads * ratio

    def unit(*shape: int) -> jax.Array:
        x = rng.normal(size=shape)
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)

    return {
        "state": jnp.asarray(rng.normal(size=(batch, heads, *dims)), jnp.float32),
        "query": unit(batch, seq, key_heads, dims[0]),
        "key": unit(batch, seq, key_heads, dims[0]),
        "value": jnp.asarray(rng.normal(size=(batch, seq, heads, dims[1])), jnp.float32),
        "g": jnp.asarray(-rng.exponential(size=(batch, seq, heads)), jnp.float32),
        "beta": jnp.asarray(rng.uniform(size=(batch, seq, heads)), jnp.float32),
    }


# Batch, tokens, key heads, heads, dims, taps: odd sizes, shared key heads, one token, more than a task takes.
CONV_SHAPES = [
    (1, 1, 1, 1, 1, 1, 4),
    (3, 1, 2, 4, 16, 16, 4),
    (2, 7, 1, 3, 7, 33, 2),
    (1, 70, 3, 3, 64, 95, 5),
    (2, 33, 2, 4, 128, 128, 1),
]
CONV_TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}  # a few float32 roundings; one bfloat16 rounding more


def check_conv(shape: tuple[int, ...], dtype: str, variant: str) -> None:
    """Against the plain form, with pads behind every row but the first."""
    batch, seq, key_heads, heads, key_dim, value_dim, taps = shape
    rng = np.random.default_rng([16, *shape])
    channels = 2 * key_heads * key_dim + heads * value_dim
    given = (
        jnp.asarray(rng.normal(size=(batch, seq, channels)), dtype),
        jnp.asarray(rng.normal(size=(channels, taps)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, taps - 1, channels)), dtype),
        jnp.asarray([seq, *rng.integers(0, seq + 1, batch - 1)], jnp.int32),
    )
    sizes = {"key_dim": key_dim, "heads": heads, "value_dim": value_dim}
    x, weight, carried, counts = given
    pool, slots = in_slots(carried, rng)
    *found, after = jax.jit(functools.partial(native_conv, variant=variant, **sizes))(
        x, weight, pool + 0, slots, counts
    )
    found.append(read_slots(after, slots))
    check_others(pool, after, slots)
    wanted = jax.jit(functools.partial(conv_heads, **sizes))(*given)
    token = (np.arange(seq) < np.asarray(given[3])[:, None])[..., None, None]
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        if index == 0:  # a pad's query means nothing
            a, b = np.where(token, a, 0), np.where(token, b, 0)
        exact = index == 3
        np.testing.assert_allclose(
            a, b, rtol=0, atol=0 if exact else CONV_TOLERANCE[dtype] * max(1, np.abs(b).max(initial=0))
        )


def in_slots(entries: jax.Array, rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """(a pool in which rows' entries lie in some order among others, the slot of each row)."""
    batch = entries.shape[0]
    slots = jnp.asarray(rng.permutation(batch + 2)[:batch], jnp.int32)
    pool = jnp.asarray(rng.normal(size=(batch + 2, *entries.shape[1:])), entries.dtype)
    return pool.at[slots].set(entries), slots


def check_others(before: jax.Array, after: jax.Array, slots: jax.Array) -> None:
    """Entries that are no row's stay as they are."""
    others = np.setdiff1d(np.arange(before.shape[0]), slots)
    np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(before)[others])


# Batch, tokens, key heads, value heads a key head, dims.
DELTA_SHAPES = [
    (1, 1, 1, 1, (1, 1)),
    (3, 4, 2, 2, (16, 16)),
    (2, 1, 1, 3, (7, 33)),
    (1, 3, 4, 2, (128, 128)),
    (5, 2, 3, 1, (64, 95)),
    (2, 1, 4, 2, (128, 128)),
]


def check_delta_step(given: dict, variant: str) -> None:
    """Against the plain scan: sums of at most 128 products of order one, a few dozen units in the last place
    of float32. Looking, and taking one token at a time, give the same bits."""
    pool, slots = in_slots(given["state"], np.random.default_rng(given["state"].shape))
    kernel = jax.jit(functools.partial(native_delta_step, variant=variant))
    output, after = kernel(**(given | {"state": pool + 0}), slots=slots)
    check_others(pool, after, slots)
    wanted = delta_rule_scan(**given)
    for a, b in zip((output, read_slots(after, slots)), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    seen = pool + 0
    looked = jax.jit(functools.partial(native_delta_look, variant=variant))(
        **(given | {"state": seen}), slots=slots
    )
    np.testing.assert_array_equal(looked, output)
    np.testing.assert_array_equal(seen, pool)
    singly = pool + 0
    for token in range(output.shape[1]):
        one = {name: x[:, token : token + 1] for name, x in given.items() if name != "state"}
        read, singly = kernel(**one, state=singly, slots=slots)
        np.testing.assert_array_equal(read[:, 0], output[:, token])
    np.testing.assert_array_equal(singly, after)


# Tokens, key heads, heads, dims: both sides of a chunk's end, odd dimensions, shared key heads.
CHUNK_SHAPES = [
    (1, 1, 1, 1, 1),
    (63, 2, 4, 16, 16),
    (64, 1, 3, 7, 33),
    (65, 3, 3, 64, 95),
    (300, 2, 4, 128, 128),
]


def check_delta_chunks(shape: tuple[int, ...], variant: str) -> None:
    """Against the recurrence in float64 in every regime: within twice the error of XLA's chunks."""
    seq, key_heads, heads, key_dim, value_dim = shape
    given = delta_inputs(15, seq, key_heads=key_heads, heads=heads, key_dim=key_dim, value_dim=value_dim)
    *tokens, state = given
    pool, slots = in_slots(jnp.asarray(state), np.random.default_rng(shape))
    output, after = jax.jit(functools.partial(native_delta_chunks, variant=variant))(*tokens, pool + 0, slots)
    check_others(pool, after, slots)
    found = output, read_slots(after, slots)
    plain = jax.jit(delta_rule_chunked)(*given)
    for a, b, exact in zip(found, plain, delta_oracle(*given), strict=True):
        error, allowed = (np.abs(np.asarray(x) - exact).max() for x in (a, b))
        assert error <= 2 * allowed + 2e-6 * np.abs(exact).max()


def attention_case(
    seed: int,
    batch: int,
    seq: int,
    kv_heads: int,
    group: int,
    dim: int,
    capacity: int,
    dtype: str,
    cache: str,
) -> dict:
    """Pages with keys up to some length a row, new tokens behind it, and a few pads at the end."""
    rng = np.random.default_rng([seed, batch, seq, dim, capacity])
    length = rng.integers(0, capacity - seq + 1, batch)
    count = rng.integers(0, seq + 1, batch)
    positions = length[:, None] + np.arange(seq)
    page = int(rng.choice([32, 64, 96]))

    def normal(*shape: int, dtype: str = dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    held = [normal(batch, capacity, kv_heads, dim, dtype=cache) for _ in "kv"]
    # every row has pages for all of its queries, and NaN where it has not written
    paged = in_pages(*held, page, length, seed=seed, room=seq)
    places = np.where(np.arange(seq) < count[:, None], positions, paged.tables.shape[1] * page)
    # a pad sees what its row's last token does, and nothing where there is none
    positions = np.minimum(positions, (length + count - 1)[:, None])
    return {
        "query": 2 * normal(batch, seq, kv_heads * group, dim),
        "key": normal(batch, seq, kv_heads, dim),
        "value": normal(batch, seq, kv_heads, dim),
        "positions": jnp.asarray(positions, jnp.int32),
        "places": jnp.asarray(places, jnp.int32),
        "tables": paged.tables,
        "cache": KVCache(*paged.pools),
    }


def attention_cases(seed: int, count: int) -> Iterator[dict]:
    """Decode and prefill, over caches shorter and longer than a task's share of keys."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        seq = int(rng.choice([1, 1, 2, 5, 16, 40, 130]))
        yield attention_case(
            seed + index,
            int(rng.choice([1, 3])),
            seq,
            int(rng.choice([1, 2])),
            int(rng.choice([1, 2, 4, 7])),
            int(rng.choice([8, 16, 20, 64, 256])),
            max(seq, int(rng.choice([1, 60, 257, 1500]))),
            *((FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32))[int(rng.integers(3))],
        )


# Outputs are averages of values of order one. float32: sums over up to 1500 keys, and e^x to two units.
# bfloat16: weights and the result rounded.
ATTENTION_TOLERANCE = {FLOAT32: 1e-5, BFLOAT16: 3 * 2.0**-8}


def check_attention(given: dict, variant: str) -> None:
    """Against the plain form, in float32 on the same numbers; the caches are equal bit by bit."""
    cache = given["cache"]
    copy = KVCache(cache.k + 0, cache.v + 0)
    found, after = jax.jit(functools.partial(native_attention, variant=variant))(**(given | {"cache": copy}))
    wanted_cache = append_keys(cache, given["key"], given["value"], given["places"], given["tables"])
    for ours, theirs in ((after.k, wanted_cache.k), (after.v, wanted_cache.v)):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (ours, theirs)))
    wide = [x.astype(jnp.float32) for x in (given["query"], wanted_cache.k, wanted_cache.v)]
    wanted = np.asarray(blockwise_attention(*wide, given["positions"], given["tables"]))
    assert found.dtype == given["query"].dtype
    tolerance = ATTENTION_TOLERANCE[given["query"].dtype.name]
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0, atol=tolerance * 2)

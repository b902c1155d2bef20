"""The C++ kernels as functions of arrays, with the signatures of the plain XLA forms."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.cache import KVCache
from qwen_moe_jax.kernels.cpu.build import load
from qwen_moe_jax.kernels.varying import vary_like, varying_axes


def native_rows(table: jax.Array, ids: jax.Array, variant: str) -> jax.Array:
    """Rows of an embedding. XLA:CPU widens a whole bfloat16 table to look up one row.

    Args:
        table: [rows, hidden], float32 or bfloat16.
        ids: int32 [...]; outside of the table, the nearest row.
        variant: of the library.

    Returns:
        float32 [..., hidden].
    """
    result = jax.ShapeDtypeStruct((*ids.shape, table.shape[1]), jnp.float32)
    return _call(variant, "rows", (table, ids), [result])[0]


def native_linears(
    x: jax.Array, weights: Sequence[Matrix], out_dtypes: Sequence[DTypeLike], variant: str
) -> list[jax.Array]:
    """x @ weight^T for each weight, accumulated in float32 and rounded once.

    Args:
        x: [..., in], float32 or bfloat16. Never rounded.
        weights: [out, in], float32, bfloat16, or codes with block scales, whose products are those of the
            multiplied-out matrix in float32; where the processor multiplies bfloat16 itself, those of more
            than 8 bfloat16 tokens are of that matrix rounded to bfloat16.
        out_dtypes: of the results, float32 or bfloat16.
        variant: of the library.

    Returns:
        [..., out] each.
    """
    operands, results, forms = [x], [], []
    for weight, dtype in zip(weights, out_dtypes, strict=True):
        parts, form = _parts(weight)
        operands += parts
        forms += form
        results.append(jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[0]), dtype))
    return _call(variant, "linear", tuple(operands), results, forms=np.asarray(forms, np.int64))


def native_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    variant: str,
    by_slot: bool = False,
) -> jax.Array:
    """The routed experts; arguments and result as of `model/experts.py`."""
    up_parts, up_form = _parts(gate_up)
    down_parts, down_form = _parts(down)
    shape = (*expert_ids.shape, x.shape[1]) if by_slot else x.shape
    return _call(
        variant,
        "experts",
        (x, expert_ids, weights, *up_parts, *down_parts),
        [jax.ShapeDtypeStruct(shape, jnp.float32)],
        forms=np.asarray(up_form + down_form, np.int64),
        by_slot=by_slot,
    )[0]


def native_conv(
    x: jax.Array,
    weight: jax.Array,
    carried: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    *,
    key_dim: int,
    heads: int,
    value_dim: int,
    variant: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Convolution, SiLU and norms of a Gated DeltaNet's heads, in float32.

    Args:
        x, weight, counts, key_dim, heads, value_dim: as of `conv_heads`.
        carried: [slots, kernel - 1, channels] of x.dtype, whose memory the new one takes over.
        slots: int32 [batch], the entry of each row; a row whose entry there is not reads zeros and writes
        none.
        variant: of the library.

    Returns:
        (query, key and value as of `conv_heads`; what is carried on in all slots).
    """
    batch, seq, channels = x.shape
    keys = (batch, seq, (channels - heads * value_dim) // (2 * key_dim), key_dim)
    shapes = [(keys, jnp.float32)] * 2 + [((batch, seq, heads, value_dim), jnp.float32)]
    results = [jax.ShapeDtypeStruct(*each) for each in (*shapes, (carried.shape, x.dtype))]
    # weights that lie by taps are made once for all steps of a loop
    operands = (x, weight.T.astype(jnp.float32), carried.astype(x.dtype), slots, counts)
    query, key, value, carried = _call(variant, "conv", operands, results, aliases={2: 3})
    return query, key, value, carried


def native_delta_step(
    state: jax.Array,
    slots: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    variant: str,
) -> tuple[jax.Array, jax.Array]:
    """A few tokens of the gated delta rule, one after another, as `delta_rule_scan`, in float32.

    Args:
        state: [slots, heads, Dk, Dv], whose memory the new one takes over.
        slots: int32 [batch], the entry of each row; a row whose entry there is not changes none, and gets
            zeros.
        query, key: [batch, seq, key_heads, Dk]; value head h reads key head h // (heads / key_heads).
        value: [batch, seq, heads, Dv].
        g, beta: [batch, seq, heads].
        variant: of the library.

    Returns:
        (output [batch, seq, heads, Dv], the states of all slots).
    """
    return _recurrence(variant, "delta_step", slots, query, key, value, g, beta, state)


def native_delta_look(
    state: jax.Array,
    slots: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    variant: str,
) -> jax.Array:
    """The output of `native_delta_step`, bit for bit, whose states stay as they are."""
    operands = tuple(x.astype(jnp.float32) for x in (query, key, value, g, beta, state))
    result = jax.ShapeDtypeStruct(value.shape, jnp.float32)
    return _call(variant, "delta_look", (*operands, slots), [result])[0]


def native_delta_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    slots: jax.Array,
    variant: str,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over a sequence, as `delta_rule_chunked`, in float32; state and slots as of
    `native_delta_step`."""
    return _recurrence(variant, "delta_chunks", slots, query, key, value, g, beta, state)


def native_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    places: jax.Array,
    tables: jax.Array,
    cache: KVCache,
    variant: str,
) -> tuple[jax.Array, KVCache]:
    """New keys and values to their rows' pages, then causal attention over them.

    Args:
        query: [batch, seq, heads, head_dim], float32 or bfloat16.
        key, value: [batch, seq, kv_heads, head_dim], of query's dtype.
        positions: int32 [batch, seq]; a query sees its row's positions 0 .. position.
        places: int32 [batch, seq], positions that the new ones get; one that its row has no page for drops
        its
            token.
        tables: int32 [batch, width], the pages of each row; the first id that no page has ends it.
        cache: float32 or bfloat16, pages of a multiple of 32 tokens, whose memory the new one takes over.
        variant: of the library.

    Returns:
        ([batch, seq, heads, head_dim] in query.dtype, the cache). Products accumulate and the softmax runs in
        float32; beside a bfloat16 cache, many queries' weights are rounded to bfloat16.
    """
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, cache.k, cache.v)]
    operands = (query, key, value, positions, places, tables, cache.k, cache.v)
    mixed, k, v = _call(variant, "attention", operands, results, aliases={6: 1, 7: 2})
    return mixed, KVCache(k=k, v=v)


def native_append(
    key: jax.Array, value: jax.Array, places: jax.Array, tables: jax.Array, cache: KVCache, variant: str
) -> KVCache:
    """New keys and values to their rows' pages; arguments and cache as of `native_attention`."""
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (cache.k, cache.v)]
    operands = (key, value, places, tables, cache.k, cache.v)
    k, v = _call(variant, "append", operands, results, aliases={4: 0, 5: 1})
    return KVCache(k=k, v=v)


def native_move_states(
    pools: list[jax.Array],
    others: list[jax.Array],
    places: jax.Array,
    sources: jax.Array,
    variant: str,
) -> list[jax.Array]:
    """Entries of some pools copied from others. XLA:CPU widens whole bfloat16 pools to copy one entry.

    Args:
        pools: [entries, ...], any dtype; the results take their memory over.
        others: one each pool, of its dtype and with entries of its shape.
        places: int32 [moves], entries of the pools; nothing goes to one that they have not.
        sources: int32 [moves], entries of the others; zeros for one that they have not.
        variant: of the library.
    """
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools]
    aliases = {2 + i: i for i in range(len(pools))}
    return _call(variant, "move_states", (places, sources, *pools, *others), results, aliases=aliases)


def native_reserve(shape: tuple[int, ...], dtype: DTypeLike, variant: str) -> jax.Array:
    """Memory for an array, which nobody has written: what it holds means nothing, and the machine takes the
    memory of a large one only as it is written."""
    return _reserve(shape, jnp.dtype(dtype), variant)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _reserve(shape: tuple[int, ...], dtype: jnp.dtype, variant: str) -> jax.Array:
    return _call(variant, "reserve", (), [jax.ShapeDtypeStruct(shape, dtype)])[0]


def _recurrence(
    variant: str, operation: str, slots: jax.Array, *tokens_and_state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Query, key, value, g, beta and state -> (output, the states after it), which take their memory over."""
    operands = tuple(x.astype(jnp.float32) for x in tokens_and_state)
    results = [jax.ShapeDtypeStruct(operands[i].shape, jnp.float32) for i in (2, 5)]
    output, state = _call(variant, operation, (*operands, slots), results, aliases={5: 1})
    return output, state


# What the C++ calls number formats; 0 is an array of plain numbers.
_CODES = {"e4m3": 1, "int8": 2, "int4": 3, "e2m1": 4}


def _parts(weight: Matrix) -> tuple[list[jax.Array], list[int]]:
    """([values, scales, zero points], [codes, rows and columns of a block, whether there are zero points]).

    Scales and zero points have one element where there are none.
    """
    no_zeros = jnp.zeros((1, 1), jnp.uint8)
    if not isinstance(weight, BlockScaled):
        return [weight, jnp.zeros((1, 1), jnp.float32), no_zeros], [0, 1, 1, 0]
    zeros = no_zeros if weight.zeros is None else weight.zeros
    form = [_CODES[weight.codes], *weight.block, weight.zeros is not None]
    return [weight.values, weight.scales, zeros], form


def _call(
    variant: str,
    operation: str,
    operands: tuple[jax.Array, ...],
    results: list[jax.ShapeDtypeStruct],
    aliases: dict[int, int] | None = None,
    **attributes: int | bool | np.ndarray,
) -> list[jax.Array]:
    # Results differ wherever an operand does, and JAX wants all operands typed alike.
    operands = tuple(vary_like(x, *operands) for x in operands)
    mesh = jax.typeof(operands[0]).sharding.mesh if operands else None
    typed: dict[str, Any] = {}
    if mesh is not None and not mesh.empty:
        typed["sharding"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        typed["manual_axis_type"] = jax.sharding.ManualAxisType(varying=varying_axes(operands[0]))
    call = jax.ffi.ffi_call(
        load(variant).target(operation),
        [jax.ShapeDtypeStruct(r.shape, r.dtype, **typed) for r in results],
        input_output_aliases=aliases,
    )
    return list(call(*operands, **attributes))

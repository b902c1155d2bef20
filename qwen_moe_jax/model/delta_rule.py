"""The gated delta rule, three ways.

Per value head, with state S [Dk, Dv] (Yang, Kautz & Hatamizadeh, arXiv:2412.06464, eq. 10):

    S <- S e^g;   d = (v - S^T k) beta;   S <- S + k d^T;   o = S^T q

`delta_rule_step` is one such step (decode), `delta_rule_scan` a scan over steps, and
`delta_rule_chunked` the WY / UT form for prefill (Yang et al., arXiv:2406.06484, section 3): within a
chunk of C steps the corrections d solve a unit lower triangular system of size C, so that a chunk
costs a few matrix products. With G_ij = g_(j+1) + ... + g_i, the log decay from step j to step i of a
chunk (0 before its first step), and S the state before it,

    A_ij = beta_i (k_i . k_j) e^(G_ij)  (i > j)
    (I + A) D = beta (V - e^(G_i0) K S)
    O = e^(G_i0) Q S + tril(Q K^T e^(G_ij)) D
    S <- e^(G_C0) S + (K e^(G_Cj))^T D

Each G_ij is summed from its own steps. As a difference of two cumulative sums, the usual way, it would
lose to rounding whatever is small beside a strong decay earlier in the chunk. No exponent is above zero,
so nothing overflows. A step with g = 0 and k = v = beta = 0 changes nothing, bit for bit.

The system is solved by blocked forward substitution: no less exact than XLA's triangular solve (a library
call on CPU and GPUs), as fast on one core and faster on two. The products (I - A)(I + A^2)(I + A^4)... lose
every digit when keys repeat (`benchmarks/README.md`, "Chunk solver").

Queries and keys come L2-normalised and queries scaled. All of it is computed in float32 (or wider,
if the state is), with products in full float32 also where the hardware has a faster, coarser mode.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.kernels.varying import vary_like

CHUNK = 64
_BLOCK = 16  # rows that the chunk's system is solved by at a time
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def delta_rule_step(
    state: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token, for any leading dimensions.

    Args:
        state: [..., Dk, Dv], at least float32.
        query, key: [..., Dk].
        value: [..., Dv].
        g: [...], log decay, at most 0.
        beta: [...], write strength in [0, 1].

    Returns:
        (output [..., Dv], new state), both in state.dtype.
    """
    _check_state(state)
    query, key, value, g, beta = (x.astype(state.dtype) for x in (query, key, value, g, beta))
    state = state * jnp.exp(g)[..., None, None]
    # as products, not as multiply-and-sum, which XLA:CPU runs ten times slower
    recalled = _einsum("...kv,...k->...v", state, key)
    correction = (value - recalled) * beta[..., None]
    state = state + key[..., None] * correction[..., None, :]
    return _einsum("...kv,...k->...v", state, query), state


def delta_rule_scan(
    query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence, one step after the other. Arguments and results as `delta_rule_chunked`."""
    ratio = value.shape[2] // key.shape[2]
    steps = (jnp.repeat(query, ratio, axis=2), jnp.repeat(key, ratio, axis=2), value, g, beta)

    def body(state: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        output, state = delta_rule_step(state, *step)
        return state, output

    state, output = lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps))
    return jnp.moveaxis(output, 0, 1), state


def delta_rule_chunked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    chunk_size: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence in chunks of matrix products.

    Args:
        query, key: [batch, seq, key_heads, Dk]; value head h uses key head h // (heads / key_heads).
        value: [batch, seq, heads, Dv].
        g, beta: [batch, seq, heads].
        state: [batch, heads, Dk, Dv], at least float32.
        chunk_size: steps a chunk, a multiple of 16; any seq is padded to a multiple of the chunk with
            steps that change nothing.

    Returns:
        (output [batch, seq, heads, Dv], state after the last step), both in state.dtype.
    """
    _check_state(state)
    dtype = state.dtype
    batch, seq, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    ratio = heads // key_heads
    if chunk_size % _BLOCK:
        raise ValueError(f"chunk_size is {chunk_size}; it must be a multiple of {_BLOCK}")
    size = min(chunk_size, -(-seq // _BLOCK) * _BLOCK)  # a short sequence is one short chunk
    chunks = -(-seq // size)

    query, key = _split_heads(query, chunks, size, dtype), _split_heads(key, chunks, size, dtype)
    value = _split_heads(value, chunks, size, dtype).reshape(chunks, batch, key_heads, ratio, size, value_dim)
    g, beta = (
        _split_heads(x[..., None], chunks, size, dtype).reshape(chunks, batch, key_heads, ratio, size)
        for x in (g, beta)
    )
    # n: key head, r: value head of its group, i/j: steps, c: chunk, b: batch
    order = jnp.arange(size)
    causal = order[:, None] >= order[None, :]
    # sums of g over the steps after j up to i, as a product with a triangle of ones
    behind = jnp.where(order[:, None] > order[None, :], g[..., :, None], 0)
    between = _einsum("il,cbnrlj->cbnrij", causal.astype(dtype), behind)
    decay = jnp.exp(jnp.where(causal, between, -jnp.inf))
    overlap = _einsum("cbnid,cbnjd->cbnij", key, key)[:, :, :, None]
    system = jnp.where(causal & (order[:, None] != order), overlap * decay * beta[..., None], 0)
    mixing = _einsum("cbnid,cbnjd->cbnij", query, key)[:, :, :, None] * decay
    from_start = jnp.exp(jnp.cumsum(g, axis=-1))[..., None]
    to_end = decay[..., -1, :, None]
    whole = from_start[..., -1:, :]
    # (I + A)^-1 applied to both right-hand sides at once: the written values, and what they read of S
    wanted = jnp.concatenate(
        [value * beta[..., None], key[:, :, :, None] * (beta[..., None] * from_start)], axis=-1
    )
    solved = solve_unit_lower(system, wanted)
    written, reading = solved[..., :value_dim], solved[..., value_dim:]

    def body(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        written, reading, query, key, mixing, from_start, to_end, whole = chunk
        correction = written - _einsum("bnrid,bnrdv->bnriv", reading, state)
        output = from_start * _einsum("bnid,bnrdv->bnriv", query, state)
        output = output + _einsum("bnrij,bnrjv->bnriv", mixing, correction)
        state = whole * state + _einsum("bnid,bnriv->bnrdv", key, to_end * correction)
        return state, output

    grouped = state.reshape(batch, key_heads, ratio, key_dim, value_dim)
    grouped, output = lax.scan(
        body, grouped, (written, reading, query, key, mixing, from_start, to_end, whole)
    )
    # [chunks, batch, key_heads, ratio, size, Dv] -> [batch, seq, heads, Dv]
    output = output.transpose(1, 0, 4, 2, 3, 5).reshape(batch, chunks * size, heads, value_dim)
    return output[:, :seq], grouped.reshape(state.shape)


def solve_unit_lower(system: jax.Array, wanted: jax.Array) -> jax.Array:
    """X with (I + system) X = wanted, by forward substitution over blocks of 16 rows.

    Args:
        system: [..., n, n], strictly lower triangular, n a multiple of 16.
        wanted: [..., n, columns].

    Returns:
        [..., n, columns].
    """
    # Few dimensions: a product summed over one of seven crashes XLA:CPU of jaxlib 0.10.2 to 0.11.0
    # (jax issues 39257 and 40412).
    leading = wanted.shape[:-2]
    system = system.reshape(-1, *system.shape[-2:])
    wanted = wanted.reshape(-1, *wanted.shape[-2:])
    starts = range(0, system.shape[-1], _BLOCK)
    diagonal = jnp.stack([system[..., s : s + _BLOCK, s : s + _BLOCK] for s in starts], axis=-3)
    identity = vary_like(jnp.broadcast_to(jnp.eye(_BLOCK, dtype=system.dtype), diagonal.shape), system)

    def one_row(row: int, inverse: jax.Array) -> jax.Array:
        # e_row minus its combination of the rows above; those below meet zeros
        weights = lax.dynamic_index_in_dim(diagonal, row, axis=-2).swapaxes(-1, -2)
        above = (weights * inverse).sum(axis=-2, keepdims=True)
        new = lax.dynamic_index_in_dim(identity, row, axis=-2) - above
        return lax.dynamic_update_slice_in_dim(inverse, new, row, axis=-2)

    # a loop, because unrolled it takes seconds to compile; all diagonal blocks at once
    inverse = lax.fori_loop(1, _BLOCK, one_row, identity)
    solved = jnp.zeros((*wanted.shape[:-2], 0, wanted.shape[-1]), wanted.dtype)
    for block, start in enumerate(starts):
        rest = wanted[..., start : start + _BLOCK, :]
        if start:
            known = system[..., start : start + _BLOCK, :start]
            rest = rest - _einsum("...ij,...jk->...ik", known, solved)
        part = _einsum("...ij,...jk->...ik", inverse[..., block, :, :], rest)
        solved = jnp.concatenate([solved, part], axis=-2)
    return solved.reshape(*leading, *solved.shape[-2:])


def _split_heads(x: jax.Array, chunks: int, size: int, dtype: jnp.dtype) -> jax.Array:
    """[batch, seq, heads, dim] -> [chunks, batch, heads, size, dim], padded with zeros."""
    batch, seq, heads, dim = x.shape
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, chunks * size - seq), (0, 0), (0, 0)))
    return x.reshape(batch, chunks, size, heads, dim).transpose(1, 0, 3, 2, 4)


def _check_state(state: jax.Array) -> None:
    if jnp.finfo(state.dtype).bits < 32:
        raise TypeError(f"the recurrent state is {state.dtype}; it must be float32 or wider to hold its sum")

"""The gated delta rule over many tokens, a head's chunks on the chip from first to last (Pallas, by Triton).

The chunked form of `model/delta_rule.py`, behind the convolution. A program has some columns of one value
head's state in registers, which do not meet the other columns, and goes through a row chunk by chunk. What is
convolved is read where it lies, queries and keys are normalised in registers, outputs are written once; the
state is read before the first chunk and written behind the last, and no matrix of a chunk meets the memory.
With the state S before a chunk and G_ij, the log decay from step j to step i of it,

    A_ij = beta_i (k_i . k_j) e^(G_ij)  (i > j)
    D = (I + A)^-1 beta (V - e^(G_i0) K S)
    O = e^(G_i0) Q S + tril(Q K^T e^(G_ij)) D
    S <- e^(G_C0) S + (K e^(G_Cj))^T D

The inverse is built from the diagonal outwards: two neighbouring blocks X and Y of a block diagonal inverse,
with M below them in A, become [[X, 0], [-Y M X, Y]]. An entry of an inverse is what one step's write leaves
of itself in a later step, which for keys of length one and beta in [0, 1] is at most one, and so are those
of M X; nothing grows before it cancels, as powers of A do. Products are float32 throughout.

Convolution and SiLU stand in front, as one pass of XLA's that reads and writes each channel once, as on CPUs;
norms are taken here. In here every program of a key head would compute them again: 32 programs for heads of
128 columns that share keys four to one, 1,024 multiply-adds and 256 exponentials a token each, on the one
chain that a row waits for, to save 1 % of what a layer moves.

Chunks are short and programs narrow because a row's chunks wait for one another. Matrix instructions that a
warp issues one after the other, in cycles a token (64 of them for 32x32x2, 32 for 16x16x4, in the compiled
code of heads of 128): 392 for 16 steps and 16 columns, 600 for 16 and 32, 992 for 32 and 32, which moreover
has too few registers. A program of one warp has no barriers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.kernels.grouped_matmul import up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch

CHUNK = 16
# Of the state, a program: few until every SIMD of a device has a warp, then those of less arithmetic.
_NARROW, _WIDE = 16, 32
_WARPS = 1024
_dot = partial(plt.dot, precision=lax.Precision.HIGHEST)


def delta_chunks(
    state: jax.Array,
    slots: jax.Array,
    mixed: jax.Array,
    counts: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    eps: float,
    interpret: bool,
    chunk: int = CHUNK,
    columns: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Many tokens a row. One with g = beta = 0, and pads, change nothing, bit for bit.

    Args:
        state: float32 [slots, heads, Dk, Dv], whose memory the new one takes over.
        slots: int32 [batch], the entry of each row; a row whose entry there is not changes none, and its
            output means nothing. No two rows have the same.
        mixed: [batch, seq, channels], flat queries, keys (each [key_heads, Dk]) and values ([heads, Dv]) as
            the convolution leaves them; value head h reads key head h // (heads / key_heads).
        counts: int32 [batch], a row's tokens in front of its pads, which may hold anything.
        g: float32 [batch, seq, heads], log decay, at most 0; 0 for pads.
        beta: float32 [batch, seq, heads], write strength in [0, 1]; 0 for pads.
        eps: added to the squared length of queries and keys, which are divided by its root.
        interpret: as of `launch`.
        chunk: steps a chunk, a power of two, 16 or more.
        columns: of the state a program, a power of two, 16 or more; None for what suits the shapes.

    Returns:
        (output [batch, seq, heads, Dv] in mixed.dtype, rounded to from float32; the states of all slots). A
        pad's output means nothing.
    """
    heads, key_dim, value_dim = state.shape[1:]
    batch, seq, channels = mixed.shape
    key_heads = (channels - heads * value_dim) // (2 * key_dim)
    chunk = min(chunk, up_to_power(seq))
    length, whole = up_to_power(key_dim), up_to_power(value_dim)
    narrow = batch * heads * (whole // _NARROW) <= _WARPS
    width = min(columns or (_NARROW if narrow else _WIDE), whole)
    slices = pl.cdiv(value_dim, width)
    touched = batch * heads * key_dim * value_dim
    size = mixed.dtype.itemsize
    output, states = launch(
        partial(_kernel, key_heads=key_heads, eps=eps, chunk=chunk, width=width, length=length),
        [state, slots, mixed, counts, g, beta],
        [
            jax.ShapeDtypeStruct((batch, seq, heads, value_dim), mixed.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        grid=(slices, heads, batch),
        name="delta_chunks",
        cost=KernelCost(
            flops=batch * heads * slices * pl.cdiv(seq, chunk) * chunk_flops(chunk, length, width),
            # the programs of a head read its queries and keys at about the same time
            bytes=mixed.size * size + batch * seq * heads * (value_dim * size + 2 * 4.0) + 2 * 4.0 * touched,
        ),
        schedule=Schedule(warps=max(1, width // 32), stages=1),
        interpret=interpret,
        aliases={0: 1},
    )
    return output, states


def chunk_flops(chunk: int, length: int, width: int) -> float:
    """Of one program's matrix products for one chunk, two a multiply-add."""
    levels = (chunk // 2).bit_length() - 1
    square = chunk * chunk * (2 * length + (1 + 2 * levels) * chunk + 2 * width)
    return 2.0 * (square + 3 * chunk * length * width)


def unit_lower_inverse(system: jax.Array) -> jax.Array:
    """(I + system)^-1 for a strictly lower triangular [n, n], n a power of two; see above."""
    size = system.shape[0]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    # blocks of two need no product
    inverse = jnp.where(row == column, 1.0, 0.0) - jnp.where(row // 2 == column // 2, system, 0.0)
    block = 2
    while block < size:
        # odd blocks beside the even ones before them
        joins = (row // block == column // block + 1) & (row // (2 * block) == column // (2 * block))
        inverse = inverse - _dot(inverse, _dot(jnp.where(joins, system, 0.0), inverse))
        block *= 2
    return inverse


def one_chunk(
    state: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, g: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Some columns of one head over one chunk, all float32.

    Args:
        state: [Dk, columns].
        query, key: [steps, Dk].
        value: [steps, columns].
        g, beta: [steps].

    Returns:
        (output [steps, columns], the state behind them).
    """
    step = jnp.arange(g.shape[0])
    upto, before = step[:, None] >= step[None, :], step[:, None] > step[None, :]
    # each G_ij is summed from its own steps, see `model/delta_rule.py`
    between = _dot(jnp.where(upto, 1.0, 0.0), jnp.where(before, g[:, None], 0.0))
    decay = jnp.where(upto, jnp.exp(between), 0.0)
    from_start = jnp.exp(jnp.sum(jnp.where(upto, g[None, :], 0.0), axis=1))[:, None]
    to_end = jnp.exp(jnp.sum(jnp.where(before, g[:, None], 0.0), axis=0))[:, None]
    system = jnp.where(before, _dot(key, key, trans_b=True) * decay * beta[:, None], 0.0)
    wanted = beta[:, None] * (value - from_start * _dot(key, state))
    correction = _dot(unit_lower_inverse(system), wanted)
    mixing = _dot(query, key, trans_b=True) * decay
    output = from_start * _dot(query, state) + _dot(mixing, correction)
    state = jnp.exp(jnp.sum(g)) * state + _dot(key, to_end * correction, trans_a=True)
    return output, state


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=1) + eps)[:, None]


def _kernel(
    state_ref,
    slot_ref,
    mixed_ref,
    count_ref,
    g_ref,
    beta_ref,
    out_ref,
    new_ref,
    *,
    key_heads,
    eps,
    chunk,
    width,
    length,
):
    column, head, row = pl.program_id(0) * width, pl.program_id(1), pl.program_id(2)
    entries, heads, key_dim, value_dim = state_ref.shape
    seq = mixed_ref.shape[1]
    given, count = slot_ref[row], count_ref[row]
    slot = jnp.clip(given, 0, entries - 1)
    held = (given >= 0) & (given < entries)
    down, across = jnp.arange(length) < key_dim, column + jnp.arange(width) < value_dim
    lines, columns = pl.ds(0, length), pl.ds(column, width)
    mine = down[:, None] & across[None, :] & held
    state = plt.load(state_ref.at[slot, head, lines, columns], mask=mine, other=0)
    # where the head's queries, keys and values begin among the channels
    query_at = head // (heads // key_heads) * key_dim
    key_at, value_at = key_heads * key_dim + query_at, 2 * key_heads * key_dim + head * value_dim + column

    def tiles(number: jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys, values, decay and write strength of a chunk, as they lie in memory."""
        at = number * chunk + jnp.arange(chunk)
        steps = pl.ds(number * chunk, chunk)

        def part(first: jax.Array, size: int, mask: jax.Array) -> jax.Array:
            mask = (at < count)[:, None] & mask[None, :]
            return plt.load(mixed_ref.at[row, steps, pl.ds(first, size)], mask=mask, other=0)

        query, key, value = (
            part(query_at, length, down),
            part(key_at, length, down),
            part(value_at, width, across),
        )
        return (
            query,
            key,
            value,
            *(plt.load(ref.at[row, steps, head], mask=at < seq, other=0) for ref in (g_ref, beta_ref)),
        )

    chunks = pl.cdiv(seq, chunk)

    def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        state, *loaded = carry
        # the next chunk's, which are on their way while this one is computed
        following = tiles(jnp.minimum(number + 1, chunks - 1))
        query, key, value, g, beta = (x.astype(jnp.float32) for x in loaded)
        query, key = _normalised(query, eps) * key_dim**-0.5, _normalised(key, eps)
        output, state = one_chunk(state, query, key, value, g, beta)
        steps = pl.ds(number * chunk, chunk)
        inside = (number * chunk + jnp.arange(chunk) < seq)[:, None] & across[None, :]
        plt.store(out_ref.at[row, steps, head, columns], output.astype(out_ref.dtype), mask=inside)
        return state, *following

    state, *_ = lax.fori_loop(0, chunks, step, (state, *tiles(jnp.int32(0))))
    plt.store(new_ref.at[slot, head, lines, columns], state, mask=mine)

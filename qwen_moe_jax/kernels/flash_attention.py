"""Causal attention over keys and values in pages, in one pass of them (Pallas, lowered by Triton).

Online softmax (Milakov & Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135): scores exist for a
tile of queries and a block of keys at a time, in registers. The query heads of a group are rows of one tile,
so that grouped heads share each key and value as it is read and are never repeated in memory. With few
queries (decode) each row's own keys are cut into `splits` that different programs read, whose results are
joined afterwards (Flash-Decoding, Dao et al. 2023). A row's keys lie where its block table says
(PagedAttention, Kwon et al., arXiv:2309.06180); a block of keys lies inside one page.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.kernels.grouped_matmul import up_to_power
from qwen_moe_jax.kernels.launch import KernelCost, Schedule, launch

_NOTHING = float(jnp.finfo(jnp.float32).min)  # a maximum before any score; finite, so that differences are


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    *,
    interpret: bool,
    expected_keys: int | None = None,
) -> jax.Array:
    """`flash_attention` with the sizes that suit the shapes.

    Blocks of 32 keys of width 256 and their values, in two stages, fill 64 KiB, which is the LDS of gfx942.
    A row of one token alone would leave most of a GPU idle, so its keys are cut into up to 16 parts; several
    hundred programs are enough.
    """
    batch, seq, heads, _ = query.shape
    page, kv_heads = key.shape[1:3]
    capacity = page * tables.shape[1]
    rows = seq * heads // kv_heads
    tile = 16 if rows <= 16 else 64
    programs = batch * kv_heads * -(-rows // tile)
    splits = 1
    while splits < 16 and programs * splits < 512 and capacity >= splits * 512:
        splits *= 2
    return flash_attention(
        query,
        key,
        value,
        positions,
        tables,
        tile=tile,
        block=min(32, page),
        splits=splits,
        schedule=Schedule(warps=4, stages=2 if tile == 16 else 1),
        interpret=interpret,
        expected_keys=expected_keys,
    )


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    *,
    tile: int,
    block: int,
    splits: int,
    schedule: Schedule,
    interpret: bool,
    expected_keys: int | None = None,
) -> jax.Array:
    """Softmax attention of queries over their rows' positions 0 .. position.

    Args:
        query: [batch, seq, heads, head_dim].
        key, value: [pages, page length, kv_heads, head_dim], query.dtype; query head h reads kv head
            h // (heads / kv_heads).
        positions: int32 [batch, seq]; a query at -1 sees nothing, and its result means nothing.
        tables: int32 [batch, width], the pages of each row, as many as its positions need.
        tile: rows (queries times heads of a group) a program, a power of two, at most.
        block: keys a step, a power of two, 16 or more, that divides the page length.
        splits: parts that a row's keys are cut into.
        schedule: for Triton.
        interpret: as of `launch`.
        expected_keys: that a row is taken to have where the cost is written down; None for all that its table
            has room for.

    Returns:
        [batch, seq, heads, head_dim] in query.dtype; products accumulate and the softmax runs in float32.
    """
    batch, seq, heads, dim = query.shape
    page, kv_heads = key.shape[1:3]
    if page % block:
        raise ValueError(f"blocks of {block} keys do not divide pages of {page}")
    group = heads // kv_heads
    rows = group * seq
    tile = min(tile, up_to_power(rows))
    # rows of a kv head: the heads of its group, and for each the queries
    grouped = query.reshape(batch, seq, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch * kv_heads, rows, dim)
    partial_shape = (batch * kv_heads, splits, rows)
    tiles = pl.cdiv(rows, tile)
    seen = batch * kv_heads * tiles * (expected_keys or page * tables.shape[1])
    output, top, total = launch(
        partial(
            _kernel,
            tile=tile,
            block=block,
            splits=splits,
            seq=seq,
            kv_heads=kv_heads,
            width=up_to_power(dim),
        ),
        [grouped, key, value, positions, tables],
        [
            jax.ShapeDtypeStruct((*partial_shape, dim), jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        ],
        grid=(tiles, splits, batch * kv_heads),
        name="flash_attention",
        cost=KernelCost(
            flops=4.0 * seen * tile * dim,
            bytes=2.0 * seen * dim * key.dtype.itemsize
            + batch * kv_heads * rows * dim * (query.dtype.itemsize + 4.0 * splits),
        ),
        schedule=schedule,
        interpret=interpret,
    )
    # a split without visible keys has the least maximum and adds nothing
    weight = jnp.exp(top - top.max(axis=1, keepdims=True))
    output = (output * weight[..., None]).sum(axis=1) / (total * weight).sum(axis=1)[..., None]
    output = output.reshape(batch, kv_heads, group, seq, dim).transpose(0, 3, 1, 2, 4)
    return output.reshape(query.shape).astype(query.dtype)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    p_ref,
    t_ref,
    out_ref,
    top_ref,
    total_ref,
    *,
    tile,
    block,
    splits,
    seq,
    kv_heads,
    width,
):
    number, split, pair = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row, head = pair // kv_heads, pair % kv_heads
    rows, dim = q_ref.shape[1:]
    pages, page = k_ref.shape[:2]
    mine = number * tile + jnp.arange(tile)
    held = mine < rows
    across = jnp.arange(width) < dim if width > dim else None

    def mask(lines: jax.Array) -> jax.Array:
        return lines[:, None] if across is None else lines[:, None] & across[None, :]

    columns = pl.ds(0, width)
    query = plt.load(q_ref.at[pair, pl.ds(number * tile, tile), columns], mask=mask(held), other=0)
    # row r of a group is its head r // seq at query r % seq
    positions = plt.load(p_ref.at[*jnp.broadcast_arrays(row, mine % seq)], mask=held, other=-1)
    seen = jnp.max(positions) + 1
    # whole blocks a split, of this row's own keys
    span = (seen + splits * block - 1) // (splits * block) * block
    first = split * span
    stop = jnp.minimum(first + span, seen)

    def one_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, output = carry
        start = first + index * block
        slots = start + jnp.arange(block)
        # what lies behind the row's last token may be anything
        inside = mask(slots < seen)
        here = jnp.clip(t_ref[row, start // page], 0, pages - 1)
        places = pl.ds(start % page, block)
        keys = plt.load(k_ref.at[here, places, head, columns], mask=inside, other=0)
        scores = plt.dot(query, keys, trans_b=True) * (dim**-0.5)
        visible = slots[None, :] <= positions[:, None]
        scores = jnp.where(visible, scores, _NOTHING)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[:, None]), 0)
        correction = jnp.exp(top - new_top)
        values = plt.load(v_ref.at[here, places, head, columns], mask=inside, other=0)
        mixed = plt.dot(weights.astype(values.dtype), values)
        total = total * correction + jnp.sum(weights, axis=1)
        return new_top, total, output * correction[:, None] + mixed

    start = (
        jnp.full((tile,), _NOTHING, jnp.float32),
        jnp.zeros((tile,), jnp.float32),
        jnp.zeros((tile, width), jnp.float32),
    )
    steps = jnp.maximum(stop - first + block - 1, 0) // block
    top, total, output = lax.fori_loop(0, steps, one_block, start)
    lines = pl.ds(number * tile, tile)
    plt.store(out_ref.at[pair, split, lines, columns], output, mask=mask(held))
    plt.store(top_ref.at[pair, split, lines], top, mask=held)
    plt.store(total_ref.at[pair, split, lines], total, mask=held)

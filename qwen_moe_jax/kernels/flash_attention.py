"""Causal attention over keys and values in pages, in one pass of them (Pallas, lowered by Triton).

Online softmax (Milakov & Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135): scores exist for a
tile of queries and a block of keys at a time, in registers. A tile has all query heads of a key head for some
neighbouring queries, so that grouped heads share each key and value as it is read, are never repeated in
memory, and the tile reads no block behind its last query. With few queries (decode) each row's own keys are
cut into `splits` that different programs read, whose results are joined afterwards (Flash-Decoding, Dao et
al. 2023). A row's keys lie where its block table says (PagedAttention, Kwon et al., arXiv:2309.06180); a
block of keys lies inside one page.
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

    Blocks of 32 keys of width 256 and their values, in two stages, fill 64 KiB, which is the LDS of gfx942;
    so does a tile of 128 rows on its way to the matrix units. One of 256 rows would read keys half as often,
    but has too few registers (compiled for gfx950, it spills them).

    Few programs leave most of a GPU idle, so keys are cut into up to 16 parts, as long as what the parts
    write is little beside the keys that they read. Several hundred programs of one token a row are enough;
    of tiles of 128 rows, each of which fills a compute unit, one for every second unit.
    """
    batch, seq, heads, _ = query.shape
    page, kv_heads = key.shape[1:3]
    capacity = page * tables.shape[1]
    rows = seq * heads // kv_heads
    tile = min(128, up_to_power(rows))
    programs = batch * kv_heads * -(-rows // tile)
    enough = 512 if tile == 16 else 128
    splits = 1
    while splits < 16 and programs * splits < enough and capacity >= splits * 32 * tile:
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
    tiles = pl.cdiv(rows, tile)
    flat = (batch, seq * heads)
    whole = splits == 1
    results = [jax.ShapeDtypeStruct((*flat, dim), query.dtype)]
    if not whole:
        results = [jax.ShapeDtypeStruct((splits, *flat, *last), jnp.float32) for last in ((dim,), (), ())]
    seen = _keys_read(expected_keys or page * tables.shape[1], seq, tile / group, tiles)
    output, *sums = launch(
        partial(_kernel, tile=tile, block=block, splits=splits, group=group, width=up_to_power(dim)),
        [query.reshape(*flat, dim), key, value, positions, tables],
        results,
        grid=(tiles, splits, batch * kv_heads),
        name="flash_attention",
        cost=KernelCost(
            flops=4.0 * batch * kv_heads * seen * tile * dim,
            bytes=2.0 * batch * kv_heads * seen * dim * key.dtype.itemsize
            + query.size * (query.dtype.itemsize + (query.dtype.itemsize if whole else 4.0 * splits)),
        ),
        schedule=schedule,
        interpret=interpret,
    )
    if not whole:
        # a split without visible keys has the least maximum and adds nothing
        top, total = sums
        weight = jnp.exp(top - top.max(axis=0))
        output = (output * weight[..., None]).sum(axis=0) / (total * weight).sum(axis=0)[..., None]
    return output.reshape(query.shape).astype(query.dtype)


def _keys_read(last: int, seq: int, queries: float, tiles: int) -> float:
    """By all tiles of a row and key head: each up to its last query, where the row's last one sees `last`."""
    before = max(0, last - seq)
    return sum(min(last, before + min(seq, (number + 1) * queries)) for number in range(tiles))


def _kernel(q_ref, k_ref, v_ref, p_ref, t_ref, out_ref, *sum_refs, tile, block, splits, group, width):
    number, split, pair = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    pages, page, kv_heads, dim = k_ref.shape
    row, head = pair // kv_heads, pair % kv_heads
    heads = kv_heads * group
    mine = number * tile + jnp.arange(tile)
    held = mine < q_ref.shape[1] // kv_heads
    # row r of a key head is query r // group, by head r % group of its group; others point behind the last
    # line, where nothing is read or written
    lines = jnp.where(held, mine // group * heads + head * group + mine % group, q_ref.shape[1])
    across = jnp.arange(width) < dim if width > dim else None

    def mask(lines: jax.Array) -> jax.Array:
        return lines[:, None] if across is None else lines[:, None] & across[None, :]

    columns = pl.ds(0, width)
    # array indices only: an interpreted kernel has no mixed ones
    where = jnp.broadcast_arrays(row, lines[:, None], jnp.arange(width)[None, :])
    query = plt.load(q_ref.at[*where], mask=jnp.broadcast_to(mask(held), (tile, width)), other=0)
    positions = plt.load(p_ref.at[*jnp.broadcast_arrays(row, mine // group)], mask=held, other=-1)
    seen = jnp.max(positions) + 1
    # whole blocks a split, of the keys that this tile sees
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
    inside = jnp.broadcast_to(mask(held), (tile, width))
    if splits == 1:
        plt.store(out_ref.at[*where], (output / total[:, None]).astype(out_ref.dtype), mask=inside)
        return
    plt.store(out_ref.at[*jnp.broadcast_arrays(split, *where)], output, mask=inside)
    for ref, values in zip(sum_refs, (top, total), strict=True):
        plt.store(ref.at[*jnp.broadcast_arrays(split, row, lines)], values, mask=held)

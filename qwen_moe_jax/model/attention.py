"""Full attention: grouped queries, rotary positions, KV cache.

By model with biases, q/k norm and a sigmoid output gate.

Scores exist for one block of keys at a time (online softmax: Milakov & Gimelshein, arXiv:1805.02867;
FlashAttention, arXiv:2205.14135), so memory grows with queries x block, not with queries x context.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.formats.cache import KVCache
from qwen_moe_jax.kernels.cpu.calls import native_append, native_attention
from qwen_moe_jax.kernels.flash_attention import attend
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.kernels.varying import vary_like
from qwen_moe_jax.model.linear import linears
from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.model.params import DtypePolicy, Weight, declare
from qwen_moe_jax.model.ranks import Ranks
from qwen_moe_jax.model.rotary import apply_rotary
from qwen_moe_jax.model.taps import NO_TAPS, Taps

KEY_BLOCK = 256


def blockwise_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    block: int = KEY_BLOCK,
) -> jax.Array:
    """Causal softmax attention of queries over keys and values in pages.

    Args:
        query: [batch, seq, heads, head_dim], compute dtype.
        key, value: [pages, page length, kv_heads, head_dim]; query head h reads kv head
            h // (heads / kv_heads).
        positions: int32 [batch, seq]; a query sees its row's positions 0 .. position, at -1 none.
        tables: int32 [batch, width], the pages of each row.
        block: keys a step, rounded to whole pages. Blocks behind the largest position are not touched.

    Returns:
        [batch, seq, heads, head_dim] in query.dtype; products accumulate and the softmax runs in
        float32.
    """
    batch, seq, heads, dim = query.shape
    page, kv_heads = key.shape[1:3]
    width = tables.shape[1]
    pages = min(max(1, block // page), width)
    block = pages * page
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # [batch, kv_heads, group * seq, dim]: one matrix product a kv head
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, dim).astype(key.dtype)
    rows = grouped.shape[2]
    last = positions.max(axis=1, keepdims=True)  # of each row
    row_positions = jnp.tile(positions, (1, rows // seq))[:, None, :, None]

    def one_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, output = carry
        # The last block may overlap the one before (the table need not be a multiple of it wide);
        # positions that were already counted are masked out.
        first = jnp.minimum(index * pages, width - pages)
        here = lax.dynamic_slice_in_dim(tables, first, pages, axis=1)
        slots = first * page + jnp.arange(block)
        # what a page holds behind its row's last token may be anything, and 0 times NaN is no 0
        written = (slots <= last)[..., None, None]
        k, v = (
            jnp.where(written, x.at[here].get(mode="clip").reshape(batch, block, kv_heads, dim), 0)
            for x in (key, value)
        )
        scores = jnp.einsum(
            "bnrd,btnd->bnrt", grouped, k, preferred_element_type=wide, precision=lax.Precision.HIGHEST
        ) * (dim**-0.5)
        visible = (slots <= row_positions) & (slots >= index * block)
        scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        correction = jnp.exp(top - new_top)
        total = total * correction + weights.sum(axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "bnrt,btnd->bnrd",
            weights.astype(v.dtype),
            v,
            preferred_element_type=wide,
            precision=lax.Precision.HIGHEST,
        )
        return new_top, total, output * correction + mixed

    start = tuple(
        vary_like(x, query, key, value, positions, tables)
        for x in (
            jnp.full((batch, kv_heads, rows, 1), jnp.finfo(wide).min, wide),
            jnp.zeros((batch, kv_heads, rows, 1), wide),
            jnp.zeros((batch, kv_heads, rows, dim), wide),
        )
    )
    blocks = jnp.minimum(positions.max() // block + 1, -(-width // pages))
    _, total, output = lax.fori_loop(0, blocks, one_block, start)
    output = (output / jnp.where(total > 0, total, 1)).reshape(batch, kv_heads, heads // kv_heads, seq, dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, dim).astype(query.dtype)


def attention_weights(query: jax.Array, key: jax.Array, positions: jax.Array, tables: jax.Array) -> jax.Array:
    """What each query reads of each key, to look at: float32 [batch, heads, seq, table width * page length].

    Arguments as of `blockwise_attention`.
    """
    batch, seq, heads, dim = query.shape
    page, kv_heads = key.shape[1:3]
    keys = key.at[tables].get(mode="clip").reshape(batch, -1, kv_heads, dim)
    places = jnp.arange(tables.shape[1] * page)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    keys = jnp.where((places <= positions.max(axis=1, keepdims=True))[..., None, None], keys, 0)
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, dim).astype(key.dtype)
    scores = jnp.einsum(
        "bsngd,btnd->bngst", grouped, keys, preferred_element_type=wide, precision=lax.Precision.HIGHEST
    )
    visible = places <= positions[:, None, None, :, None]
    scores = jnp.where(visible, scores * dim**-0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1).reshape(batch, heads, seq, -1).astype(jnp.float32)


def whole_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, tables: jax.Array
) -> jax.Array:
    """As `blockwise_attention`, with all scores in memory and without a loop, so that it has a gradient."""
    batch, seq, heads, dim = query.shape
    weights = attention_weights(query, key, positions, tables)
    values = value.at[tables].get(mode="clip").reshape(batch, weights.shape[-1], -1, dim)
    written = jnp.arange(weights.shape[-1]) <= positions.max(axis=1, keepdims=True)
    values = jnp.where(written[..., None, None], values, 0).astype(jnp.float32)
    groups = weights.reshape(batch, values.shape[2], -1, seq, weights.shape[-1])
    mixed = jnp.einsum("bngst,btnd->bsngd", groups, values, precision=lax.Precision.HIGHEST)
    return mixed.reshape(batch, seq, heads, dim).astype(query.dtype)


def append_keys(
    cache: KVCache, key: jax.Array, value: jax.Array, places: jax.Array, tables: jax.Array
) -> KVCache:
    """Writes new keys and values to their rows' pages.

    Args:
        cache: the pages.
        key, value: [batch, seq, kv_heads, head_dim].
        places: int32 [batch, seq], positions in the row. One that lies behind the table, or where it names no
            page, drops its token; that is where pads are sent.
        tables: int32 [batch, width], the pages of each row.
    """
    pages, length = cache.k.shape[:2]
    found = jnp.take_along_axis(tables, places // length, axis=1, mode="fill", fill_value=pages)
    return KVCache(
        k=cache.k.at[found, places % length].set(key.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[found, places % length].set(value.astype(cache.v.dtype), mode="drop"),
    )


class _Projection(Weight):
    """A matrix, with a bias where the model has one."""

    def __init__(self, shape: tuple[int, int], dtypes: DtypePolicy, *, biased: bool):
        super().__init__(shape, dtypes.matrix)
        if biased:
            self.bias = declare(shape[:1], dtypes.vector)


class Attention(nnx.Module):
    """Parameters of one full-attention layer; with an output gate `q_proj` rows are [query | gate] per head.

    How many heads there are is read from the parameters: a rank may hold some of them.
    """

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy, kernels: Kernels, ranks: Ranks):
        self.config = config
        self.kernels = kernels
        self.ranks = ranks
        hidden, dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * dim * (2 if config.attn_output_gate else 1)
        keys = config.num_key_value_heads * dim

        def projection(rows: int) -> _Projection:
            return _Projection((rows, hidden), dtypes, biased=config.qkv_bias)

        self.q_proj, self.k_proj, self.v_proj = projection(queries), projection(keys), projection(keys)
        self.o_proj = Weight((hidden, config.num_attention_heads * dim), dtypes.matrix)
        if config.qk_norm:
            self.q_norm = Weight((dim,), dtypes.vector)
            self.k_norm = Weight((dim,), dtypes.vector)

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        positions: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        tables: jax.Array,
        cache: KVCache,
        taps: Taps = NO_TAPS,
    ) -> tuple[jax.Array, KVCache]:
        """Mixes tokens by attention.

        Args:
            x: [batch, seq, hidden].
            valid: bool [batch, seq], a prefix of each row.
            positions: int32 [batch, seq], the place of each token in its row.
            rotary: (cos, sin), each [batch, seq, rotary_dim / 2].
            tables: int32 [batch, width], the pages of each row.
            cache: what came before.
            taps: points of the layer.

        Returns:
            (float32 [batch, seq, hidden], to be summed by `ranks.sum_heads`; the cache with this call's
            valid tokens).
        """
        batch, seq, _ = x.shape
        query, key, value = self._projected(x, (self.q_proj, self.k_proj, self.v_proj))
        gate = None
        if self.config.attn_output_gate:
            query, gate = jnp.split(query.reshape(batch, seq, -1, 2 * self.config.head_dim), 2, axis=-1)
        query = apply_rotary(self._normed(query, "q_norm"), *rotary)
        key = apply_rotary(self._normed(key, "k_norm"), *rotary)
        query, key, value = taps("queries", query), taps("keys", key), taps("values", value)

        places = self._places(valid, positions, tables, cache)
        # a pad sees what its row's last token does: nobody has written behind it
        last = positions[:, :1] + valid.sum(axis=1, keepdims=True, dtype=jnp.int32) - 1
        seen = jnp.minimum(positions, last)
        chosen = self.kernels.pick("attention", x.dtype.name, seq)
        if chosen == "native":
            mixed, cache = native_attention(
                query, key, value, seen, places, tables, cache, self.kernels.variant
            )
        else:
            cache = append_keys(cache, key, value, places, tables)
            if chosen == "flash":
                mixed = attend(
                    query,
                    cache.k,
                    cache.v,
                    seen,
                    tables,
                    interpret=self.kernels.interpret,
                    expected_keys=self.kernels.expected_keys,
                )
            elif chosen == "whole":
                mixed = whole_attention(query, cache.k, cache.v, seen, tables)
            else:
                mixed = blockwise_attention(query, cache.k, cache.v, seen, tables)
        if taps.captures("attention"):
            taps.keep("attention", attention_weights(query, cache.k, seen, tables))
        mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
        mixed = mixed.reshape(batch, seq, -1)
        return self.ranks.head_product(mixed, self.o_proj.matrix(), self.kernels), cache

    def remember(
        self,
        x: jax.Array,
        valid: jax.Array,
        positions: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        tables: jax.Array,
        cache: KVCache,
    ) -> KVCache:
        """The cache that `__call__` gives, without what its queries read."""
        key, value = self._projected(x, (self.k_proj, self.v_proj))
        key = apply_rotary(self._normed(key, "k_norm"), *rotary)
        places = self._places(valid, positions, tables, cache)
        if self.kernels.pick("attention", x.dtype.name, x.shape[1]) == "native":
            return native_append(key, value, places, tables, cache, self.kernels.variant)
        return append_keys(cache, key, value, places, tables)

    def _projected(self, x: jax.Array, projections: Sequence[_Projection]) -> list[jax.Array]:
        """Products of x [batch, seq, hidden], each [batch, seq, heads, head_dim] in x.dtype, biases added."""
        biased = self.config.qkv_bias
        # a bias is added before the product is rounded, as one operation does it
        wide = jnp.promote_types(x.dtype, jnp.float32) if biased else None
        matrices = [held.matrix() for held in projections]
        products = linears(x, matrices, [wide] * len(matrices), kernels=self.kernels)
        if biased:
            pairs = zip(products, projections, strict=True)
            products = [(product + held.bias[...]).astype(x.dtype) for product, held in pairs]
        return [product.reshape(*x.shape[:2], -1, self.config.head_dim) for product in products]

    def _normed(self, heads: jax.Array, norm: str) -> jax.Array:
        """[batch, seq, heads, head_dim] behind `q_norm` or `k_norm`, where the model has them."""
        c = self.config
        if not c.qk_norm:
            return heads
        return rms_norm(heads, getattr(self, norm).weight[...], c.rms_norm_eps, c.norm_offset)

    def _places(self, valid: jax.Array, positions: jax.Array, tables: jax.Array, cache: KVCache) -> jax.Array:
        """Where keys go: to their positions, and a pad's nowhere."""
        return jnp.where(valid, positions, tables.shape[1] * cache.k.shape[1])

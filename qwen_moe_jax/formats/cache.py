"""What sequences leave behind: keys and values in pages, recurrent states in slots. Explicit pytrees.

Both are pools that many rows share. A row finds its keys through a block table (PagedAttention, Kwon et al.,
arXiv:2309.06180): those of position p lie at page `tables[row, p // page length]`, place p % page length. Its
recurrent states lie at `slots[row]`. So rows of any lengths come and go while the arrays stay, and rows with
the same beginning may share the pages of it. `length` counts a row's valid tokens; what a page holds behind
them is never visible, so that pages need no clearing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig

# Tokens a page: one chunk of the delta rule, so that a prefill chunk may end at any page's border.
PAGE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after norm and rotation) and values of one full-attention layer."""

    k: jax.Array  # [pages, page length, kv_heads, head_dim]
    v: jax.Array  # [pages, page length, kv_heads, head_dim]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetCache:
    """Convolution inputs still in reach, and the recurrent states, of one Gated DeltaNet layer."""

    conv: jax.Array  # [slots, kernel - 1, channels]: the last valid tokens' inputs, oldest first
    state: jax.Array  # [slots, value_heads, key_dim, value_dim] float32, whatever the model dtype


LayerCache = KVCache | DeltaNetCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetInputs:
    """What one Gated DeltaNet layer is to write of tokens of which some will be taken back: with these, the
    first few are written once it is known how many (`GatedDeltaNet.accept`)."""

    mixed: jax.Array  # [rows, seq, channels], the convolution's inputs
    g: jax.Array  # float32 [rows, seq, value_heads], log decay; 0 for pads
    beta: jax.Array  # float32 [rows, seq, value_heads], write strength; 0 for pads


LookedAt = KVCache | DeltaNetInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where rows lie in the pools.

    Attributes:
        tables: int32 [rows, width], the pages of a row in order; an id that no page has stands for "none".
        slots: int32 [rows], each row's own; the number of slots stands for "none": what such a row reads
            means nothing, and it writes nothing.
        length: int32 [rows], valid tokens that a row has left behind.
    """

    tables: jax.Array
    slots: jax.Array
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridCache:
    """The pools, one entry a layer, and where the rows at hand lie in them."""

    layers: tuple[LayerCache, ...]
    rows: Placement

    @property
    def length(self) -> jax.Array:
        """int32 [rows], valid tokens that each row has left behind."""
        return self.rows.length

    def after(self, layers: list[LayerCache], valid: jax.Array) -> "HybridCache":
        """The cache with new pools, after the tokens of `valid` [rows, seq]."""
        length = self.rows.length + valid.sum(axis=1, dtype=jnp.int32)
        return HybridCache(tuple(layers), dataclasses.replace(self.rows, length=length))


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """Sizes of the pools of one layer of each kind, as one device or all of a mesh hold them.

    Attributes:
        kv_heads, head_dim: of a full-attention layer.
        conv_inputs, channels: of a convolution.
        value_heads, key_dim, value_dim: of a recurrent state.
    """

    kv_heads: int
    head_dim: int
    conv_inputs: int
    channels: int
    value_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: ModelConfig) -> "CacheSizes":
        """Of a model on one device."""
        return cls(
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            conv_inputs=config.linear_conv_kernel_dim - 1,
            channels=config.conv_channels,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )

    def pages(self, number: int, dtype: jnp.dtype) -> KVCache:
        """Empty pages of a full-attention layer."""
        shape = (number, PAGE, self.kv_heads, self.head_dim)
        return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    def states(self, number: int, conv_dtype: jnp.dtype) -> DeltaNetCache:
        """States of a Gated DeltaNet layer that have seen nothing."""
        state = (number, self.value_heads, self.key_dim, self.value_dim)
        return DeltaNetCache(
            conv=jnp.zeros((number, self.conv_inputs, self.channels), conv_dtype),
            state=jnp.zeros(state, jnp.float32),
        )


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of a row."""
    return -(-tokens // PAGE)


def empty_layers(
    kinds: tuple[str, ...],
    sizes: CacheSizes,
    pages: int,
    slots: int,
    kv_dtype: jnp.dtype,
    conv_dtype: jnp.dtype,
) -> tuple[LayerCache, ...]:
    """Pools that have seen nothing, one a layer.

    Args:
        kinds: of the layers, as `ModelConfig.layer_types`.
        sizes: of a layer.
        pages: of keys and values, for all rows together.
        slots: of recurrent states.
        kv_dtype: dtype that keys and values are held in.
        conv_dtype: the model's compute dtype.
    """
    return tuple(
        sizes.pages(pages, kv_dtype) if kind == FULL_ATTENTION else sizes.states(slots, conv_dtype)
        for kind in kinds
    )


def bytes_of(layers: tuple[LayerCache, ...]) -> tuple[int, int]:
    """Bytes of (keys and values, recurrent states and convolution inputs) of all layers' pools."""
    kv, states = (
        sum(
            x.size * x.dtype.itemsize
            for layer in layers
            if isinstance(layer, kind)
            for x in jax.tree.leaves(layer)
        )
        for kind in (KVCache, DeltaNetCache)
    )
    return kv, states


def states_of(layers: tuple[LayerCache, ...]) -> tuple[DeltaNetCache, ...]:
    """The pools of recurrent states among those of all layers."""
    return tuple(layer for layer in layers if isinstance(layer, DeltaNetCache))


def with_states(layers: tuple[LayerCache, ...], states: tuple[DeltaNetCache, ...]) -> tuple[LayerCache, ...]:
    """All layers' pools with other ones of recurrent states."""
    rest = iter(states)
    return tuple(next(rest) if isinstance(layer, DeltaNetCache) else layer for layer in layers)


def own_rows(batch: int, capacity: int, ranks: int = 1) -> Placement:
    """Rows that each have a slot and pages of their own, in order, and have seen nothing.

    Args:
        batch: rows.
        capacity: tokens a row has pages for, at least.
        ranks: that the rows are divided among; pages and slots are counted on each rank by itself.
    """
    width, here = pages_for(capacity), batch // ranks
    slots = jnp.tile(jnp.arange(here, dtype=jnp.int32), ranks)
    return Placement(
        tables=slots[:, None] * width + jnp.arange(width, dtype=jnp.int32),
        slots=slots,
        length=jnp.zeros(batch, jnp.int32),
    )


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, kv_dtype: jnp.dtype, conv_dtype: jnp.dtype
) -> HybridCache:
    """A cache of one device with room for `capacity` tokens in each of `batch` rows, which has seen nothing.

    Args:
        config: the model's.
        batch: rows.
        capacity: tokens a row may hold.
        kv_dtype, conv_dtype: as of `empty_layers`.
    """
    pages = batch * pages_for(capacity)
    layers = empty_layers(config.layer_types, CacheSizes.of(config), pages, batch, kv_dtype, conv_dtype)
    return HybridCache(layers, own_rows(batch, capacity))

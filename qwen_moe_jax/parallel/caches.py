"""Where the caches of a model on a mesh lie: pages and states with their rows, heads with their ranks."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen_moe_jax.config import FULL_ATTENTION
from qwen_moe_jax.formats.cache import (
    CacheSizes,
    DeltaNetCache,
    DeltaNetInputs,
    HybridCache,
    KVCache,
    LayerCache,
    LookedAt,
    Placement,
    own_rows,
    pages_for,
)
from qwen_moe_jax.formats.cache import empty_layers as pools_of
from qwen_moe_jax.parallel.layout import Layout


def spec_of(*axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes of an array, spelt as JAX spells a result's: without the dimensions behind the last one
    divided. A step that is compiled for arrays as they are made then takes what it gives, too."""
    while axes and not axes[-1]:
        axes = axes[:-1]
    return PartitionSpec(*(each or None for each in axes))


def cache_specs(layout: Layout, kinds: tuple[str, ...] | None = None) -> HybridCache:
    """The mesh axes of every array of a cache. Pages and slots are divided as rows are: a row's keys and
    states lie with the row.

    Args:
        kinds: of the layers, as `ModelConfig.layer_types`; None for the model's own.
    """
    batch, heads = layout.batch_axes, layout.head_axes
    kv: Any = spec_of(batch, (), heads)
    conv: Any = spec_of(batch, (), heads)
    state: Any = spec_of(batch, heads)
    layers = tuple(
        KVCache(k=kv, v=kv) if kind == FULL_ATTENTION else DeltaNetCache(conv=conv, state=state)
        for kind in (layout.config.layer_types if kinds is None else kinds)
    )
    each: Any = spec_of(batch)
    return HybridCache(layers, Placement(tables=each, slots=each, length=each))


def looked_at_specs(layout: Layout) -> tuple[LookedAt, ...]:
    """The mesh axes of what `Decoder.look` gives."""
    of_token: Any = spec_of(layout.batch_axes, (), layout.head_axes)
    inputs = DeltaNetInputs(mixed=of_token, g=of_token, beta=of_token)
    layers = cache_specs(layout).layers
    return tuple(layer if isinstance(layer, KVCache) else inputs for layer in layers)


def empty_cache(
    layout: Layout, batch: int, capacity: int, kv_dtype: jnp.dtype, conv_dtype: jnp.dtype
) -> HybridCache:
    """A cache that has seen nothing. Arguments as `formats.cache.empty_cache`; to be called inside
    `jax.jit`."""
    layers = empty_layers(layout, batch * pages_for(capacity), batch, kv_dtype, conv_dtype)
    return HybridCache(layers, own_rows(batch, capacity, layout.batch_multiple))


def empty_layers(
    layout: Layout,
    pages: int,
    slots: int,
    kv_dtype: jnp.dtype,
    conv_dtype: jnp.dtype,
    kinds: tuple[str, ...] | None = None,
) -> tuple[LayerCache, ...]:
    """Pools of the whole mesh, every rank's heads behind one another. Arguments as
    `formats.cache.empty_layers`, kinds as of `cache_specs`; to be called inside `jax.jit`."""
    c, s = layout.config, layout.splits
    sizes = dataclasses.replace(
        CacheSizes.of(c),
        kv_heads=s["kv"].size // c.head_dim,
        channels=s["qkv"].size,
        value_heads=s["value_head"].size,
    )
    return pools_of(c.layer_types if kinds is None else kinds, sizes, pages, slots, kv_dtype, conv_dtype)

"""What a sequence leaves behind: keys and values, or a recurrent state. Explicit pytrees.

A row's slot in the key/value cache is the token's position. `length` counts a row's valid tokens; the
slots behind it are never visible, so they need no clearing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after norm and rotation) and values of one full-attention layer."""

    k: jax.Array  # [batch, capacity, kv_heads, head_dim]
    v: jax.Array  # [batch, capacity, kv_heads, head_dim]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetCache:
    """Convolution inputs still in reach, and the recurrent state, of one Gated DeltaNet layer."""

    conv: jax.Array  # [batch, kernel - 1, channels]: the last valid tokens' inputs, oldest first
    state: jax.Array  # [batch, value_heads, key_dim, value_dim] float32, whatever the model dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridCache:
    """One entry a layer, and how many valid tokens each row has seen."""

    layers: tuple[KVCache | DeltaNetCache, ...]
    length: jax.Array  # [batch] int32

    @property
    def capacity(self) -> int | None:
        """Tokens a row can hold, or None when no layer keeps keys (all layers are recurrent)."""
        sizes = {layer.k.shape[1] for layer in self.layers if isinstance(layer, KVCache)}
        return sizes.pop() if sizes else None


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, kv_dtype: jnp.dtype, conv_dtype: jnp.dtype
) -> HybridCache:
    """A cache that has seen nothing.

    Args:
        config: the model's.
        batch: rows.
        capacity: tokens a row may hold.
        kv_dtype: dtype that keys and values are held in.
        conv_dtype: the model's compute dtype.
    """
    layers: list[KVCache | DeltaNetCache] = []
    for kind in config.layer_types:
        if kind == FULL_ATTENTION:
            shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
            layers.append(KVCache(k=jnp.zeros(shape, kv_dtype), v=jnp.zeros(shape, kv_dtype)))
        else:
            conv = (batch, config.linear_conv_kernel_dim - 1, config.conv_channels)
            state = (
                batch,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
            )
            layers.append(
                DeltaNetCache(conv=jnp.zeros(conv, conv_dtype), state=jnp.zeros(state, jnp.float32))
            )
    return HybridCache(layers=tuple(layers), length=jnp.zeros(batch, jnp.int32))

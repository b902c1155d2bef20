"""The text model, top to bottom: embedding, decoder layers, final norm, output projection."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig
from qwen_moe_jax.model.attention import GatedAttention
from qwen_moe_jax.model.cache import DeltaNetCache, HybridCache, KVCache
from qwen_moe_jax.model.delta_net import GatedDeltaNet
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.model.params import DtypePolicy, Weight
from qwen_moe_jax.model.rotary import rotary_tables


@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens at hand.

    Attributes:
        valid: bool [batch, seq], a prefix of each row.
        positions: int32 [batch, seq], each token's slot in the caches.
        rotary: (cos, sin), float32 [batch, seq, rotary_dim / 2].
    """

    valid: jax.Array
    positions: jax.Array
    rotary: tuple[jax.Array, jax.Array]


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: token mixer, then mixture of experts."""

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy, backend: str, kind: str):
        self.eps = config.rms_norm_eps
        self.compute = dtypes.compute
        self.input_layernorm = Weight((config.hidden_size,), dtypes.vector)
        if kind == FULL_ATTENTION:
            self.self_attn = GatedAttention(config, dtypes)
        else:
            self.linear_attn = GatedDeltaNet(config, dtypes)
        self.post_attention_layernorm = Weight((config.hidden_size,), dtypes.vector)
        self.mlp = SparseMoe(config, dtypes, backend)

    def __call__(
        self, x: jax.Array, step: Step, cache: KVCache | DeltaNetCache
    ) -> tuple[jax.Array, KVCache | DeltaNetCache]:
        """The residual stream, float32 [batch, seq, hidden] -> (the same, the layer's cache after it)."""
        normed = rms_norm(x, self.input_layernorm.weight[...], self.eps).astype(self.compute)
        if isinstance(cache, KVCache):
            mixed, cache = self.self_attn(normed, step.valid, step.positions, step.rotary, cache)
        else:
            mixed, cache = self.linear_attn(normed, step.valid, cache)
        x = x + mixed
        normed = rms_norm(x, self.post_attention_layernorm.weight[...], self.eps).astype(self.compute)
        return x + self.mlp(normed, step.valid), cache


class Decoder(nnx.Module):
    """The whole text model.

    Its parameters' paths and shapes are those of a checkpoint, without the `model.` prefix.
    """

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy, backend: str):
        """Declares the parameters (build it under `nnx.eval_shape` to allocate nothing).

        Args:
            config: the model's.
            dtypes: what activations and weights are held in.
            backend: the platform the functions are compiled for ("cpu", "rocm", ...): it decides
                which expert product is used, not what is computed.
        """
        self.config = config
        self.dtypes = dtypes
        self.embed_tokens = Weight((config.vocab_size, config.hidden_size), dtypes.matrix)
        self.layers = nnx.List([DecoderLayer(config, dtypes, backend, kind) for kind in config.layer_types])
        self.norm = Weight((config.hidden_size,), dtypes.vector)
        if not config.tie_word_embeddings:
            self.lm_head = Weight((config.vocab_size, config.hidden_size), dtypes.matrix)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        rope_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, HybridCache]:
        """Runs new tokens through all layers, after whatever the cache holds.

        Args:
            tokens: int32 [batch, seq].
            valid: bool [batch, seq]: row b's first n_b are tokens, the rest pads (n_b may be 0).
            cache: with room for the valid tokens; what does not fit is lost, so the caller checks.
            rope_positions: int32 [3, batch, seq] (temporal, height, width); None means text, where all
                three equal the token's position.

        Returns:
            (hidden states after the final norm [batch, seq, hidden] in the compute dtype, the cache).
            Pads' hidden states mean nothing.
        """
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        rotary = rotary_tables(self.config, positions if rope_positions is None else rope_positions)
        step = Step(valid=valid, positions=positions, rotary=rotary)
        # The residual stream is float32 whatever the compute dtype: it sums up every layer, and rounding it
        # each time would be the largest error of a bfloat16 model.
        x = self.embed_tokens.weight[...][tokens].astype(jnp.float32)
        # A pad's embedding is zeroed so that no token id, however odd, can put a NaN into a product.
        x = jnp.where(valid[..., None], x, 0)
        layers = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = layer(x, step, layer_cache)
            layers.append(layer_cache)
        hidden = rms_norm(x, self.norm.weight[...], self.config.rms_norm_eps).astype(self.dtypes.compute)
        return hidden, HybridCache(
            layers=tuple(layers), length=cache.length + valid.sum(axis=1, dtype=jnp.int32)
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., hidden] -> float32 logits [..., vocab], rounded to the compute dtype first."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(hidden, head.weight[...]).astype(jnp.float32)


def abstract_decoder(config: ModelConfig, dtypes: DtypePolicy, backend: str) -> Decoder:
    """A decoder whose parameters are shapes and dtypes only."""
    return nnx.eval_shape(lambda: Decoder(config, dtypes, backend))


def named_parameters(decoder: Decoder) -> dict[str, Any]:
    """Canonical name (checkpoint key without its prefix, `layers.0.mlp.gate.weight`) -> array.

    Of an abstract decoder, the values are `jax.ShapeDtypeStruct`s.
    """
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def with_parameters(decoder: Decoder, parameters: dict[str, jax.Array]) -> Decoder:
    """The same decoder holding these arrays; the names must be exactly `named_parameters`'."""
    graphdef, state = nnx.split(decoder)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(parameters[".".join(map(str, path))])) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))

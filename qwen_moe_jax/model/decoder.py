"""The text model, top to bottom: embedding, decoder layers, final norm, output projection."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import FULL_ATTENTION, SPARSE, LayerKind, ModelConfig
from qwen_moe_jax.formats.cache import (
    DeltaNetCache,
    DeltaNetInputs,
    HybridCache,
    KVCache,
    LayerCache,
    LookedAt,
    Placement,
)
from qwen_moe_jax.formats.codes import MatrixFormat
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.attention import Attention
from qwen_moe_jax.model.delta_net import GatedDeltaNet
from qwen_moe_jax.model.dense import DenseMlp
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.model.params import DtypePolicy, Weight
from qwen_moe_jax.model.ranks import OneDevice, Ranks
from qwen_moe_jax.model.rotary import rotary_tables
from qwen_moe_jax.model.taps import NO_TAPS, Edit, Taps, Tokens

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer needs to know of the tokens at hand.

    Attributes:
        valid: bool [batch, seq], a prefix of each row.
        positions: int32 [batch, seq], each token's place in its row.
        rotary: (cos, sin), float32 [batch, seq, rotary_dim / 2].
        rows: where each row lies in the caches.
        taps: points of the pass.
        scattered: the residual stream is (`Ranks.scatters`); everything here is of all tokens.
    """

    valid: jax.Array
    positions: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    rows: Placement
    taps: Taps = NO_TAPS
    scattered: bool = False

    def at_layer(self, index: int) -> "Step":
        """With the points of one layer."""
        return dataclasses.replace(self, taps=self.taps.within(f"layers.{index}"))


def step_after(
    config: ModelConfig, valid: jax.Array, rows: Placement, rope_positions: jax.Array | None = None
) -> Step:
    """What layers need to know of tokens that follow those of `rows`; the rest as of `Decoder`."""
    positions = rows.length[:, None] + jnp.arange(valid.shape[1], dtype=jnp.int32)
    rotary = rotary_tables(config, positions if rope_positions is None else rope_positions)
    return Step(valid=valid, positions=positions, rotary=rotary, rows=rows)


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: token mixer, then MLP, of the kinds that `kind` names."""

    def __init__(
        self,
        config: ModelConfig,
        dtypes: DtypePolicy,
        kernels: Kernels,
        kind: LayerKind,
        ranks: Ranks,
        *,
        fused: bool,
    ):
        self.config = config
        self.ranks = ranks
        self.compute = dtypes.compute
        self.input_layernorm = Weight((config.hidden_size,), dtypes.vector)
        if kind.mixer == FULL_ATTENTION:
            self.self_attn = Attention(config, dtypes, kernels, ranks)
        else:
            self.linear_attn = GatedDeltaNet(config, dtypes, kernels, ranks)
        self.post_attention_layernorm = Weight((config.hidden_size,), dtypes.vector)
        self.point = "moe" if kind.mlp == SPARSE else "mlp"
        self.mlp = (
            SparseMoe(config, dtypes, kernels, ranks, fused=fused)
            if kind.mlp == SPARSE
            else DenseMlp(config, dtypes, kernels, ranks)
        )

    def mix(self, x: jax.Array, step: Step, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """What attention or Gated DeltaNet adds to the residual stream x, and the cache after it."""
        with jax.named_scope("gated_attention" if isinstance(cache, KVCache) else "gated_delta_net"):
            normed = self._normed(x, self.input_layernorm)
            if step.scattered:
                normed = self.ranks.all_tokens(normed)
            if isinstance(cache, KVCache):
                part, cache = self.self_attn(
                    normed, step.valid, step.positions, step.rotary, step.rows.tables, cache, step.taps
                )
            else:
                part, cache = self.linear_attn(normed, step.valid, step.rows.slots, cache, step.taps)
            return step.taps("mixer", self.ranks.sum_heads(part, scattered=step.scattered)), cache

    def look(self, x: jax.Array, step: Step, cache: LayerCache) -> tuple[jax.Array, LookedAt]:
        """As `__call__` for a few tokens, of which a Gated DeltaNet layer writes nothing yet."""
        if isinstance(cache, KVCache):
            mixed, looked = self.mix(x, step, cache)
            assert isinstance(looked, KVCache)
        else:
            with jax.named_scope("gated_delta_net"):
                normed = self._normed(x, self.input_layernorm)
                part, looked = self.linear_attn.look(normed, step.valid, step.rows.slots, cache)
                mixed = self.ranks.sum_heads(part)
        x = x + mixed
        return x + self.feed(x, step.valid), looked

    def remember(self, x: jax.Array, step: Step, cache: KVCache) -> KVCache:
        """The cache after an attention layer, without what its queries read."""
        with jax.named_scope("gated_attention"):
            normed = self._normed(x, self.input_layernorm)
            return self.self_attn.remember(
                normed, step.valid, step.positions, step.rotary, step.rows.tables, cache
            )

    def feed(
        self, x: jax.Array, valid: jax.Array, taps: Taps = NO_TAPS, *, scattered: bool = False
    ) -> jax.Array:
        """What the MLP adds to the residual stream x; valid, taps and scattered as of `Step`."""
        normed = self._normed(x, self.post_attention_layernorm)
        return taps(self.point, self.mlp(normed, valid, taps, scattered=scattered))

    def router_logits(self, x: jax.Array) -> jax.Array:
        """By which a layer with a mixture of experts chooses, float32 [batch, seq, experts]."""
        assert isinstance(self.mlp, SparseMoe)
        return self.mlp.router_logits(self._normed(x, self.post_attention_layernorm))

    def _normed(self, x: jax.Array, norm: Weight) -> jax.Array:
        """[batch, seq, hidden] in the compute dtype."""
        c = self.config
        return rms_norm(x, norm.weight[...], c.rms_norm_eps, c.norm_offset).astype(self.compute)

    def __call__(self, x: jax.Array, step: Step, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """The residual stream, float32 [batch, seq, hidden] or a rank's tokens of it -> (the same; the
        layer's cache after it)."""
        x = step.taps("residual", x)
        mixed, cache = self.mix(x, step, cache)
        x = step.taps("residual_mid", x + mixed)
        fed = self.feed(x, step.valid, step.taps, scattered=step.scattered)
        return step.taps("residual_out", x + fed), cache


class Decoder(nnx.Module):
    """The whole text model.

    Its parameters' paths and shapes are those of a checkpoint, without the `model.` prefix.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtypes: DtypePolicy,
        kernels: Kernels,
        ranks: Ranks = OneDevice(),  # noqa: B008  frozen
        *,
        fused: bool = False,
    ):
        """Declares the parameters (build it under `nnx.eval_shape` to allocate nothing).

        Args:
            config: the model's.
            dtypes: what activations and weights are held in.
            kernels: what the functions are compiled for: it decides which implementation of an operation
                runs, not what is computed.
            ranks: who computes together.
            fused: the shared expert is the last slot of the expert stacks.
        """
        self.config = config
        self.dtypes = dtypes
        self.kernels = kernels
        self.ranks = ranks
        self.embed_tokens = Weight((config.vocab_size, config.hidden_size), dtypes.matrix)
        self.layers = nnx.List(
            [DecoderLayer(config, dtypes, kernels, kind, ranks, fused=fused) for kind in config.layers]
        )
        self.norm = Weight((config.hidden_size,), dtypes.vector)
        if not config.tie_word_embeddings:
            self.lm_head = Weight((config.vocab_size, config.hidden_size), dtypes.matrix)

    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        rope_positions: jax.Array | None = None,
        taps: Taps = NO_TAPS,
    ) -> tuple[jax.Array, HybridCache]:
        """Runs new tokens through all layers, after whatever the cache holds.

        Args:
            tokens: int32 [batch, seq].
            valid: bool [batch, seq]: row b's first n_b are tokens, the rest pads (n_b may be 0).
            cache: with room for the valid tokens; what does not fit is lost, so the caller checks.
            rope_positions: int32 [3, batch, seq] (temporal, height, width); None means text, where all
                three equal the token's position.
            taps: points of this pass to capture or replace.

        Returns:
            (hidden states after the final norm [batch, seq, hidden] in the compute dtype, the cache).
            Pads' hidden states mean nothing.
        """
        # points are of all tokens
        scattered = taps is NO_TAPS and self.ranks.scatters(*tokens.shape)
        step = self.step(valid, cache.rows, rope_positions)
        step = dataclasses.replace(step, taps=taps, scattered=scattered)
        x = taps("embedding", self.embed(tokens, valid, scattered=scattered))
        layers = []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x, layer_cache = layer(x, step.at_layer(index), layer_cache)
            layers.append(layer_cache)
        hidden = self.finish(x)
        if scattered:
            hidden = self.ranks.all_tokens(hidden)
        return taps("hidden", hidden), cache.after(layers, valid)

    def look(
        self, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, tuple[LookedAt, ...]]:
        """Runs a few tokens of which some will be taken back: drafts, to be verified.

        Keys and values are written: those behind a row's length are never read. Recurrent states and
        convolution inputs stay as they are until `accept`.

        Args:
            tokens, valid, cache: as of `__call__`.

        Returns:
            (hidden states as of `__call__`, what `accept` takes).
        """
        step = self.step(valid, cache.rows)
        x = self.embed(tokens, valid)
        looked = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, one = layer.look(x, step, layer_cache)
            looked.append(one)
        return self.finish(x), tuple(looked)

    def accept(
        self,
        looked: tuple[LookedAt, ...],
        counts: jax.Array,
        slots: jax.Array,
        layers: tuple[LayerCache, ...],
    ) -> tuple[LayerCache, ...]:
        """Writes the first tokens of a `look`.

        Args:
            looked: its result.
            counts: int32 [batch], tokens of each row that stay.
            slots: int32 [batch], each row's own.
            layers: the pools as they were for it.

        Returns:
            the pools after these tokens.
        """
        written: list[LayerCache] = []
        for layer, one, before in zip(self.layers, looked, layers, strict=True):
            if isinstance(one, DeltaNetInputs):
                assert isinstance(before, DeltaNetCache)
                with jax.named_scope("gated_delta_net"):
                    written.append(layer.linear_attn.accept(one, counts, slots, before))
            else:
                written.append(one)
        return tuple(written)

    def step(self, valid: jax.Array, rows: Placement, rope_positions: jax.Array | None = None) -> Step:
        """What the layers need to know of tokens that follow those of `rows`."""
        return step_after(self.config, valid, rows, rope_positions)

    def embed(self, tokens: jax.Array, valid: jax.Array, *, scattered: bool = False) -> jax.Array:
        """Token ids [batch, seq] -> the residual stream before the first layer, float32; where it is
        scattered, this rank's tokens of it."""
        # The residual stream is float32 whatever the compute dtype: it sums up every layer, and rounding it
        # each time would be the largest error of a bfloat16 model.
        with jax.named_scope("embedding"):
            x = self.ranks.embed(self.embed_tokens.weight[...], tokens, self.kernels, scattered=scattered)
            valid = self.ranks.own_tokens(valid) if scattered else valid
            # A pad's embedding is zeroed so that no token id, however odd, can put a NaN into a product.
            return jnp.where(valid[..., None], x, 0)

    def finish(self, x: jax.Array) -> jax.Array:
        """The residual stream behind the last layer -> hidden states, in the compute dtype."""
        c = self.config
        return rms_norm(x, self.norm.weight[...], c.rms_norm_eps, c.norm_offset).astype(self.dtypes.compute)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., hidden] -> float32 logits [..., vocab], rounded to the compute dtype first."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with jax.named_scope("lm_head"):
            # rounded before they are gathered: half the bytes, the same numbers
            logits = linear(hidden, head.weight[...], kernels=self.kernels)
            return self.ranks.whole_vocabulary(logits).astype(jnp.float32)


def abstract_decoder(
    config: ModelConfig,
    dtypes: DtypePolicy,
    kernels: Kernels,
    ranks: Ranks = OneDevice(),  # noqa: B008  frozen
    *,
    fused: bool = False,
    forms: Mapping[str, MatrixFormat] | None = None,
) -> Decoder:
    """A decoder whose parameters are shapes and dtypes only; arguments as `Decoder`'s.

    The shapes are those of a whole checkpoint; `with_parameters` takes any rank's part of them.

    Args:
        config, dtypes, kernels, ranks, fused: as there.
        forms: canonical names of the matrices that are codes with scales -> their format.
    """
    return abstract(lambda: Decoder(config, dtypes, kernels, ranks, fused=fused), dtypes, kernels, forms)


def abstract(
    build: Callable[[], Module],
    dtypes: DtypePolicy,
    kernels: Kernels,
    forms: Mapping[str, MatrixFormat] | None,
) -> Module:
    """What `build` gives, of shapes and dtypes only; the rest as of `abstract_decoder`."""

    def declared() -> Module:
        module = build()
        for name, form in (forms or {}).items():
            *path, attribute = name.split(".")
            holder: Any = module
            for step in path:
                holder = holder[int(step)] if step.isdigit() else getattr(holder, step)
            holder.scale_in_blocks(attribute, form, dtypes.matrix, kernels.widening)
        return module

    return nnx.eval_shape(declared)


def named_parameters(module: nnx.Module) -> dict[str, Any]:
    """Canonical name (checkpoint key without its prefix, `layers.0.mlp.gate.weight`) -> array.

    Of an abstract decoder, or module of it, the values are `jax.ShapeDtypeStruct`s.
    """
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def with_parameters(module: Module, parameters: Mapping[str, jax.Array]) -> Module:
    """The same decoder, or module of it, holding these arrays; the names must be those of its parameters."""
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(parameters[".".join(map(str, path))])) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def run_tapped(
    decoder: Decoder,
    parameters: Mapping[str, jax.Array],
    tokens: jax.Array,
    valid: jax.Array,
    cache: HybridCache,
    edits: Mapping[str, Edit],
    wanted: frozenset[str] = frozenset(),
    at: jax.Array | None = None,
) -> tuple[jax.Array, HybridCache, dict[str, Any]]:
    """`Decoder.__call__` with the parameters that one device, or one rank of a mesh, holds.

    Args:
        decoder: abstract, or filled with others.
        parameters: by canonical name.
        tokens, valid, cache: as there.
        edits: point -> what replaces its value.
        wanted: points to capture.
        at: as of `Taps`.

    Returns:
        (hidden states; the cache; point -> captured value).
    """
    taps = NO_TAPS
    if edits or wanted:
        positions = cache.rows.length[:, None] + jnp.arange(valid.shape[1], dtype=jnp.int32)
        taps = Taps(wanted, edits, Tokens(tokens, positions, valid), at)
    hidden, cache = with_parameters(decoder, parameters)(tokens, valid, cache, taps=taps)
    return hidden, cache, taps.found

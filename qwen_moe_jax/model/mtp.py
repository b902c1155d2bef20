"""Multi-token prediction: one decoder layer that predicts the token after the next one.

At position i the text model has turned tokens 0 .. i into a hidden state h_i, from which the token i + 1 is
chosen. Given that token, with embedding e, this part predicts the one behind it:

    x_i = fc [norm_e(e_{i+1}) ; norm_h(h_i)]
    h'_i = norm(layer(x_i))        attending to x_0 .. x_i
    logits of token i + 2 = the text model's lm_head on h'_i

h is taken behind the text model's final norm. (DeepSeek-V3, arXiv:2412.19437, section 2.2, where the two
halves stand the other way round; the order here is the one of the published Qwen3.5 weights.) Slot and rotary
position of the pair (h_i, e_{i+1}) are i.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.formats.cache import HybridCache, KVCache, empty_cache
from qwen_moe_jax.formats.codes import MatrixFormat
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, DecoderLayer, abstract, step_after, with_parameters
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.norms import rms_norm
from qwen_moe_jax.model.params import DtypePolicy, Weight
from qwen_moe_jax.model.ranks import OneDevice, Ranks

MTP = "mtp."  # before the names of its parameters, where they stand beside the text model's


class MtpHead(nnx.Module):
    """The parameters of multi-token prediction, named as in a checkpoint without the `mtp.` prefix.

    Embedding and output matrix are the text model's: `decoder.embed` gives what goes in, `decoder.logits`
    takes what comes out.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        dtypes: DtypePolicy,
        kernels: Kernels,
        ranks: Ranks = OneDevice(),  # noqa: B008  frozen
        *,
        fused: bool = False,
    ):
        """Declares the parameters (build it under `nnx.eval_shape` to allocate nothing).

        Args:
            config: the text model's.
            layers: `mtp_num_hidden_layers` of config.json.
            dtypes, kernels, ranks, fused: as of `Decoder`.

        Raises:
            ConfigError: more or fewer layers than one. Published models have one; whether several are run
                behind each other, or one for each token that is drafted, is settled by none of them.
        """
        if layers != 1:
            raise ConfigError(
                f"mtp_num_hidden_layers is {layers}; only multi-token prediction of one layer is implemented."
            )
        hidden = config.hidden_size
        self.config = config
        self.dtypes = dtypes
        self.pre_fc_norm_embedding = Weight((hidden,), dtypes.vector)
        self.pre_fc_norm_hidden = Weight((hidden,), dtypes.vector)
        self.kernels = kernels
        self.fc = Weight((hidden, 2 * hidden), dtypes.matrix)
        self.layers = nnx.List([DecoderLayer(config, dtypes, kernels, config.mtp_kind, ranks, fused=fused)])
        self.norm = Weight((hidden,), dtypes.vector)

    def __call__(
        self,
        hidden: jax.Array,
        embedded: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        rope_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, HybridCache]:
        """Runs new pairs of hidden state and next token, after whatever the cache holds.

        Args:
            hidden: [batch, seq, hidden], the text model's behind its final norm (`Decoder.__call__`), or what
                this function returned for a token drafted before.
            embedded: [batch, seq, hidden], `decoder.embed` of the tokens that follow each of them.
            valid: bool [batch, seq]: row b's first n_b are pairs, the rest pads.
            cache: of `new_cache`, with room for the valid pairs; what does not fit is lost, so the caller
                checks.
            rope_positions: int32 [3, batch, seq], as of `Decoder.__call__`.

        Returns:
            (hidden states behind `norm`, [batch, seq, hidden] in the compute dtype, for `decoder.logits`; the
            cache). Pads' hidden states mean nothing.
        """
        step = step_after(self.config, valid, cache.rows, rope_positions)
        x = self._pairs(hidden, embedded, valid)
        layers = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = layer(x, step, layer_cache)
            layers.append(layer_cache)
        return self._normed(x, self.norm), cache.after(layers, valid)

    def remember(
        self, hidden: jax.Array, embedded: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> HybridCache:
        """The cache that `__call__` gives, without what the pairs themselves predict: only their keys and
        values are computed, since there is one layer."""
        (layer,), (layer_cache,) = self.layers, cache.layers
        assert isinstance(layer_cache, KVCache)
        after = layer.remember(
            self._pairs(hidden, embedded, valid), step_after(self.config, valid, cache.rows), layer_cache
        )
        return cache.after([after], valid)

    def _pairs(self, hidden: jax.Array, embedded: jax.Array, valid: jax.Array) -> jax.Array:
        """The residual stream before the layer, float32 [batch, seq, hidden]."""
        # A pad is zeroed on its way in, as in `Decoder.embed`.
        halves = (
            self._normed(jnp.where(valid[..., None], x, 0), norm)
            for x, norm in ((embedded, self.pre_fc_norm_embedding), (hidden, self.pre_fc_norm_hidden))
        )
        # The residual stream begins here; it is float32, as the text model's.
        pair = jnp.concatenate(list(halves), axis=-1)
        return linear(pair, self.fc.matrix(), jnp.float32, kernels=self.kernels)

    def _normed(self, x: jax.Array, norm: Weight) -> jax.Array:
        """[batch, seq, hidden] in the compute dtype."""
        c = self.config
        return rms_norm(x, norm.weight[...], c.rms_norm_eps, c.norm_offset).astype(self.dtypes.compute)

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` pairs; keys and values are held like the matrices."""
        config = self.config.with_layers((self.config.mtp_kind,) * len(self.layers))
        return empty_cache(config, batch, capacity, self.dtypes.matrix, self.dtypes.compute)


def abstract_mtp(
    config: ModelConfig,
    layers: int,
    dtypes: DtypePolicy,
    kernels: Kernels,
    forms: Mapping[str, MatrixFormat] | None = None,
    ranks: Ranks = OneDevice(),  # noqa: B008  frozen
    *,
    fused: bool = False,
) -> MtpHead:
    """A head whose parameters are shapes and dtypes only, for `with_parameters`.

    Arguments as `MtpHead`'s, and forms as of `abstract_decoder`.
    """
    return abstract(
        lambda: MtpHead(config, layers, dtypes, kernels, ranks, fused=fused), dtypes, kernels, forms
    )


def run_drafter(
    decoder: Decoder,
    drafter: MtpHead | None,
    parameters: Mapping[str, jax.Array],
    hidden: jax.Array,
    following: jax.Array,
    valid: jax.Array,
    cache: HybridCache,
) -> tuple[jax.Array, HybridCache]:
    """Drafts with the parameters that one device, or one rank of a mesh, holds.

    Args:
        decoder, drafter: abstract, or filled with others.
        parameters: by canonical name, the drafter's behind MTP.
        hidden, valid, cache: as of `MtpHead.__call__`.
        following: int32 [batch, seq], the token behind each of `hidden`.

    Returns:
        as of `MtpHead.__call__`.
    """
    embedded = with_parameters(decoder, parameters).embed(following, valid)
    with jax.named_scope("drafter"):
        return _filled(drafter, parameters)(hidden, embedded, valid, cache)


def drafter_keys(
    decoder: Decoder,
    drafter: MtpHead | None,
    parameters: Mapping[str, jax.Array],
    hidden: jax.Array,
    following: jax.Array,
    valid: jax.Array,
    cache: HybridCache,
) -> HybridCache:
    """`MtpHead.remember`, otherwise as `run_drafter`."""
    embedded = with_parameters(decoder, parameters).embed(following, valid)
    with jax.named_scope("drafter"):
        return _filled(drafter, parameters).remember(hidden, embedded, valid, cache)


def _filled(drafter: MtpHead | None, parameters: Mapping[str, jax.Array]) -> MtpHead:
    assert drafter is not None
    own = {name.removeprefix(MTP): value for name, value in parameters.items() if name.startswith(MTP)}
    return with_parameters(drafter, own)

"""The sparse mixture of experts: router, routed experts, and the shared expert with its gate.

    y = sum over the top-k experts e of p_e * MLP_e(x)  +  sigmoid(x . w_g) * MLP_shared(x)

with p the softmax over all experts, where the model says so renormalised over the chosen ones; not every
model has a shared expert (DeepSeekMoE, arXiv:2401.06066).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.experts import choose_experts
from qwen_moe_jax.model.linear import linear, linears
from qwen_moe_jax.model.params import DtypePolicy, MatrixHolder, Weight, declare
from qwen_moe_jax.model.ranks import Ranks
from qwen_moe_jax.model.taps import NO_TAPS, Routing, Taps


def route(logits: jax.Array, top_k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """Top-k routing.

    Args:
        logits: [tokens, experts], any float dtype.
        top_k: experts a token.
        renormalise: the weights of a token sum to one; otherwise they are probabilities over all experts.

    Returns:
        (expert_ids int32 [tokens, top_k], weights [tokens, top_k] in logits.dtype). Softmax and
        renormalisation are in float32.
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    weights, ids = lax.top_k(jax.nn.softmax(logits.astype(wide), axis=-1), top_k)
    if renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights.astype(logits.dtype)


def gated_mlp(
    x: jax.Array, gate: Matrix, up: Matrix, down: Matrix, kernels: Kernels | None = None
) -> jax.Array:
    """SwiGLU (Shazeer, arXiv:2002.05202): down(silu(gate x) * up x).

    x [tokens, hidden]; gate, up [intermediate, hidden]; down [hidden, intermediate] -> float32, like x.
    """
    gates, ups = linears(x, [gate, up], kernels=kernels)
    return linear(jax.nn.silu(gates) * ups, down, jnp.float32, kernels=kernels)


class Experts(MatrixHolder):
    """All routed experts: `gate_up_proj` [experts, 2 * intermediate, hidden] (gate rows first) and
    `down_proj` [experts, hidden, intermediate]."""

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy):
        experts, inner, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = declare((experts, 2 * inner, hidden), dtypes.matrix)
        self.down_proj = declare((experts, hidden, inner), dtypes.matrix)


class SharedExpert(nnx.Module):
    """The MLP that every token passes through."""

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy):
        inner, hidden = config.shared_expert_intermediate_size, config.hidden_size
        self.gate_proj = Weight((inner, hidden), dtypes.matrix)
        self.up_proj = Weight((inner, hidden), dtypes.matrix)
        self.down_proj = Weight((hidden, inner), dtypes.matrix)

    def __call__(self, x: jax.Array, kernels: Kernels) -> jax.Array:
        """[tokens, hidden] -> float32 [tokens, hidden]."""
        return gated_mlp(x, self.gate_proj.matrix(), self.up_proj.matrix(), self.down_proj.matrix(), kernels)


class SparseMoe(nnx.Module):
    """Parameters of one mixture-of-experts layer.

    With `fused`, the shared expert, if the model has one, is the last slot of the expert stacks instead of a
    module of its own.
    """

    def __init__(
        self, config: ModelConfig, dtypes: DtypePolicy, kernels: Kernels, ranks: Ranks, *, fused: bool = False
    ):
        self.config = config
        self.kernels = kernels
        self.ranks = ranks
        self.gate = Weight((config.num_experts, config.hidden_size), dtypes.matrix)
        self.experts = Experts(config, dtypes)
        self.has_shared = config.shared_expert_intermediate_size > 0
        if self.has_shared and not fused:
            self.shared_expert = SharedExpert(config, dtypes)
        if self.has_shared:
            self.shared_expert_gate = Weight((1, config.hidden_size), dtypes.matrix)

    def choose(self, x: jax.Array, valid: jax.Array, taps: Taps = NO_TAPS) -> tuple[jax.Array, jax.Array]:
        """Which experts each token goes to: (ids int32, weights float32), each [tokens, top_k].

        Pads (valid [tokens] false) go to none: their ids are num_experts.
        """
        with jax.named_scope("router"):
            logits = taps("router_logits", self.router_logits(x))
            c = self.config
            chosen = route(logits, c.num_experts_per_tok, renormalise=c.norm_topk_prob)
            routing = taps("router", Routing(*chosen))
            return jnp.where(valid[:, None], routing.ids, c.num_experts), routing.weights

    def router_logits(self, x: jax.Array) -> jax.Array:
        """float32 [..., experts]: rounded to bfloat16, near ties would choose other experts."""
        return linear(x, self.gate.weight[...], jnp.float32, kernels=self.kernels)

    def combine(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array, *, ranks: int = 1, by_slot: bool = False
    ) -> jax.Array:
        """The weighted outputs of the experts held here.

        Args:
            x: [tokens, hidden].
            ids: [tokens, slots], rows of the stacks held here; their number means "none".
            weights: float32 [tokens, slots].
            ranks: how many ranks the experts are divided among.
            by_slot: see below.

        Returns:
            float32 [tokens, hidden], the sum over slots; with by_slot [tokens, slots, hidden], not summed.
            This rank's part of a sum over the ranks, and typed as such.
        """
        c = self.config
        experts = choose_experts(
            self.kernels,
            x.dtype,
            x.shape[0],
            c.num_experts,
            c.num_experts_per_tok,
            ranks=ranks,
            by_slot=by_slot,
        )
        with jax.named_scope("experts"):
            outputs = experts(
                x, ids, weights, self.experts.matrix("gate_up_proj"), self.experts.matrix("down_proj")
            )
            return self.ranks.routed_part(outputs)

    def shared_weight(self, x: jax.Array) -> jax.Array:
        """The shared expert's gate, float32 [tokens, 1]."""
        return jax.nn.sigmoid(
            linear(x, self.shared_expert_gate.weight[...], jnp.float32, kernels=self.kernels)
        )

    def routed(self, x: jax.Array, valid: jax.Array, taps: Taps = NO_TAPS) -> jax.Array:
        """The routed sum on one device, float32 [tokens, hidden]; pads get zero."""
        ids, weights = self.choose(x, valid, taps)
        if taps.uses("experts"):
            return taps("experts", self.combine(x, ids, weights, by_slot=True)).sum(axis=1)
        return self.combine(x, ids, weights)

    def shared(self, x: jax.Array, taps: Taps = NO_TAPS) -> jax.Array:
        """The shared expert times its gate, float32 [tokens, hidden]: this rank's part, typed as such."""
        with jax.named_scope("shared_expert"):
            gate = taps("shared_gate", self.shared_weight(x))
            return self.ranks.shared_part(gate * taps("shared_expert", self.shared_expert(x, self.kernels)))

    def __call__(
        self, x: jax.Array, valid: jax.Array, taps: Taps = NO_TAPS, *, scattered: bool = False
    ) -> jax.Array:
        """What the layer adds to the residual stream: float32 like x, the rest as of `Ranks.mixture`."""
        return self.ranks.mixture(self, x, valid, taps.of_rows(*x.shape[:2]), scattered=scattered)

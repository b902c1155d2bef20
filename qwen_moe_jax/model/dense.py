"""The dense MLP, which every token passes through and nothing chooses."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.linear import linears
from qwen_moe_jax.model.params import DtypePolicy, Weight
from qwen_moe_jax.model.ranks import Ranks
from qwen_moe_jax.model.taps import NO_TAPS, Taps


class DenseMlp(nnx.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): down(silu(gate x) * up x).

    How many inner rows there are is read from the parameters: a rank may hold some of them. They are divided
    as heads are, and so is the sum.
    """

    def __init__(self, config: ModelConfig, dtypes: DtypePolicy, kernels: Kernels, ranks: Ranks):
        self.kernels = kernels
        self.ranks = ranks
        inner, hidden = config.intermediate_size, config.hidden_size
        self.gate_proj = Weight((inner, hidden), dtypes.matrix)
        self.up_proj = Weight((inner, hidden), dtypes.matrix)
        self.down_proj = Weight((hidden, inner), dtypes.matrix)

    def __call__(
        self, x: jax.Array, valid: jax.Array, taps: Taps = NO_TAPS, *, scattered: bool = False
    ) -> jax.Array:
        """x [batch, seq, hidden], of a scattered stream this rank's tokens -> float32 like x; what pads get
        means nothing.

        `valid` and `taps` are there for all MLPs: this one reads tokens one by one, and has no points inside.
        """
        del valid, taps
        with jax.named_scope("dense_mlp"):
            x = self.ranks.all_tokens(x) if scattered else x
            matrices = [self.gate_proj.matrix(), self.up_proj.matrix()]
            gates, ups = linears(x, matrices, kernels=self.kernels)
            part = self.ranks.head_product(jax.nn.silu(gates) * ups, self.down_proj.matrix(), self.kernels)
            return self.ranks.sum_heads(part, scattered=scattered).astype(jnp.float32)

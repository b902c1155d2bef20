"""What the model asks of the ranks that run it together.

On a mesh every rank runs the same model on the parameters it holds, and `parallel/` answers these
questions with collectives. One device holds everything, and its answers are plain.
"""

import dataclasses
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp

from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.cpu.calls import native_rows
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.linear import linear
from qwen_moe_jax.model.taps import NO_TAPS, Taps

if TYPE_CHECKING:
    from qwen_moe_jax.model.moe import SparseMoe


def embedding_rows(table: jax.Array, tokens: jax.Array, kernels: Kernels) -> jax.Array:
    """Rows of a table [rows, hidden] for int32 [batch, seq] -> float32 [batch, seq, hidden]."""
    if kernels.pick("embedding", table.dtype.name, tokens.size) == "native":
        return native_rows(table, tokens, kernels.variant)
    return table[tokens].astype(jnp.float32)


class Ranks(Protocol):
    """The questions. Implementations are hashable, because they are part of the compiled program."""

    def scatters(self, batch: int, seq: int) -> bool:
        """Whether the residual stream of so many tokens is *scattered*: each rank has an equal slice of every
        row's tokens (sequence parallelism, Korthikanti et al., arXiv:2205.05198)."""
        ...

    def own_tokens(self, x: jax.Array) -> jax.Array:
        """This rank's slice of a scattered stream: [batch, seq, ...] -> [batch, seq / ranks, ...]."""
        ...

    def all_tokens(self, x: jax.Array) -> jax.Array:
        """Every rank's slice of a scattered stream behind one another: back to [batch, seq, ...]."""
        ...

    def embed(
        self, table: jax.Array, tokens: jax.Array, kernels: Kernels, *, scattered: bool = False
    ) -> jax.Array:
        """Rows of the embedding [vocab, hidden] for int32 [batch, seq] -> float32 [batch, seq, hidden], or
        this rank's tokens of it."""
        ...

    def whole_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Logits over the rows of the output matrix held here -> over the vocabulary."""
        ...

    def head_product(self, x: jax.Array, weight: Matrix, kernels: Kernels) -> jax.Array:
        """The last product of a token mixer, whose contracted dimension are the heads held here, or of a
        dense MLP, where it is inner rows.

        [batch, seq, heads * dim] and [hidden, heads * dim] -> float32 [batch, seq, hidden], each rank's part.
        """
        ...

    def sum_heads(self, part: jax.Array, *, scattered: bool = False) -> jax.Array:
        """The sum of every rank's `head_product`, or this rank's tokens of it."""
        ...

    def routed_part(self, outputs: jax.Array) -> jax.Array:
        """What the experts held here add, float32 [tokens, ..., hidden], typed as that rank's part."""
        ...

    def shared_part(self, output: jax.Array) -> jax.Array:
        """The shared expert by the rows held here, float32 [tokens, hidden], as that rank's part."""
        ...

    def mixture(
        self,
        moe: "SparseMoe",
        x: jax.Array,
        valid: jax.Array,
        taps: Taps = NO_TAPS,
        *,
        scattered: bool = False,
    ) -> jax.Array:
        """The whole mixture of experts: float32 like x.

        Args:
            moe: the layer.
            x: [batch, seq, hidden], of a scattered stream this rank's tokens.
            valid: bool [batch, seq], of all tokens.
            taps: points of the layer, of tokens in one dimension.
            scattered: the residual stream is.
        """
        ...


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The answers where one device holds everything."""

    def scatters(self, batch: int, seq: int) -> bool:
        """One device has all tokens."""
        return False

    def own_tokens(self, x: jax.Array) -> jax.Array:
        """One device has all tokens."""
        return x

    def all_tokens(self, x: jax.Array) -> jax.Array:
        """One device has all tokens."""
        return x

    def embed(
        self, table: jax.Array, tokens: jax.Array, kernels: Kernels, *, scattered: bool = False
    ) -> jax.Array:
        """The tokens' rows: the whole table lies here."""
        return embedding_rows(table, tokens, kernels)

    def whole_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Logits over the whole vocabulary are here already."""
        return logits

    def head_product(self, x: jax.Array, weight: Matrix, kernels: Kernels) -> jax.Array:
        """The whole product: all heads lie here."""
        return linear(x, weight, jnp.float32, kernels=kernels)

    def sum_heads(self, part: jax.Array, *, scattered: bool = False) -> jax.Array:
        """One device's product is the sum of all heads."""
        return part

    def routed_part(self, outputs: jax.Array) -> jax.Array:
        """All experts lie here, so their outputs are the whole sum."""
        return outputs

    def shared_part(self, output: jax.Array) -> jax.Array:
        """All rows of the shared expert lie here, so its output is whole."""
        return output

    def mixture(
        self,
        moe: "SparseMoe",
        x: jax.Array,
        valid: jax.Array,
        taps: Taps = NO_TAPS,
        *,
        scattered: bool = False,
    ) -> jax.Array:
        """Routed branch and, where there is one, shared branch, each once."""
        flat = x.reshape(-1, x.shape[-1])
        routed = moe.routed(flat, valid.reshape(-1), taps)
        return (routed + moe.shared(flat, taps) if moe.has_shared else routed).reshape(x.shape)

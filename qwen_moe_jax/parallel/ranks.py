"""The answers of one rank of a mesh to what the model asks (`model/ranks.py`)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.ranks import embedding_rows
from qwen_moe_jax.model.taps import NO_TAPS, Taps
from qwen_moe_jax.parallel.expert_dispatch import all_to_all_mixture, exact_mixture, psum_mixture
from qwen_moe_jax.parallel.expert_points import capture_mixture
from qwen_moe_jax.parallel.partial_sums import (
    Axes,
    as_part,
    divided_among,
    gathered,
    own_slice,
    product_part,
    scattered_total,
    total,
)

# Of a residual stream: for fewer, a collective's latency is more than what a slice of the norms saves.
_FEWEST_SCATTERED = 1024


def can_scatter(ranks: int, tokens: int) -> bool:
    """Whether rows of so many tokens are divided among ranks in equal slices; 1 stands for "never"."""
    return ranks > 1 and tokens % ranks == 0


def is_scattered(ranks: int, rows: int, tokens: int) -> bool:
    """Whether the residual stream of so many tokens a row is scattered among ranks."""
    return can_scatter(ranks, tokens) and rows * tokens >= _FEWEST_SCATTERED


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshRanks:
    """A rank's place in its layout; the same object on every rank.

    Attributes:
        head_axes: mesh axes that heads and vocabulary are divided along.
        expert_axes: ("expert",), or () where one rank holds all experts.
        tensor_axes: ("tensor",) or ().
        shared_axes: what the shared expert's inner rows are divided along.
        expert_ranks: size of the expert axis.
        experts_held: routed experts that a rank has room for.
        vocab_held: rows of the vocabulary that a rank has room for.
        vocab_size: rows there are.
        shared_expert, expert_dispatch, exact, ragged: as in `Layout`.
        sum_dtype: that parts of sums travel in between ranks.
        tokens_divided: ranks of the expert axis have different tokens.
        scatter_ranks: among which a long residual stream is scattered; 1 where it never is.
    """

    head_axes: Axes
    expert_axes: Axes
    tensor_axes: Axes
    shared_axes: Axes
    expert_ranks: int
    experts_held: int
    vocab_held: int
    vocab_size: int
    shared_expert: str
    expert_dispatch: str
    tokens_divided: bool
    scatter_ranks: int
    exact: bool
    ragged: bool
    sum_dtype: jnp.dtype

    def scatters(self, batch: int, seq: int) -> bool:
        """Where it is long: norms and sums with the residual are then of a slice, for the same link bytes."""
        return is_scattered(self.scatter_ranks, batch, seq)

    def own_tokens(self, x: jax.Array) -> jax.Array:
        """A slice of every row."""
        return own_slice(x, self.head_axes, 1)

    def all_tokens(self, x: jax.Array) -> jax.Array:
        """One all-gather."""
        return gathered(x, self.head_axes, 1)

    def embed(
        self, table: jax.Array, tokens: jax.Array, kernels: Kernels, *, scattered: bool = False
    ) -> jax.Array:
        """Each token's row from the rank that holds it: one sum, exact, since the others add zeros."""
        if not self.head_axes:
            return embedding_rows(table, tokens, kernels)
        row = tokens - lax.axis_index(self.head_axes) * self.vocab_held
        here = (row >= 0) & (row < self.vocab_held)
        found = embedding_rows(table, jnp.clip(row, 0, self.vocab_held - 1), kernels)
        part = jnp.where(here[..., None], found, 0)
        return self.sum_heads(as_part(part, self.head_axes), scattered=scattered)

    def whole_vocabulary(self, logits: jax.Array) -> jax.Array:
        """Every rank's logits behind one another: one all-gather."""
        return gathered(logits, self.head_axes, logits.ndim - 1)[..., : self.vocab_size]

    def head_product(self, x: jax.Array, weight: Matrix, kernels: Kernels) -> jax.Array:
        """The part of the heads held here, unreduced."""
        return product_part(x, weight, self.head_axes, kernels)

    def sum_heads(self, part: jax.Array, *, scattered: bool = False) -> jax.Array:
        """One all-reduce, or reduce-scatter."""
        if scattered:
            return scattered_total(part, self.head_axes, self.sum_dtype, 1)
        return total(part, self.head_axes, self.sum_dtype)

    def routed_part(self, outputs: jax.Array) -> jax.Array:
        """A part of a sum over both axes; in all_to_all not yet, since it goes back to its tokens first."""
        if self.expert_dispatch == "all_to_all":
            return outputs
        return as_part(outputs, (*self.expert_axes, *self.tensor_axes))

    def returned_part(self, outputs: jax.Array) -> jax.Array:
        """The experts' outputs of all_to_all, back at their tokens: a part of a sum over `tensor`."""
        return as_part(outputs, self.tensor_axes)

    def slots_part(self, outputs: jax.Array) -> jax.Array:
        """The experts' outputs on all ranks' tokens as a part of a sum over both axes, in either dispatch."""
        if self.expert_dispatch == "psum":
            return outputs  # `routed_part` has typed them
        return as_part(outputs, (*self.expert_axes, *self.tensor_axes))

    def shared_part(self, output: jax.Array) -> jax.Array:
        """By mode: a sum of its own, a share of the routed experts' sum, or an equal part of it a rank."""
        if self.shared_expert == "prescaled" and self.expert_dispatch == "psum":
            return as_part(divided_among(output, self.expert_axes), (*self.expert_axes, *self.tensor_axes))
        return as_part(output, self.shared_axes)

    def mixture(
        self,
        moe: SparseMoe,
        x: jax.Array,
        valid: jax.Array,
        taps: Taps = NO_TAPS,
        *,
        scattered: bool = False,
    ) -> jax.Array:
        """By the dispatch of the layout."""
        flat = x.reshape(-1, x.shape[-1])
        if scattered:
            # in the order in which ranks' tokens are gathered
            valid = valid.reshape(valid.shape[0], self.scatter_ranks, -1).swapaxes(0, 1)
        valid = valid.reshape(-1)
        capture_mixture(self, moe, flat, valid, taps)
        with jax.named_scope("experts"):  # router and shared expert have scopes of their own
            if self.exact:
                mixed = exact_mixture(self, moe, flat, valid)
            elif self.expert_dispatch == "all_to_all":
                mixed = all_to_all_mixture(self, moe, flat, valid)
            else:
                mixed = psum_mixture(self, moe, flat, valid, taps, scattered=scattered)
            return mixed.reshape(x.shape)

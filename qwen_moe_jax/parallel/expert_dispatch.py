"""A mixture of experts whose experts are divided among ranks.

Two dispatches. *psum*: every rank of the expert axis sees every token, computes the experts it holds, and the
parts are summed. *all_to_all*: every rank has its own tokens, sends each to the ranks that hold its experts
and gets their outputs back.

The shared expert, where the model has one, is applied to every token exactly once, by one of four modes:

    mode         psum                                             all_to_all
    prescaled    on every rank, its weight divided by the          on each rank's own tokens,
                 number of ranks, inside the one sum               inside the sum over `tensor`
    outside      on every rank, added after the sum; its own       the same, with a sum of its own
                 sum over `tensor` where that is divided
    sharded      each rank an equal part of its inner rows,        as prescaled: the sum's group
                 inside the one sum                                is `tensor` alone
    fused        one more slot of the grouped product, each        one more slot, on each rank's
                 token's computed on one rank                      own tokens

What `moe.combine` and `moe.shared` give is typed as a part of a sum already (`MeshRanks.routed_part`,
`shared_part`), so that in no mode the two can be added if they are not parts of the same sum.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.taps import NO_TAPS, Taps
from qwen_moe_jax.parallel.partial_sums import gathered, scattered_total, total
from qwen_moe_jax.parallel.token_exchange import exchange, give_back, plan_exchange

if TYPE_CHECKING:
    from qwen_moe_jax.parallel.ranks import MeshRanks


def psum_mixture(
    ranks: "MeshRanks",
    moe: SparseMoe,
    x: jax.Array,
    valid: jax.Array,
    taps: Taps = NO_TAPS,
    *,
    scattered: bool = False,
) -> jax.Array:
    """Every rank's experts on every token, and one sum: [tokens, hidden] -> float32 [tokens, hidden].

    Where ranks have different tokens (attention data parallelism, a scattered residual stream), they are
    gathered before, and the sum is scattered back to their owners.

    Args:
        ranks: of the mesh.
        moe: the layer.
        x: this rank's tokens.
        valid: which are no pads; with `scattered` of all ranks' tokens, in the order of ranks.
        taps: points of the layer.
        scattered: as of `Ranks.mixture`.
    """
    own = x
    if scattered:
        x = gathered(x, ranks.head_axes, 0)
    elif ranks.tokens_divided:
        x, valid = gathered_tokens(ranks, x, valid)
        taps = NO_TAPS  # their points are each rank's own tokens
    ids, weights = moe.choose(x, valid, taps)
    ids = held_ids(ranks, moe, ids)
    if ranks.shared_expert == "fused":
        ids, weights = _with_shared_slot(ranks, ids, weights, moe.shared_weight(x), valid)
    axes = (*ranks.expert_axes, *ranks.tensor_axes)
    part = moe.combine(x, ids, weights, ranks=ranks.expert_ranks)
    if ranks.shared_expert in ("prescaled", "sharded"):
        part = part + moe.shared(x)
    if scattered:
        summed = scattered_total(part, axes, ranks.sum_dtype)
    elif ranks.tokens_divided:
        summed = scattered_total(part, ranks.expert_axes, ranks.sum_dtype)
        summed = total(summed, ranks.tensor_axes, ranks.sum_dtype)
    else:
        summed = total(part, axes, ranks.sum_dtype)
    return summed + _shared_alone(ranks, moe, own) if ranks.shared_expert == "outside" else summed


def exact_mixture(ranks: "MeshRanks", moe: SparseMoe, x: jax.Array, valid: jax.Array) -> jax.Array:
    """As `psum_mixture`, with the same bits for any number of ranks along the expert axis.

    A token's slot is not zero on one rank only, so that summing slot by slot is exact in any order; the slots
    are then added up in their order on every rank. Costs top_k times the bytes of the sum.
    """
    ids, weights = moe.choose(x, valid)
    slots = moe.combine(x, held_ids(ranks, moe, ids), weights, ranks=ranks.expert_ranks, by_slot=True)
    slots = total(slots, ranks.expert_axes)
    summed = slots[:, 0]
    for slot in range(1, slots.shape[1]):
        summed = summed + slots[:, slot]
    if moe.has_shared:
        summed = summed + moe.shared(x)
    return total(summed, ranks.tensor_axes)


def all_to_all_mixture(ranks: "MeshRanks", moe: SparseMoe, x: jax.Array, valid: jax.Array) -> jax.Array:
    """Each rank's own tokens to the ranks of their experts and back: [tokens, hidden] -> float32 like x.

    Where every rank of the expert axis has all tokens, each takes an equal part of them as its own, and the
    results are gathered.
    """
    tokens = x.shape[0]
    divide = bool(ranks.expert_axes) and not ranks.tokens_divided
    if divide:
        x, valid = (_own_rows(ranks, part) for part in (x, valid))
    ids, weights = moe.choose(x, valid)
    fused = ranks.shared_expert == "fused"
    if ranks.expert_axes:
        held, none = ranks.experts_held, _no_expert(ranks)
        ids = jnp.where(ids < moe.config.num_experts, ids, held * ranks.expert_ranks)
        plan = plan_exchange(ids, weights, held, none, ranks.expert_axes[0], ranks.expert_ranks)
        rows, row_ids, row_weights = exchange(x, plan, ragged=ranks.ragged), plan.ids, plan.weights
    else:
        plan, rows, row_ids, row_weights = None, x, held_ids(ranks, moe, ids), weights
    received = rows.shape[0]
    if fused:
        # its own tokens once more, for the shared expert's slot alone
        rows = jnp.concatenate([rows, x])
        slot_ids, slot_weights = shared_slot(ranks, moe.shared_weight(x), valid, row_ids.shape[1])
        row_ids = jnp.concatenate([row_ids, slot_ids])
        row_weights = jnp.concatenate([row_weights, slot_weights])
    outputs = moe.combine(rows, row_ids, row_weights, ranks=ranks.expert_ranks)
    routed = outputs[:received]
    if plan is not None:
        routed = give_back(routed, plan, ragged=ranks.ragged, dtype=ranks.sum_dtype)
    part = ranks.returned_part(routed + outputs[received:] if fused else routed)
    if ranks.shared_expert in ("prescaled", "sharded"):
        part = part + moe.shared(x)
    summed = total(part, ranks.tensor_axes, ranks.sum_dtype)
    if ranks.shared_expert == "outside":
        summed = summed + _shared_alone(ranks, moe, x)
    return gathered(summed, ranks.expert_axes, 0)[:tokens] if divide else summed


def gathered_tokens(ranks: "MeshRanks", x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All ranks' tokens, with what tells them from pads in one more column, so that one gather is enough."""
    everyone = gathered(_beside(x, valid[:, None].astype(x.dtype)), ranks.expert_axes, 0)
    return everyone[:, :-1], everyone[:, -1] > 0


def _shared_alone(ranks: "MeshRanks", moe: SparseMoe, x: jax.Array) -> jax.Array:
    """The shared branch, whole, with a sum of its own where its inner rows are divided."""
    return total(moe.shared(x), ranks.shared_axes, ranks.sum_dtype)


def held_ids(ranks: "MeshRanks", moe: SparseMoe, ids: jax.Array) -> jax.Array:
    """Global expert ids -> slots of the stacks held here; experts of other ranks become "none"."""
    first = lax.axis_index(ranks.expert_axes) * ranks.experts_held if ranks.expert_axes else 0
    held = ids - first
    here = (held >= 0) & (held < ranks.experts_held) & (ids < moe.config.num_experts)
    return jnp.where(here, held, _no_expert(ranks))


def _no_expert(ranks: "MeshRanks") -> int:
    """The slot that means "none" to the expert products: behind all that a rank has room for."""
    return ranks.experts_held + (ranks.shared_expert == "fused")


def shared_slot(
    ranks: "MeshRanks", gate: jax.Array, wanted: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array]:
    """(ids, weights) [tokens, slots] with the shared expert in the first slot of the wanted tokens."""
    shared, none = ranks.experts_held, _no_expert(ranks)
    first = jnp.arange(slots) == 0
    ids = jnp.where(wanted[:, None] & first, shared, none).astype(jnp.int32)
    return ids, jnp.where(first, gate, 0)


def own_turn(ranks: "MeshRanks", tokens: int) -> jax.Array:
    """The tokens whose shared expert this rank computes where every rank holds it, bool [tokens]."""
    rank = lax.axis_index(ranks.expert_axes) if ranks.expert_axes else 0
    return jnp.arange(tokens) % ranks.expert_ranks == rank


def _with_shared_slot(
    ranks: "MeshRanks", ids: jax.Array, weights: jax.Array, gate: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One more slot a token, for the shared expert, on the one rank whose turn the token is."""
    slot_ids, slot_weights = shared_slot(ranks, gate, valid & own_turn(ranks, ids.shape[0]), 1)
    return _beside(ids, slot_ids), _beside(weights, slot_weights)


def _beside(slots: jax.Array, one: jax.Array) -> jax.Array:
    """[tokens, n] and [tokens, 1] -> [tokens, n + 1]. Not as a concatenation: fused into what follows, one of
    n and 1 columns does not compile for ROCm (jaxlib 0.10.2)."""
    count = slots.shape[1]
    return jnp.where(jnp.arange(count + 1) < count, jnp.pad(slots, ((0, 0), (0, 1))), one)


def _own_rows(ranks: "MeshRanks", x: jax.Array) -> jax.Array:
    """This rank's equal part of rows that all ranks of the expert axis have, padded with zeros."""
    own = -(-x.shape[0] // ranks.expert_ranks)
    padded = jnp.pad(x, ((0, own * ranks.expert_ranks - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
    start = lax.axis_index(ranks.expert_axes) * own
    return lax.dynamic_slice_in_dim(padded, start, own)

"""Points inside a mixture of experts whose experts are divided among ranks, captured as one device has them.

How tokens reach their experts differs by dispatch; what is captured does not. So each rank computes the
points of its own tokens apart from the dispatch, with sums of their own, which cost nothing where no point is
asked for.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.taps import Taps
from qwen_moe_jax.parallel.expert_dispatch import gathered_tokens, held_ids, own_turn, shared_slot
from qwen_moe_jax.parallel.partial_sums import gathered, scattered_total, total

if TYPE_CHECKING:
    from qwen_moe_jax.parallel.ranks import MeshRanks

_POINTS = ("router_logits", "router", "experts", "shared_expert", "shared_gate")


def capture_mixture(ranks: "MeshRanks", moe: SparseMoe, x: jax.Array, valid: jax.Array, taps: Taps) -> None:
    """Captures what is asked for; x [tokens, hidden] and valid [tokens] are this rank's own tokens."""
    if not any(map(taps.captures, _POINTS)):
        return
    with jax.named_scope("captures"):
        ids, weights = moe.choose(x, valid, taps)
        if taps.captures("shared_gate"):
            taps.keep("shared_gate", moe.shared_weight(x))
        if taps.captures("shared_expert"):
            taps.keep("shared_expert", _shared_expert(ranks, moe, x, valid))
        if taps.captures("experts"):
            taps.keep("experts", _slots(ranks, moe, x, valid, ids, weights))


def _slots(
    ranks: "MeshRanks",
    moe: SparseMoe,
    x: jax.Array,
    valid: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Each slot's weighted output, float32 [tokens, top_k, hidden]."""
    if ranks.tokens_divided:
        x, _ = gathered_tokens(ranks, x, valid)
        ids, weights = (gathered(part, ranks.expert_axes, 0) for part in (ids, weights))
    here = held_ids(ranks, moe, ids)
    slots = moe.combine(x, here, weights, ranks=ranks.expert_ranks, by_slot=True)
    return _whole(ranks, ranks.slots_part(slots))


def _shared_expert(ranks: "MeshRanks", moe: SparseMoe, x: jax.Array, valid: jax.Array) -> jax.Array:
    """The shared expert's output before its gate, float32 [tokens, hidden]."""
    if ranks.shared_expert == "fused":
        if ranks.tokens_divided:
            x, _ = gathered_tokens(ranks, x, valid)
        tokens = x.shape[0]
        ids, weights = shared_slot(ranks, jnp.ones((tokens, 1), jnp.float32), own_turn(ranks, tokens), 1)
        return _whole(ranks, ranks.slots_part(moe.combine(x, ids, weights, ranks=ranks.expert_ranks)))
    inside = ranks.expert_dispatch == "psum" and ranks.shared_expert in ("prescaled", "sharded")
    if not inside:
        return total(ranks.shared_part(moe.shared_expert(x, moe.kernels)), ranks.shared_axes, ranks.sum_dtype)
    if ranks.tokens_divided:
        x, _ = gathered_tokens(ranks, x, valid)
    return _whole(ranks, ranks.shared_part(moe.shared_expert(x, moe.kernels)))


def _whole(ranks: "MeshRanks", part: jax.Array) -> jax.Array:
    """The sum of parts over both axes; where tokens were gathered, each rank's own."""
    if ranks.tokens_divided:
        scattered = scattered_total(part, ranks.expert_axes, ranks.sum_dtype)
        return total(scattered, ranks.tensor_axes, ranks.sum_dtype)
    return total(part, (*ranks.expert_axes, *ranks.tensor_axes), ranks.sum_dtype)

"""The routed experts' products, interchangeable behind one signature.

Every function here computes, for each token t,

    y_t = sum over slots s of  weights[t, s] * down[e] (silu(gate[e] x_t) * up[e] x_t),   e = expert_ids[t, s]

with `expert_ids` [tokens, top_k] in 0 .. E; id E means "no expert" and contributes exactly zero (pads;
experts held elsewhere). Weights stand in checkpoint layout: `gate_up` [E, 2 * intermediate, hidden] with
the gate rows first, `down` [E, hidden, intermediate], each an array or codes with block scales. No token
is ever dropped, however unbalanced the routing. The gate and up products, the hidden activation and the
expert output are each rounded to x.dtype, where released models round, and the weighted value to the wider
of x.dtype and weights.dtype; slots are summed in float32, and so is the result: it may be one rank's part
of a sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.formats.block_scaled import Matrix
from qwen_moe_jax.kernels.cpu.calls import native_experts
from qwen_moe_jax.kernels.experts import gathered_kernels, grouped_kernels
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.kernels.varying import vary_like
from qwen_moe_jax.model.linear import linear

ExpertFunction = Callable[[jax.Array, jax.Array, jax.Array, Matrix, Matrix], jax.Array]


def _expert(x: jax.Array, gate_up: Matrix, down: Matrix) -> jax.Array:
    """One expert on some tokens: [n, hidden], [2I, hidden], [hidden, I] -> [n, hidden]."""
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, down)


def _weights_of(expert: jax.Array, gate_up: Matrix, down: Matrix) -> tuple[Matrix, Matrix]:
    """One expert's matrices. XLA:CPU multiplies a single row with the slice in place; for a block of rows it
    copies the slice first."""
    return jax.tree.map(
        lambda stack: lax.dynamic_index_in_dim(stack, expert, keepdims=False), (gate_up, down)
    )


def dense_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    by_slot: bool = False,
) -> jax.Array:
    """Every expert on every token, masked by the routing: the plain reference, E / top_k times the work.

    Args:
        x, expert_ids, weights, gate_up, down: as above.
        by_slot: return the weighted slots, [tokens, top_k, hidden], instead of their sum.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        output = _expert(x, *_weights_of(expert, gate_up, down))
        chosen = jnp.where(expert_ids == expert, weights, 0)
        # an expert chosen in several slots is added once a slot, each product rounded on its own
        slots = (output[:, None] * chosen[..., None]).astype(wide)
        return total + (slots if by_slot else slots.sum(axis=1))

    shape = (*expert_ids.shape, x.shape[1]) if by_slot else x.shape
    total = vary_like(jnp.zeros(shape, wide), x, expert_ids, weights, gate_up, down)
    return lax.fori_loop(0, gate_up.shape[0], add, total)


def gathered_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    skip: bool = False,
    by_slot: bool = False,
) -> jax.Array:
    """One slot after the other, each reading its expert's weights in place: for a few tokens (decode).

    Args:
        x, expert_ids, weights, gate_up, down: as above.
        skip: branch around slots without an expert, for ranks on which most are such; without it they
            cost as much as any other.
        by_slot: return the weighted slots, [tokens, top_k, hidden], instead of their sum.
    """
    tokens, top_k = expert_ids.shape
    experts = gate_up.shape[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one_slot(row: jax.Array, expert: jax.Array, weight: jax.Array) -> jax.Array:
        inside = jnp.minimum(expert, experts - 1)
        return (_expert(row, *_weights_of(inside, gate_up, down)) * weight).astype(wide)

    def one_token(token: jax.Array | int, total: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(x, token, 1)
        parts = []
        # unrolled: XLA:CPU then multiplies straight from the stack of weights, without copying a slice
        for slot in range(top_k):
            expert, weight = expert_ids[token, slot], weights[token, slot]
            nothing = vary_like(jnp.zeros(row.shape, wide), x, expert, weight, gate_up, down)
            if skip:
                part = lax.cond(
                    expert < experts, one_slot, lambda *_, zero=nothing: zero, row, expert, weight
                )
            else:
                part = jnp.where(expert < experts, one_slot(row, expert, weight), nothing)
            parts.append(part)
        rows = jnp.stack(parts, axis=1) if by_slot else sum(parts)
        return lax.dynamic_update_slice_in_dim(total, rows, token, axis=0)

    shape = (tokens, top_k, x.shape[1]) if by_slot else x.shape
    total = vary_like(jnp.zeros(shape, wide), x, expert_ids, weights, gate_up, down)
    return one_token(0, total) if tokens == 1 else lax.fori_loop(0, tokens, one_token, total)


def grouped_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    block: int = 32,
    by_slot: bool = False,
) -> jax.Array:
    """Slots sorted by expert and cut into blocks of one expert each: for many tokens (prefill).

    An expert with n slots takes ceil(n / block) blocks; experts without slots, and slots without an
    expert, take none. The loop runs over the blocks there are, so its cost follows the routing. A block
    holds one expert's slots in the order of their tokens, so that what a slot gets does not depend on
    which other experts are here.

    Args:
        x, expert_ids, weights, gate_up, down: as above.
        block: rows a product.
        by_slot: return the weighted slots, [tokens, top_k, hidden], instead of their sum. They are weighted
            inside the loop, because a compiler may fuse a product with a sum that follows it, which rounds
            otherwise.
    """
    tokens, top_k = expert_ids.shape
    experts, hidden = gate_up.shape[0], x.shape[1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    slots = tokens * top_k

    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    first_slot = jnp.cumsum(counts) - counts
    blocks = -(-counts // block)
    last_block = jnp.cumsum(blocks)
    # Rows behind the last slot let a block run over the end; they are read as token 0 and not used.
    source = jnp.pad(order, (0, block)) // top_k
    sorted_weights = jnp.pad(weights.reshape(-1)[order], (0, block))
    # no narrower than float32: XLA:CPU converts row by row
    outputs = vary_like(jnp.zeros((slots + block, hidden), wide), x, expert_ids, weights, gate_up, down)

    def one_block(index: jax.Array, outputs: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last_block, index, side="right").astype(jnp.int32)
        within = index - (last_block[expert] - blocks[expert])
        start = first_slot[expert] + within * block
        rows = lax.dynamic_slice_in_dim(source, start, block)
        output = _expert(x[rows], *_weights_of(expert, gate_up, down))
        if by_slot:
            output = output * lax.dynamic_slice_in_dim(sorted_weights, start, block)[:, None]
        output = output.astype(wide)
        # A block may reach into the next expert's slots; those are written again by their own, later block.
        return lax.dynamic_update_slice_in_dim(outputs, output, start, axis=0)

    outputs = lax.fori_loop(0, last_block[-1], one_block, outputs)
    # back to [tokens, top_k]; slots without an expert sort last and may hold a neighbour's overrun
    place = jnp.zeros(slots, jnp.int32).at[order].set(jnp.arange(slots, dtype=jnp.int32))
    slot_outputs = outputs[place].reshape(tokens, top_k, hidden)
    here = expert_ids[..., None] < experts
    if by_slot:
        return jnp.where(here, slot_outputs, 0)
    return jnp.where(here, slot_outputs * weights[..., None], 0).astype(wide).sum(axis=1)


def choose_experts(
    kernels: Kernels,
    dtype: jnp.dtype,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    ranks: int = 1,
    by_slot: bool = False,
) -> ExpertFunction:
    """The form that the table has for a number of tokens, with the sizes that suit it.

    The choice is the same for any number of ranks that the experts are divided among, so that each slot's
    product is.

    Args:
        kernels: the table.
        dtype: of the activations.
        num_tokens, num_experts, top_k: of the whole layer, whatever part of the experts is held here.
        ranks: how many ranks the experts are divided among.
        by_slot: the form is to return weighted slots instead of their sum.
    """
    mean = num_tokens * top_k / num_experts
    chosen = kernels.pick("experts", jnp.dtype(dtype).name, mean)
    if chosen.startswith("pallas_"):
        form: Any = gathered_kernels if chosen == "pallas_gathered" else grouped_kernels
        return partial(
            form,
            chance=top_k / num_experts,
            widening=kernels.kernel_widening,
            interpret=kernels.interpret,
            by_slot=by_slot,
        )
    if chosen == "native":
        return partial(native_experts, variant=kernels.variant, by_slot=by_slot)
    if chosen == "gathered":
        # by slot always with branches, which nothing is fused across
        return partial(gathered_experts, skip=ranks > 1 or by_slot, by_slot=by_slot)
    if chosen == "dense":
        return partial(dense_experts, by_slot=by_slot)
    if kernels.target != "cpu":
        return partial(grouped_experts, block=64, by_slot=by_slot)
    # Wide enough for nearly every expert's slots (mean plus two deviations of an even routing): a second
    # block reads the weights again, and a wider one multiplies empty rows.
    return partial(grouped_experts, block=-(-int(mean + 2 * mean**0.5) // 8) * 8, by_slot=by_slot)

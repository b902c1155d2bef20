"""The routed experts' products, interchangeable behind one signature.

Every function here computes, for each token t,

    y_t = sum over slots s of  weights[t, s] * down[e] (silu(gate[e] x_t) * up[e] x_t),   e = expert_ids[t, s]

with `expert_ids` [tokens, top_k] in 0 .. E; id E means "no expert" and contributes exactly zero (pads;
experts held elsewhere). Weights stand in checkpoint layout: `gate_up` [E, 2 * intermediate, hidden] with
the gate rows first, `down` [E, hidden, intermediate]. No token is ever dropped, however unbalanced the
routing. The gate and up products, the hidden activation and the expert output are each rounded to x.dtype,
where released models round, and the weighted value to the wider of x.dtype and weights.dtype; slots are
summed in float32 and the sum is rounded to x.dtype.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.model.linear import linear

ExpertFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _expert(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """One expert on some tokens: [n, hidden], [2I, hidden], [hidden, I] -> [n, hidden]."""
    gate, up = jnp.split(linear(x, gate_up), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, down)


def _weights_of(expert: jax.Array, gate_up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One expert's matrices. A dynamic slice, which XLA:CPU multiplies in place; indexing would copy."""
    return (
        lax.dynamic_index_in_dim(gate_up, expert, keepdims=False),
        lax.dynamic_index_in_dim(down, expert, keepdims=False),
    )


def dense_experts(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Every expert on every token, masked by the routing: the plain reference, E / top_k times the work."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        output = _expert(x, *_weights_of(expert, gate_up, down))
        chosen = jnp.where(expert_ids == expert, weights, 0)
        # an expert chosen in several slots is added once a slot, each product rounded on its own
        return total + (output[:, None] * chosen[..., None]).astype(wide).sum(axis=1)

    total = lax.fori_loop(0, gate_up.shape[0], add, jnp.zeros(x.shape, wide))
    return total.astype(x.dtype)


def gathered_experts(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """One slot after the other, each reading its expert's weights in place: for a few tokens (decode).

    A slot without an expert costs as much as any other.
    """
    tokens, top_k = expert_ids.shape
    experts = gate_up.shape[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one_token(token: jax.Array | int, total: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(x, token, 1)
        parts = []
        # unrolled: XLA:CPU then multiplies straight from the stack of weights, without copying a slice
        for slot in range(top_k):
            expert = expert_ids[token, slot]
            inside = jnp.minimum(expert, experts - 1)
            output = _expert(row, *_weights_of(inside, gate_up, down)) * weights[token, slot]
            parts.append(jnp.where(expert < experts, output.astype(wide), 0))
        return lax.dynamic_update_slice_in_dim(total, sum(parts), token, axis=0)

    total = jnp.zeros(x.shape, wide)
    total = one_token(0, total) if tokens == 1 else lax.fori_loop(0, tokens, one_token, total)
    return total.astype(x.dtype)


def grouped_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    block: int = 32,
) -> jax.Array:
    """Slots sorted by expert and cut into blocks of one expert each: for many tokens (prefill).

    An expert with n slots takes ceil(n / block) blocks; experts without slots, and slots without an
    expert, take none. The loop runs over the blocks there are, so its cost follows the routing.
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
    outputs = jnp.zeros((slots + block, hidden), wide)  # no narrower: XLA:CPU converts row by row

    def one_block(index: jax.Array, outputs: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last_block, index, side="right").astype(jnp.int32)
        within = index - (last_block[expert] - blocks[expert])
        start = first_slot[expert] + within * block
        rows = lax.dynamic_slice_in_dim(source, start, block)
        output = _expert(x[rows], *_weights_of(expert, gate_up, down)).astype(wide)
        # A block may reach into the next expert's slots; those are written again by their own, later block.
        return lax.dynamic_update_slice_in_dim(outputs, output, start, axis=0)

    outputs = lax.fori_loop(0, last_block[-1], one_block, outputs)
    # back to [tokens, top_k]; slots without an expert sort last and may hold a neighbour's overrun
    place = jnp.zeros(slots, jnp.int32).at[order].set(jnp.arange(slots, dtype=jnp.int32))
    by_slot = outputs[place].reshape(tokens, top_k, hidden)
    weighted = jnp.where(expert_ids[..., None] < experts, by_slot * weights[..., None], 0)
    return weighted.astype(wide).sum(axis=1).astype(x.dtype)


def choose_experts(backend: str, num_tokens: int, num_experts: int, top_k: int) -> ExpertFunction:
    """The fastest form for a backend and a number of tokens.

    CPU: measured (`benchmarks/README.md`, "Expert matmuls"); one row multiplies so much faster than a
    block that gathering pays up to two slots an expert. GPUs: reasoned, not measured: a token at a time
    reads the weights once a slot, a sorted block once an expert, which is less as soon as slots outnumber
    experts.
    """
    slots = num_tokens * top_k
    if slots <= (2 if backend == "cpu" else 1) * num_experts:
        return gathered_experts
    if backend != "cpu":
        return partial(grouped_experts, block=64)
    # Wide enough for nearly every expert's slots (mean plus two deviations of an even routing): a second
    # block reads the weights again, and a wider one multiplies empty rows.
    mean = slots / num_experts
    return partial(grouped_experts, block=-(-int(mean + 2 * mean**0.5) // 8) * 8)

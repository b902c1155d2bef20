"""The forms of the routed experts by token count, side by side in one run, with two that were rejected.

    python benchmarks/experts.py [--dtype bfloat16] [--least]

Hidden 1024, intermediate 256, 64 experts, top-8; weights held as on CPU, in float32. The table and what
`choose_experts` takes from it are in `benchmarks/README.md`, "Expert matmuls".
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import median_ms

from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.kernels.target import current_target
from qwen_moe_jax.model.experts import (
    choose_experts,
    dense_experts,
    gathered_experts,
    grouped_experts,
)
from qwen_moe_jax.model.linear import held_dtype

HIDDEN, INNER, EXPERTS, TOP_K = 1024, 256, 64, 8
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
BLOCKS = (8, 16, 32, 64, 128)
# a form is left out beyond this many tokens, where one call would take seconds
LIMITS = {"gathered": 128, "gather + einsum": 16, "ragged_dot": 128}


def gather_einsum(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Copies each slot's expert [tokens, top_k, 2I, hidden], then multiplies (rejected)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden = jnp.einsum("th,tkih->tki", x.astype(gate_up.dtype), gate_up[expert_ids]).astype(x.dtype)
    gate, up = jnp.split(hidden, 2, axis=-1)
    inner = (jax.nn.silu(gate) * up).astype(down.dtype)
    output = jnp.einsum("tki,tkhi->tkh", inner, down[expert_ids]).astype(x.dtype)
    return (output * weights[..., None]).astype(wide).sum(axis=1).astype(x.dtype)


def ragged(
    x: jax.Array, expert_ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Slots sorted by expert through `lax.ragged_dot` (rejected)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros(gate_up.shape[0], jnp.int32).at[flat].add(1)
    rows = x[order // expert_ids.shape[1]].astype(gate_up.dtype)
    hidden = lax.ragged_dot(rows, gate_up.swapaxes(1, 2), sizes).astype(x.dtype)
    gate, up = jnp.split(hidden, 2, axis=-1)
    output = lax.ragged_dot((jax.nn.silu(gate) * up).astype(down.dtype), down.swapaxes(1, 2), sizes)
    back = jnp.zeros(output.shape, x.dtype).at[order].set(output.astype(x.dtype))
    back = back.reshape(*expert_ids.shape, -1)
    return (back * weights[..., None]).astype(wide).sum(axis=1).astype(x.dtype)


FORMS: dict[str, Callable[..., jax.Array]] = {
    "gathered": gathered_experts,
    **{f"grouped {block}": partial(grouped_experts, block=block) for block in BLOCKS},
    "dense": dense_experts,
    "gather + einsum": gather_einsum,
    "ragged_dot": ragged,
}


def main() -> None:
    """Prints the table, and what `choose_experts` picks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", action="store_true", help="the least of the rounds, not the median")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()

    dtype, target = jnp.dtype(options.dtype), current_target()
    held = held_dtype(dtype, Kernels(target))
    rng = np.random.default_rng(0)
    gate_up = jnp.asarray(rng.normal(size=(EXPERTS, 2 * INNER, HIDDEN)).astype(np.float32) / 32, held)
    down = jnp.asarray(rng.normal(size=(EXPERTS, HIDDEN, INNER)).astype(np.float32) / 16, held)
    print(f"jax {jax.__version__}, {target}, {dtype} held in {held}, ms")
    print(f"{'least' if options.least else 'medians'} of {options.rounds}\n")
    print(f"| tokens | {' | '.join(FORMS)} | chosen |\n|{'---|' * (len(FORMS) + 2)}")
    for tokens in options.tokens:
        ids = np.argsort(rng.uniform(size=(tokens, EXPERTS)), axis=1)[:, :TOP_K]
        given = (
            jnp.asarray(rng.normal(size=(tokens, HIDDEN)), dtype),
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(rng.dirichlet(np.ones(TOP_K), tokens), dtype),
            gate_up,
            down,
        )
        calls = {
            name: partial(jax.jit(form), *given)
            for name, form in FORMS.items()
            if tokens <= LIMITS.get(name, tokens)
        }
        taken = median_ms(calls, options.rounds, options.least)
        picked = choose_experts(Kernels(target), dtype, tokens, EXPERTS, TOP_K)
        chosen = f"grouped {picked.keywords['block']}" if isinstance(picked, partial) else "gathered"
        cells = [f"{taken[name]:.2f}" if name in taken else "" for name in FORMS]
        print(f"| {tokens} | {' | '.join(cells)} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()

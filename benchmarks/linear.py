"""Why matrices are held in float32 on CPU, and why the product is written with a transposed matrix.

    python benchmarks/linear.py [--least]

bfloat16 activations times a [8192, 1024] matrix, and through experts of [512, 1024] read in place from a
stack of 64. The tables are in `benchmarks/README.md`, "Held dtype on CPU".
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import median_ms

from qwen_moe_jax.model.linear import linear

OUT, IN = 8192, 1024
EXPERTS, EXPERT_OUT, USED = 64, 512, 8
BATCHES = (1, 8, 128, 512)
ROUNDS = 15


def last_axes(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same product as one contraction of both last axes, without a transpose."""
    product = lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product.astype(x.dtype)


def through_experts(product: Callable[..., jax.Array], x: jax.Array, stack: jax.Array) -> jax.Array:
    """The products with some experts, chosen at run time, summed: [tokens, 512]."""
    chosen = jnp.argsort(x[0, :EXPERTS])[:USED]
    return sum(product(x, lax.dynamic_index_in_dim(stack, chosen[i], keepdims=False)) for i in range(USED))


def table(
    forms: dict[str, tuple[Callable[..., jax.Array], jax.Array]],
    rng: np.random.Generator,
    title: str,
    least: bool,
) -> None:
    """One row a number of tokens, one column a form."""
    print(f"| {title} | {' | '.join(forms)} |\n|{'---|' * (len(forms) + 1)}")
    for tokens in BATCHES:
        x = jnp.asarray(rng.normal(size=(tokens, IN)), jnp.bfloat16)
        calls = {name: partial(jax.jit(form), x, weight) for name, (form, weight) in forms.items()}
        taken = median_ms(calls, ROUNDS, least)
        print(f"| {tokens} | {' | '.join(f'{taken[name]:.2f}' for name in forms)} |", flush=True)
    print()


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--least", action="store_true", help="the least of the rounds, not the median")
    least = parser.parse_args().least
    rng = np.random.default_rng(0)
    statistic = "least" if least else "medians"
    print(f"jax {jax.__version__}, {jax.default_backend()}, {statistic} of {ROUNDS}, ms\n")
    matrix = jnp.asarray(rng.normal(size=(OUT, IN)), jnp.bfloat16)
    stack = jnp.asarray(rng.normal(size=(EXPERTS, EXPERT_OUT, IN)), jnp.bfloat16)
    for title, wrap, weight in (
        ("tokens, one matrix", lambda form: form, matrix),
        ("tokens, 8 experts", lambda form: partial(through_experts, form), stack),
    ):
        forms = {
            f"held {held}{name}": (wrap(form), weight.astype(held))
            for held in ("bfloat16", "float32")
            for name, form in (("", linear), (", last axes", last_axes))
        }
        table(forms, rng, title, least)


if __name__ == "__main__":
    main()

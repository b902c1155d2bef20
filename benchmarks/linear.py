"""Why matrices are held in float32 on CPU, and why the product is written with a transposed matrix.

    python benchmarks/linear.py

bfloat16 activations times a [8192, 1024] matrix; the table is in `benchmarks/README.md`, "Held dtype on CPU".
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import median_ms

from qwen_moe_jax.model.linear import linear

OUT, IN = 8192, 1024
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


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(OUT, IN)), jnp.bfloat16)
    wide = low.astype(jnp.float32)
    forms = {
        "held bfloat16": (linear, low),
        "held bfloat16, last axes": (last_axes, low),
        "held float32": (linear, wide),
        "held float32, last axes": (last_axes, wide),
    }
    print(f"jax {jax.__version__}, {jax.default_backend()}, medians of {ROUNDS}, ms\n")
    print(f"| tokens | {' | '.join(forms)} |\n|{'---|' * (len(forms) + 1)}")
    for tokens in BATCHES:
        x = jnp.asarray(rng.normal(size=(tokens, IN)), jnp.bfloat16)
        taken = median_ms(
            {k: partial(jax.jit(form), x, weight) for k, (form, weight) in forms.items()}, ROUNDS
        )
        print(f"| {tokens} | {' | '.join(f'{taken[name]:.2f}' for name in forms)} |", flush=True)


if __name__ == "__main__":
    main()

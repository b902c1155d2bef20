"""Random inputs of a layer of routed experts."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def routed_inputs(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int, int],
    dtype: str,
    matrix: Callable[[tuple[int, int, int]], Any],
) -> dict[str, Any]:
    """Inputs where about a fifth of the slots have no expert, and a token may have an expert twice.

    Args:
        rng: that draws them, the matrices last.
        shape: tokens, top_k, experts, hidden, intermediate.
        dtype: of the tokens.
        matrix: makes a stack [experts, out, in] of its shape: gate and up, then down.
    """
    tokens, top_k, experts, hidden, inner = shape
    ids = rng.integers(0, experts + experts // 4 + 1, (tokens, top_k)).clip(0, experts)
    return {
        "x": jnp.asarray(rng.normal(size=(tokens, hidden)), dtype),
        "expert_ids": jnp.asarray(ids, jnp.int32),
        "weights": jnp.asarray(rng.dirichlet(np.ones(top_k), tokens), jnp.float32),
        "gate_up": matrix((experts, 2 * inner, hidden)),
        "down": matrix((experts, hidden, inner)),
    }

"""`delta_inputs` as a convolution leaves them: flat channels, queries and keys of any length."""

import numpy as np

from qwen_moe_jax.model.norms import L2_EPS
from support.delta_oracle import delta_inputs

Given = dict[str, np.ndarray]
Tokens = tuple[np.ndarray, ...]


def convolved(seed: int, seq: int, **sizes: int) -> tuple[Given, Tokens]:
    """Arguments of `delta_chunks` but for slots and counts, and those of `delta_oracle`, in float64.

    Args:
        seed: of the draw.
        seq: tokens a row; a row for each of `REGIMES`.
        sizes: heads and dimensions, as of `delta_inputs`.
    """
    query, key, value, g, beta, state = delta_inputs(seed, seq, **sizes)
    rng = np.random.default_rng([seed, seq])
    query, key = (
        (x * rng.uniform(0.5, 20, (*x.shape[:3], 1)) / np.linalg.norm(x, axis=-1, keepdims=True)).astype(
            np.float32
        )
        for x in (query, key)
    )
    mixed = np.concatenate([x.reshape(len(x), seq, -1) for x in (query, key, value)], axis=-1)
    tokens = (_normalised(query) * query.shape[-1] ** -0.5, _normalised(key), value, g, beta, state)
    return {"state": state, "mixed": mixed, "g": g, "beta": beta}, tokens


def _normalised(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).sum(axis=-1, keepdims=True) + L2_EPS)

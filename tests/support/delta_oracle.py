"""The gated delta rule in float64 NumPy, straight from its recurrence, and inputs that try it."""

import numpy as np

Arrays = tuple[np.ndarray, ...]

# One row of a batch for each; see `delta_inputs`.
REGIMES = (
    "typical",
    "hardly any decay",
    "decay to nothing",
    "decay now and then",
    "one key, fully rewritten",
    "few keys, beta near one",
    "beta near zero",
    "beta exactly zero or one",
)


def delta_oracle(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, g: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S <- S e^g; d = (v - S^T k) beta; S <- S + k d^T; o = S^T q, one step at a time in float64.

    Shapes as `qwen_moe_jax.model.delta_rule.delta_rule_chunked`.
    """
    query, key, value, g, beta, state = (
        np.asarray(x, np.float64) for x in (query, key, value, g, beta, state)
    )
    heads = value.shape[2]
    group = heads // key.shape[2]
    output = np.empty(value.shape)
    state = state.copy()
    for t in range(value.shape[1]):
        for h in range(heads):
            q, k = query[:, t, h // group], key[:, t, h // group]  # [batch, Dk]
            s = state[:, h] * np.exp(g[:, t, h])[:, None, None]
            recalled = (k[:, None, :] @ s)[:, 0]
            d = (value[:, t, h] - recalled) * beta[:, t, h, None]
            state[:, h] = s + k[:, :, None] * d[:, None, :]
            output[:, t, h] = (q[:, None, :] @ state[:, h])[:, 0]
    return output, state


def delta_inputs(
    seed: int,
    seq: int,
    *,
    key_heads: int = 2,
    heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 12,
    regimes: tuple[str, ...] = REGIMES,
) -> Arrays:
    """(query, key, value, g, beta, state) in float32, one batch row a regime.

    Keys have length one, queries key_dim^-0.5. "One key" is the hardest for powers of the chunk's
    system: every entry below its diagonal is one.
    """
    rng = np.random.default_rng([seed, seq, key_heads, heads])
    batch = len(regimes)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    query = unit(rng.normal(size=(batch, seq, key_heads, key_dim))) * key_dim**-0.5
    key = unit(rng.normal(size=(batch, seq, key_heads, key_dim)))
    value = rng.normal(size=(batch, seq, heads, value_dim))
    gates = (batch, seq, heads)
    g = -np.exp(rng.normal(-2, 1.5, gates))
    beta = rng.uniform(0.05, 0.95, gates)
    for row, regime in enumerate(regimes):
        one = gates[1:]
        if regime == "hardly any decay":
            g[row] = -rng.uniform(0, 1e-5, one)
        elif regime == "decay to nothing":
            g[row] = -rng.uniform(50, 60, one)
        elif regime == "decay now and then":  # strong and weak decay within one chunk
            g[row] = np.where(rng.uniform(size=one) < 0.2, -60.0, -rng.uniform(0, 0.05, one))
        elif regime == "one key, fully rewritten":
            key[row] = key[row, :1]
            g[row], beta[row] = -rng.uniform(0, 1e-4, one), rng.uniform(0.999, 1, one)
        elif regime == "few keys, beta near one":
            key[row] = key[row, rng.integers(min(3, seq), size=seq)]
            g[row], beta[row] = -rng.uniform(0, 1e-2, one), rng.uniform(0.98, 1, one)
        elif regime == "beta near zero":
            g[row], beta[row] = -rng.uniform(0, 1e-3, one), rng.uniform(0, 1e-4, one)
        elif regime == "beta exactly zero or one":
            beta[row] = rng.integers(2, size=one)
    state = rng.normal(size=(batch, heads, key_dim, value_dim))
    return tuple(x.astype(np.float32) for x in (query, key, value, g, beta, state))

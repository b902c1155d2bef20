"""Three solvers for the chunk's unit lower triangular system (I + A) D = B, by speed and by error.

    python benchmarks/delta_solver.py

A is [64, 64] strictly lower triangular, one a chunk and value head; B has Dv + Dk columns. The chosen
solver and the table are in `benchmarks/README.md`, "Chunk solver".
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import median_ms

from qwen_moe_jax.model.delta_rule import solve_unit_lower

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.delta_oracle import REGIMES, delta_inputs

CHUNK = 64
SHAPES = {"35B (Hk 16, Hv 32, D 128, S 512)": (512, 16, 32, 128), "small (2, 4, 32, S 128)": (128, 2, 4, 32)}
ROUNDS = 15
HIGHEST = lax.Precision.HIGHEST


def triangular_solve(system: jax.Array, wanted: jax.Array) -> jax.Array:
    """A library call: LAPACK's on CPU, `__cublas$triangularSolve` on GPUs (AMD ones too)."""
    identity = jnp.eye(CHUNK, dtype=system.dtype)
    return lax.linalg.triangular_solve(
        system + identity, wanted, left_side=True, lower=True, unit_diagonal=True
    )


def log_depth_products(system: jax.Array, wanted: jax.Array) -> jax.Array:
    """(I + A)^-1 = (I - A)(I + A^2)(I + A^4) ... (I + A^32), exact since A^64 = 0."""
    solved = wanted - jnp.matmul(system, wanted, precision=HIGHEST)
    power = system
    for _ in range(CHUNK.bit_length() - 2):
        power = jnp.matmul(power, power, precision=HIGHEST)
        solved = solved + jnp.matmul(power, solved, precision=HIGHEST)
    return solved


SOLVERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "triangular solve": triangular_solve,
    "blocked substitution": solve_unit_lower,
    "log-depth products": log_depth_products,
}


def systems(seq: int, key_heads: int, heads: int, dim: int, regime: str) -> tuple[np.ndarray, np.ndarray]:
    """(A [chunks, heads, 64, 64], B [chunks, heads, 64, 2 dim]) as the chunked form builds them."""
    _, key, value, g, beta, _ = (
        x[0].astype(np.float64)
        for x in delta_inputs(
            0, seq, key_heads=key_heads, heads=heads, key_dim=dim, value_dim=dim, regimes=(regime,)
        )
    )
    key = np.repeat(key, heads // key_heads, axis=1)
    key, value, g, beta = (
        np.moveaxis(x.reshape(seq // CHUNK, CHUNK, *x.shape[1:]), 1, 2) for x in (key, value, g, beta)
    )
    total = g.cumsum(axis=-1)
    decay = np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0))
    system = np.tril(key @ key.swapaxes(-1, -2) * decay * beta[..., None], -1)
    wanted = np.concatenate([value, key * np.exp(total)[..., None]], axis=-1) * beta[..., None]
    return system.astype(np.float32), wanted.astype(np.float32)


def main() -> None:
    """Prints both tables."""
    compiled = {name: jax.jit(solver) for name, solver in SOLVERS.items()}
    print(f"jax {jax.__version__}, {jax.default_backend()}, medians of {ROUNDS}\n")
    print(f"| milliseconds | {' | '.join(SOLVERS)} |\n|{'---|' * (len(SOLVERS) + 1)}")
    for name, (seq, key_heads, heads, dim) in SHAPES.items():
        given = [jnp.asarray(x) for x in systems(seq, key_heads, heads, dim, "typical")]
        taken = median_ms({key: lambda f=f, given=given: f(*given) for key, f in compiled.items()}, ROUNDS)
        print(f"| {name} | {' | '.join(f'{taken[key]:.2f}' for key in SOLVERS)} |")

    print(f"\n| RMS error over RMS | {' | '.join(SOLVERS)} |\n|{'---|' * (len(SOLVERS) + 1)}")
    for regime in REGIMES:
        system, wanted = systems(512, 2, 4, 128, regime)
        truth = np.linalg.solve(system.astype(np.float64) + np.eye(CHUNK), wanted.astype(np.float64))
        cells = []
        for solver in compiled.values():
            error = np.asarray(solver(system, wanted), np.float64) - truth
            cells.append(f"{np.sqrt(np.square(error).mean() / np.square(truth).mean()):.1e}")
        print(f"| {regime} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Between jax and torch without a rounding, and differences counted in units in the last place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_MANTISSA_BITS = {jnp.dtype(jnp.float32): 23, jnp.dtype(jnp.bfloat16): 7}
_SMALLEST_NORMAL_EXPONENT = -126


def to_numpy(x: Any) -> np.ndarray:
    """float64 of equal value, from jax, torch or NumPy."""
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    return np.asarray(jnp.asarray(x).astype(jnp.float32) if isinstance(x, jax.Array) else x, np.float64)


def to_torch(x: jax.Array) -> torch.Tensor:
    """The torch tensor of the same dtype (float32, bfloat16 or int32) and value."""
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(x.astype(jnp.float32))).bfloat16()
    return torch.from_numpy(np.array(x))


def ulp(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance between neighbours of `dtype` at |x|, float64."""
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.maximum(exponent, _SMALLEST_NORMAL_EXPONENT)
    return np.ldexp(1.0, exponent - _MANTISSA_BITS[jnp.dtype(dtype)])


def assert_within_ulps(ours: jax.Array, expected: Any, ulps: float) -> None:
    """|ours - expected| is at most `ulps` units in the last place of ours.dtype, element by element."""
    got, wanted = to_numpy(ours), to_numpy(expected)
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    apart = np.abs(got - wanted) / ulp(wanted, ours.dtype)
    assert apart.max() <= ulps, f"{apart.max():g} ulps apart, at most {ulps:g} expected"

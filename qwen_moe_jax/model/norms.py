"""Root-mean-square norms (Zhang & Sennrich 2019, arXiv:1910.07467), plain or zero-centred, and gated."""

import jax
import jax.numpy as jnp

L2_EPS = 1e-6  # added to the sum of squares, as the delta-rule kernels of the field do


def _normalise(x32: jax.Array, eps: float) -> jax.Array:
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """RMSNorm: x / rms(x) * (offset + weight), in float32, cast once at the end.

    Args:
        x: [..., dim], any float dtype.
        weight: [dim].
        eps: added to the mean square.
        offset: 1 where the norm is zero-centred, so that a weight of 0 means "scale by one"; else 0.

    Returns:
        [..., dim] in x.dtype.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (_normalise(x.astype(wide), eps) * (offset + weight.astype(wide))).astype(x.dtype)


def gated_rms_norm(x: jax.Array, gate: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with a plain weight, times silu(gate): the output norm of a Gated DeltaNet head.

    Statistics are float32; the weight multiplies in the model dtype and the gate in float32, the
    rounding points that released checkpoints were trained and served with.

    Args:
        x: [..., dim].
        gate: [..., dim].
        weight: [dim].
        eps: added to the mean square.

    Returns:
        [..., dim] in x.dtype.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    normed = weight.astype(x.dtype) * _normalise(x.astype(wide), eps).astype(x.dtype)
    return (normed.astype(wide) * jax.nn.silu(gate.astype(wide))).astype(x.dtype)


def l2_normalise(x: jax.Array) -> jax.Array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, [..., dim], in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + L2_EPS)

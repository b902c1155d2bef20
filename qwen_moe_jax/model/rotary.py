"""Partial rotary embedding with interleaved multimodal positions (MRoPE) and YaRN scaling.

RoPE: Su et al., arXiv:2104.09864. YaRN: Peng et al., arXiv:2309.00071, section 3. MRoPE gives every token
three positions (temporal, height, width); Qwen3.5 interleaves them over the frequencies, so that
frequency i follows height when i = 1 (mod 3), width when i = 2 (mod 3), each up to its section's
length, and time elsewhere. For text the three are equal and MRoPE is plain RoPE, which the others have.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import ModelConfig, RopeConfig


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians a position for each rotated pair, and the factor on cos and sin (1 without YaRN).

    Returns:
        (float32 [rotary_dim / 2], attention factor). Computed in float64 and rounded once.
    """
    rope, dim = config.rope, config.rotary_dim
    extrapolated = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "default":
        return extrapolated.astype(np.float32), 1.0
    return _yarn(rope, extrapolated, dim, config.max_position_embeddings)


def _yarn(
    rope: RopeConfig, extrapolated: np.ndarray, dim: int, max_positions: int
) -> tuple[np.ndarray, float]:
    trained = rope.original_max_position_embeddings
    assert trained is not None  # checked when the configuration is read
    factor = rope.factor if rope.factor is not None else max_positions / trained

    def dimension_of(rotations: float) -> float:
        # the (fractional) dimension whose wavelength makes `rotations` turns within the trained context
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    frequencies = extrapolated * (1 - ramp) + extrapolated / factor * ramp

    attention_factor = rope.attention_factor
    if attention_factor is None:

        def magnitude(scale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        if rope.mscale and rope.mscale_all_dim:
            attention_factor = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
        else:
            attention_factor = magnitude(1.0)
    return frequencies.astype(np.float32), float(attention_factor)


def position_axis(rope: RopeConfig, num_frequencies: int) -> np.ndarray:
    """Which of (0 temporal, 1 height, 2 width) each frequency follows: int32 [num_frequencies]."""
    axis = np.zeros(num_frequencies, np.int32)
    if rope.mrope_section is None:
        return axis
    for which in (1, 2):
        axis[which : 3 * rope.mrope_section[which] : 3] = which
    return axis


def rotary_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotation angle.

    Args:
        config: gives frequencies, sections and scaling.
        positions: int [batch, seq] (text) or [3, batch, seq] (temporal, height, width).

    Returns:
        (cos, sin), float32 [batch, seq, rotary_dim / 2].
    """
    frequencies, scale = inverse_frequencies(config)
    if positions.ndim == 2:
        per_frequency = positions[..., None]
    else:
        axis = position_axis(config.rope, len(frequencies))
        per_frequency = jnp.moveaxis(positions[axis], 0, -1)
    angles = per_frequency.astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the leading 2n dimensions of each head, pairing dimension i with i + n; the rest pass.

    Args:
        x: [batch, seq, heads, head_dim].
        cos, sin: [batch, seq, n]; cast to x.dtype.

    Returns:
        like x.
    """
    half = cos.shape[-1]
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

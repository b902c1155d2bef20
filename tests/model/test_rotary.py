"""Rotary tables and rotation against the reference's own, over its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.rounding import assert_within_ulps, to_torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeTextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.rotary import apply_rotary, inverse_frequencies, position_axis, rotary_tables

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 128, "factor": 4.0}
OPTIONS: dict[str, dict] = {
    "default": {},
    "short wavelengths": {"rope_theta": 1e4},
    "half": {"partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5]},
    "three quarters": {"partial_rotary_factor": 0.75, "mrope_section": [8, 10, 6]},
    "whole head": {"partial_rotary_factor": 1.0, "mrope_section": [11, 11, 10]},
    "height only": {"partial_rotary_factor": 1.0, "mrope_section": [20, 12, 0]},
    "yarn": YARN,
    "yarn, fractional boundaries": YARN | {"truncate": False, "partial_rotary_factor": 1.0},
    "yarn, factor from the lengths": YARN | {"factor": None, "partial_rotary_factor": 1.0},
    "yarn, attention factor": YARN | {"attention_factor": 1.3},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.6},
    "yarn, one mscale only": YARN | {"mscale": 0.7},
    "yarn, betas": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "partial_rotary_factor": 1.0},
    "yarn, no extension": YARN | {"factor": 1.0},
    "yarn, one boundary": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}

# The reference computes frequencies in float32: theta^(2i/d) with an error of a few ulps.
FREQUENCY_TOLERANCE = 1e-6
# An angle of up to 512 radians then differs by 512 * that, and so do its cosine and sine.
POSITIONS = 512
TABLE_TOLERANCE = POSITIONS * FREQUENCY_TOLERANCE


def configs(options: dict) -> tuple[ModelConfig, Qwen3_5MoeTextConfig]:
    """Ours and the reference's, from the same dictionary; head_dim 64, 512 positions."""
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    } | options
    raw = {
        "head_dim": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "vocab_size": 64,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": rope,
    }
    return (
        ModelConfig.from_dict(raw | {"model_type": "qwen3_5_moe_text"}),
        Qwen3_5MoeTextConfig(**raw | {"rope_parameters": dict(rope)}),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_frequencies_and_scale_equal_the_reference(options: dict) -> None:
    ours, theirs = configs(options)
    module = Qwen3_5MoeTextRotaryEmbedding(theirs)
    frequencies, scale = inverse_frequencies(ours)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=FREQUENCY_TOLERANCE)
    assert scale == pytest.approx(module.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tables_equal_the_reference_for_text_and_for_three_row_positions(options: dict) -> None:
    ours, theirs = configs(options)
    module = Qwen3_5MoeTextRotaryEmbedding(theirs)
    text = np.stack([np.arange(40), 470 + np.arange(40)]).astype(np.int32)
    grid = np.random.default_rng(0).integers(0, POSITIONS, (3, 2, 40)).astype(np.int32)
    for positions in (text, grid):
        tables = rotary_tables(ours, jnp.asarray(positions))
        # the reference writes into its input's copy only; its tables repeat the frequencies twice
        expected = module(torch.zeros(1), torch.from_numpy(np.broadcast_to(positions, grid.shape).copy()))
        for table, full in zip(tables, expected, strict=True):
            assert table.dtype == jnp.float32
            half = full.shape[-1] // 2
            np.testing.assert_allclose(table, full[..., :half], rtol=0, atol=TABLE_TOLERANCE)
            np.testing.assert_array_equal(full[..., :half], full[..., half:])


def test_three_equal_rows_are_text_positions() -> None:
    ours, _ = configs({})
    positions = jnp.arange(30)[None]
    for text, grid in zip(
        rotary_tables(ours, positions),
        rotary_tables(ours, jnp.broadcast_to(positions, (3, 1, 30))),
        strict=True,
    ):
        np.testing.assert_array_equal(text, grid)


def test_interleaving_gives_every_third_frequency_to_height_and_width() -> None:
    config, _ = configs({"partial_rotary_factor": 1.0, "mrope_section": [11, 11, 10]})
    axis = position_axis(config.rope, 32)
    assert axis[:7].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [int((axis == which).sum()) for which in range(3)] == [11, 11, 10]


def test_positions_far_out_are_as_exact_as_float32_angles_allow() -> None:
    """At 200,000 tokens an angle is rounded to 2^-7 radians: the same as the reference's, not worse."""
    ours, theirs = configs({"rope_theta": 1e7})
    positions = np.array([[200_000, 262_143]], np.int32)
    cos, _ = rotary_tables(ours, jnp.asarray(positions))
    frequencies, _ = inverse_frequencies(ours)
    exact = np.cos(positions[..., None].astype(np.float64) * frequencies)
    assert np.abs(np.asarray(cos) - exact).max() <= 2.0**-7
    full, _ = Qwen3_5MoeTextRotaryEmbedding(theirs)(
        torch.zeros(1), torch.from_numpy(np.broadcast_to(positions, (3, 1, 2)).copy())
    )
    np.testing.assert_allclose(cos, full[..., : cos.shape[-1]], atol=262_143 * FREQUENCY_TOLERANCE / 4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rotated", [4, 16, 24])
def test_rotation_equals_the_reference(rotated: int, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(rotated)
    query, key = (
        jnp.asarray(rng.normal(size=(2, 9, heads, 24)), dtype) for heads in (3, 1)
    )  # [batch, seq, heads, dim]
    angles = jnp.asarray(rng.uniform(-9, 9, (2, 9, rotated // 2)), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    full = [torch.cat([to_torch(table.astype(dtype))] * 2, dim=-1) for table in (cos, sin)]
    expected = apply_rotary_pos_emb(
        *(to_torch(x).transpose(1, 2) for x in (query, key)), *full
    )  # [batch, heads, seq, dim]
    for x, wanted in zip((query, key), expected, strict=True):
        # eagerly, operation by operation: under jit XLA may keep the bfloat16 products unrounded
        ours = apply_rotary(x, cos, sin)
        assert ours.dtype == dtype
        assert_within_ulps(ours, wanted.transpose(1, 2), 0)
        np.testing.assert_array_equal(ours[..., rotated:], x[..., rotated:])
        # jit drops roundings inside: at most one ulp of the largest term, itself at most |x|
        fused = jax.jit(apply_rotary)(x, cos, sin).astype(jnp.float32)
        spacing = 2.0 ** (-7 if dtype == jnp.bfloat16 else -22) * float(jnp.abs(x).max())
        np.testing.assert_allclose(fused, ours.astype(jnp.float32), rtol=0, atol=spacing)


def test_rotation_keeps_lengths() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 2, 16)), jnp.float32)
    config, _ = configs({"partial_rotary_factor": 0.25})
    rotated = apply_rotary(x, *rotary_tables(config, jnp.arange(5)[None]))
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)

"""The causal convolution against the reference's, with carried inputs, pads and rows without tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.rounding import to_numpy, to_torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import causal_conv1d_fn, causal_conv1d_update

from qwen_moe_jax.model.delta_net import causal_conv

conv = jax.jit(causal_conv)
KERNELS = (1, 2, 3, 4)
CHANNELS, SEQ = 12, 21

# At most 4 products summed in another order, then silu: relative to the largest value.
FLOAT32_TOLERANCE = 1e-6
# One rounding of the sum and one of silu, each of which may tip: two ulps of the largest value.
BFLOAT16_TOLERANCE = 2.0**-7


def draw(kernel: int, seed: int, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x [2, SEQ, channels], weight [channels, kernel], carried [2, kernel - 1, channels])."""
    rng = np.random.default_rng([kernel, seed])
    shapes = ((2, SEQ, CHANNELS), (CHANNELS, kernel), (2, kernel - 1, CHANNELS))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def reference(x: jax.Array, weight: jax.Array, carried: jax.Array) -> np.ndarray:
    """The reference's convolution over carried and new inputs, the new ones' outputs."""
    inputs = torch.cat([to_torch(carried), to_torch(x)], dim=1).transpose(1, 2)
    out = causal_conv1d_fn(inputs, to_torch(weight), activation="silu")
    return to_numpy(out.transpose(1, 2))[:, carried.shape[1] :]


def assert_close(ours: jax.Array, expected: np.ndarray, tolerance: float = FLOAT32_TOLERANCE) -> None:
    np.testing.assert_allclose(to_numpy(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_convolution_equals_the_reference(kernel: int, dtype: jnp.dtype) -> None:
    tolerance = FLOAT32_TOLERANCE if dtype == jnp.float32 else BFLOAT16_TOLERANCE
    for seed in range(3):
        x, weight, carried = draw(kernel, seed, dtype)
        if seed == 0:
            carried = jnp.zeros_like(carried)  # a new sequence
        # a vector is held in float32 whatever the model's dtype
        ours, after = conv(x, weight.astype(jnp.float32), carried, jnp.full(2, SEQ, jnp.int32))
        assert ours.dtype == dtype
        assert_close(ours, reference(x, weight, carried), tolerance)
        np.testing.assert_array_equal(to_numpy(after), to_numpy(x)[:, SEQ - kernel + 1 :])


@pytest.mark.parametrize("kernel", [2, 4])
def test_single_steps_equal_the_references_update(kernel: int) -> None:
    x, weight, carried = draw(kernel, 4)
    # the reference's decode keeps `kernel` inputs, of which the oldest falls out before use
    state = torch.cat([torch.full((2, CHANNELS, 1), 9.0), to_torch(carried).transpose(1, 2)], dim=2)
    for t in range(5):
        ours, carried = conv(x[:, t : t + 1], weight, carried, jnp.ones(2, jnp.int32))
        theirs = causal_conv1d_update(
            to_torch(x[:, t : t + 1]).transpose(1, 2), state, to_torch(weight), activation="silu"
        )
        assert_close(ours, to_numpy(theirs.transpose(1, 2)))
        np.testing.assert_array_equal(carried, state[:, :, 1:].transpose(1, 2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_split_with_carried_inputs_equals_one_pass(kernel: int) -> None:
    """Pieces padded on the right to one length; one of a single token, shorter than the kernel."""
    x, weight, carried = draw(kernel, 7)
    whole, last = conv(x, weight, carried, jnp.full(2, SEQ, jnp.int32))
    rng = np.random.default_rng(0)
    start, outputs = 0, []
    for length in (5, 1, 1, 2, 12):
        piece = rng.normal(size=x.shape).astype(np.float32)  # pads are not zero
        piece[:, :length] = x[:, start : start + length]
        out, carried = conv(piece, weight, carried, jnp.full(2, length, jnp.int32))
        outputs.append(out[:, :length])
        start += length
    assert start == SEQ
    np.testing.assert_array_equal(np.concatenate(outputs, axis=1), whole)
    np.testing.assert_array_equal(carried, last)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("valid", [0, 1, 2, 20])
def test_carried_inputs_are_the_last_valid_ones_with_right_padding(kernel: int, valid: int) -> None:
    """A state taken from the padded end is a known bug elsewhere (LLM-TPU #150)."""
    x, weight, carried = draw(kernel, 8)
    x = x.at[0, valid:].set(1e9)
    _, after = conv(x, weight, carried, jnp.asarray([valid, SEQ], jnp.int32))
    seen = np.concatenate([carried[0], x[0, :valid]])
    np.testing.assert_array_equal(after[0], seen[len(seen) - (kernel - 1) :])
    np.testing.assert_array_equal(after[1], x[1, SEQ - kernel + 1 :])


def test_a_row_without_tokens_carries_its_inputs_on_unchanged() -> None:
    x, weight, carried = draw(4, 9)
    _, after = conv(x, weight, carried, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(after, carried)


def test_a_pad_reaches_no_token_before_it() -> None:
    x, weight, carried = draw(4, 10)
    lengths = jnp.asarray([6, 20], jnp.int32)
    clean, _ = conv(x, weight, carried, lengths)
    dirty, _ = conv(x.at[0, 6:].set(jnp.nan), weight, carried, lengths)
    np.testing.assert_array_equal(dirty[0, :6], clean[0, :6])
    np.testing.assert_array_equal(dirty[1], clean[1])

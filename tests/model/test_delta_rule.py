"""The three forms of the gated delta rule against its float64 recurrence, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.reference  # noqa: F401  one torch thread, no warnings
import torch
from support.delta_oracle import REGIMES, delta_inputs, delta_oracle
from support.slow import some
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from qwen_moe_jax.model.delta_rule import delta_rule_chunked, delta_rule_scan, delta_rule_step

step = jax.jit(delta_rule_step)
scan = jax.jit(delta_rule_scan)
chunked = jax.jit(delta_rule_chunked)

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200)

# float32 over up to 200 steps, largest difference over the largest value of a row: at most 1.1e-6 over six
# seeds. Differences of cumulative decays, the usual way, would fail at 2.4e-5 ("decay now and then").
TOLERANCE = 4e-6


def assert_close(ours: tuple, truth: tuple) -> None:
    """Output and state, each row (regime) on its own scale."""
    for name, got, expected in zip(("output", "state"), ours, truth, strict=True):
        got = np.asarray(got)
        assert np.isfinite(got).all(), f"{name} is not finite"
        axes = tuple(range(1, got.ndim))
        error = np.abs(got - expected).max(axes) / np.maximum(np.abs(expected).max(axes), 1e-30)
        assert (error <= TOLERANCE).all(), f"{name}: {dict(zip(REGIMES, error, strict=False))}"


def pads_behind(inputs: tuple, valid: int, seq: int, rng: np.random.Generator) -> tuple:
    """The first `valid` steps and then no-ops up to `seq`; a pad's query is arbitrary."""
    query, key, value, g, beta = (
        np.concatenate([x[:, :valid], np.zeros((len(x), seq - valid, *x.shape[2:]), x.dtype)], axis=1)
        for x in inputs[:5]
    )
    query[:, valid:] = rng.normal(size=query[:, valid:].shape)
    return query, key, value, g, beta


@pytest.mark.parametrize("seq", some(LENGTHS, lambda i: i % 2 == 0))
def test_chunks_and_scan_follow_the_recurrence_at_every_length_and_regime(seq: int) -> None:
    for seed in range(2):
        inputs = delta_inputs(seed, seq)
        truth = delta_oracle(*inputs)
        assert_close(chunked(*inputs), truth)
        assert_close(scan(*inputs), truth)


@pytest.mark.parametrize(("key_heads", "heads", "key_dim", "value_dim"), [(3, 3, 8, 24), (1, 4, 24, 8)])
def test_every_head_ratio_reads_its_own_key_head(
    key_heads: int, heads: int, key_dim: int, value_dim: int
) -> None:
    inputs = delta_inputs(7, 70, key_heads=key_heads, heads=heads, key_dim=key_dim, value_dim=value_dim)
    truth = delta_oracle(*inputs)
    assert_close(chunked(*inputs), truth)
    assert_close(scan(*inputs), truth)


def test_single_steps_follow_the_recurrence() -> None:
    *tokens, state = delta_inputs(3, 40)
    truth = delta_oracle(*tokens, state)
    query, key, value, g, beta = tokens
    query, key = (np.repeat(x, 2, axis=2) for x in (query, key))
    outputs = []
    for t in range(40):
        output, state = step(state, query[:, t], key[:, t], value[:, t], g[:, t], beta[:, t])
        outputs.append(output)
    assert_close((np.stack(outputs, axis=1), state), truth)


@pytest.mark.parametrize("chunk_size", [16, 48])
def test_the_chunk_size_changes_nothing(chunk_size: int) -> None:
    inputs = delta_inputs(4, 65)
    other = jax.jit(functools.partial(delta_rule_chunked, chunk_size=chunk_size))
    assert_close(other(*inputs), delta_oracle(*inputs))


def test_a_chunk_size_that_the_solver_cannot_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        delta_rule_chunked(*delta_inputs(4, 65), chunk_size=20)


@pytest.mark.parametrize("split", [1, 2, 31, 63, 64, 65, 119])
def test_a_split_anywhere_with_carried_state_equals_one_pass(split: int) -> None:
    """Pieces are padded with no-ops to one length, as a bucketed prefill does."""
    rng = np.random.default_rng(split)
    inputs = delta_inputs(split, 120)
    truth = delta_oracle(*inputs)
    first_output, state = chunked(*pads_behind(inputs, split, 128, rng), inputs[5])
    rest = tuple(x[:, split:] for x in inputs[:5])
    second_output, state = chunked(*pads_behind(rest, 120 - split, 128, rng), state)
    output = np.concatenate([first_output[:, :split], second_output[:, : 120 - split]], axis=1)
    assert_close((output, state), truth)


def test_steps_that_change_nothing_leave_the_state_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for seq in (1, 64, 128):
        inputs = delta_inputs(1, seq)
        state = inputs[5]
        nothing = pads_behind(inputs, 0, seq, rng)
        np.testing.assert_array_equal(chunked(*nothing, state)[1], state)
        np.testing.assert_array_equal(scan(*nothing, state)[1], state)
    query, key, value, g, beta = (x[:, 0] for x in nothing)
    query, key = (np.repeat(x, 2, axis=1) for x in (query, key))
    np.testing.assert_array_equal(step(state, query, key, value, g, beta)[1], state)


@pytest.mark.parametrize("valid", [1, 40, 63])
def test_pads_behind_the_tokens_leave_the_state_bit_for_bit(valid: int) -> None:
    rng = np.random.default_rng(valid)
    inputs = delta_inputs(valid, 64)
    short = chunked(*pads_behind(inputs, valid, 64, rng), inputs[5])
    long = chunked(*pads_behind(inputs, valid, 128, rng), inputs[5])
    np.testing.assert_array_equal(long[1], short[1])
    np.testing.assert_array_equal(long[0][:, :valid], short[0][:, :valid])
    truth = delta_oracle(*(x[:, :valid] for x in inputs[:5]), inputs[5])
    assert_close((short[0][:, :valid], short[1]), truth)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_half_precision_state_is_refused(dtype: jnp.dtype) -> None:
    *tokens, state = delta_inputs(0, 2)
    for form in (scan, chunked):
        with pytest.raises(TypeError, match="float32"):
            form(*tokens, state.astype(dtype))


def test_half_precision_tokens_are_computed_in_float32() -> None:
    *tokens, state = delta_inputs(0, 64)
    tokens = [jnp.asarray(x, jnp.bfloat16) for x in tokens]
    output, after = chunked(*tokens, state)
    assert output.dtype == after.dtype == jnp.float32
    assert_close((output, after), delta_oracle(*(np.asarray(x, np.float32) for x in tokens), state))


# The bar of the whole model's parity: no less exact than the reference's own float32, on the whole.
LARGEST_ERROR_RATIO = 1.1
# Of one regime over its seeds; the chunked form is at 1.3 for "one key".
LARGEST_ERROR_RATIO_OF_A_REGIME = 2.0


@pytest.mark.parametrize(
    ("ours", "reference"),
    [(chunked, torch_chunk_gated_delta_rule), (scan, torch_recurrent_gated_delta_rule)],
    ids=["chunked", "recurrent"],
)
def test_no_less_exact_than_the_reference(ours, reference) -> None:
    logs = []
    for seed in range(8):
        inputs = delta_inputs(100 + seed, 200)
        truth, _ = delta_oracle(*inputs)
        query, *rest, state = (torch.from_numpy(x) for x in inputs)
        # the reference scales queries itself; 16^-0.5 is a power of two, so nothing is rounded here
        theirs, _ = reference(
            query * 4, *rest[:2], g=rest[2], beta=rest[3], initial_state=state, output_final_state=True
        )
        our_error, their_error = (
            np.sqrt(np.square(x - truth).mean(axis=(1, 2, 3)))
            for x in (np.asarray(ours(*inputs)[0]), theirs.numpy())
        )
        logs.append(np.log(our_error / their_error))
    ratio = np.exp(np.mean(logs, axis=0))
    assert np.exp(np.mean(logs)) <= LARGEST_ERROR_RATIO, dict(zip(REGIMES, ratio, strict=True))
    assert ratio.max() <= LARGEST_ERROR_RATIO_OF_A_REGIME, dict(zip(REGIMES, ratio, strict=True))

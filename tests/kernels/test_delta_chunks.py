"""The chunked delta rule as a kernel, interpreted, against the recurrence in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.convolved import convolved
from support.delta_oracle import REGIMES, delta_oracle
from support.slow import some

from qwen_moe_jax.kernels import delta_chunks as kernel
from qwen_moe_jax.kernels.delta_chunks import delta_chunks, one_chunk, unit_lower_inverse
from qwen_moe_jax.model.norms import L2_EPS

# As of the plain form (`tests/model/test_delta_rule.py`): float32 over up to 200 steps, largest difference
# over the largest value of a row. The kernel is at 3.5e-7 at most over the draws here.
TOLERANCE = 4e-6
# bfloat16: what comes out is rounded once, to half of a unit of 8 bits; the state is not.
BFLOAT16_TOLERANCE = 2.0**-8


@partial(jax.jit, static_argnames=("chunk", "columns"))
def run(given: dict[str, Any], slots: Any, counts: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    return delta_chunks(slots=slots, counts=counts, **given, eps=L2_EPS, interpret=True, **options)


def in_order(given: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose states lie in their order, all of whose tokens count."""
    batch, seq = given["g"].shape[:2]
    found = run(given, jnp.arange(batch), jnp.full(batch, seq, jnp.int32), **options)
    return np.asarray(found[0]), np.asarray(found[1])


def errors(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each row (regime) on its own scale."""
    assert np.isfinite(got).all()
    axes = tuple(range(1, got.ndim))
    return np.abs(got - wanted).max(axes) / np.maximum(np.abs(wanted).max(axes), 1e-30)


def assert_close(ours: tuple, truth: tuple, tolerance: float = TOLERANCE) -> None:
    for name, got, wanted in zip(("output", "state"), ours, truth, strict=True):
        found = errors(np.asarray(got, np.float64), wanted)
        assert (found <= tolerance).all(), f"{name}: {dict(zip(REGIMES, found, strict=False))}"


LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200)


@pytest.mark.parametrize("seq", some(LENGTHS, lambda i: i in (0, 7)))
def test_the_kernel_follows_the_recurrence_at_every_length_and_regime(seq):
    for seed in range(2):
        given, tokens = convolved(seed, seq)
        assert_close(in_order(given), delta_oracle(*tokens))


SIZES = [  # key heads, heads, Dk, Dv: shared key heads, both sides of the widths that programs have
    (3, 3, 8, 24),
    (1, 4, 24, 40),
    (2, 2, 33, 5),
    (1, 2, 128, 128),
]


@pytest.mark.parametrize("sizes", some([(each,) for each in SIZES], lambda i: i == 1))
def test_every_head_reads_its_own_channels(sizes):
    named = dict(zip(("key_heads", "heads", "key_dim", "value_dim"), sizes, strict=True))
    given, tokens = convolved(7, 40, **named)
    assert_close(in_order(given), delta_oracle(*tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "columns"), [(16, 32), (32, 16), (64, 64)])
def test_the_sizes_of_chunks_and_programs_change_nothing(chunk, columns):
    given, tokens = convolved(4, 70, value_dim=40)
    assert_close(in_order(given, chunk=chunk, columns=columns), delta_oracle(*tokens))


def test_a_split_with_carried_state_and_pads_of_any_kind_equals_one_pass():
    given, tokens = convolved(5, 40)
    batch, wanted = len(REGIMES), delta_oracle(*tokens)
    rng = np.random.default_rng(5)
    cut = rng.integers(0, 41, batch)  # a row of its own length each
    state, outputs = given["state"], np.zeros_like(wanted[0])
    for first, counts in ((np.zeros(batch, int), cut), (cut, 40 - cut)):
        at = np.minimum(first[:, None] + np.arange(40), 39)
        token = np.arange(40) < counts[:, None]
        piece: dict[str, Any] = {"state": state}
        piece["mixed"] = np.where(
            token[..., None], np.take_along_axis(given["mixed"], at[..., None], 1), np.nan
        )
        for name in ("g", "beta"):
            piece[name] = np.where(token[..., None], np.take_along_axis(given[name], at[..., None], 1), 0)
        output, state = run(piece, jnp.arange(batch), jnp.asarray(counts, jnp.int32))
        for row in range(batch):
            outputs[row, first[row] : first[row] + counts[row]] = output[row, : counts[row]]
    assert_close((outputs, np.asarray(state)), wanted)


def test_rows_without_tokens_leave_their_state_bit_for_bit_and_others_slots_are_untouched():
    given, _ = convolved(6, 20)
    rng, batch = np.random.default_rng(6), len(REGIMES)
    pool = rng.normal(size=(batch + 2, *given["state"].shape[1:])).astype(np.float32)
    slots = rng.permutation(batch + 2)[:batch].astype(np.int32)
    slots[2] = batch + 2  # none
    counts = np.full(batch, 20, np.int32)
    counts[4] = 0
    for name in ("g", "beta"):
        given[name][4] = 0
    _, after = run(given | {"state": pool}, jnp.asarray(slots), jnp.asarray(counts))
    kept = np.setdiff1d(np.arange(batch + 2), np.delete(slots, [2, 4]))
    assert len(kept) == 4
    np.testing.assert_array_equal(np.asarray(after)[kept], pool[kept])
    changed = np.delete(slots, [2, 4])
    assert (np.abs(np.asarray(after)[changed] - pool[changed]).max(axis=(1, 2, 3)) > 0).all()


def test_tokens_in_bfloat16_are_computed_in_float32():
    given, _ = convolved(8, 40)
    given["mixed"] = np.asarray(jnp.asarray(given["mixed"], jnp.bfloat16))
    output, after = in_order(given)
    wide = given | {"mixed": given["mixed"].astype(np.float32)}
    wanted, wanted_after = in_order(wide)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, wanted_after)
    assert (errors(output.astype(np.float64), wanted.astype(np.float64)) <= BFLOAT16_TOLERANCE).all()


def test_the_inverse_is_as_exact_as_substitution_where_powers_are_not():
    """One key, fully rewritten: all entries below the diagonal are about one."""
    rng = np.random.default_rng(0)
    system = np.tril(rng.uniform(0.999, 1, (64, 64)), -1).astype(np.float32)
    exact = np.linalg.inv(np.eye(64) + system.astype(np.float64))
    found = np.asarray(unit_lower_inverse(jnp.asarray(system)), np.float64)
    assert np.abs(found - exact).max() <= 1e-6
    power, product = system, np.eye(64, dtype=np.float32) - system
    for _ in range(5):
        power = power @ power
        product = product @ (np.eye(64, dtype=np.float32) + power)
    assert np.abs(product - exact).max() > 1


def _without_the_last_join(system: jax.Array) -> jax.Array:
    half = system.shape[0] // 2
    apart = jnp.arange(system.shape[0]) // half
    return unit_lower_inverse(jnp.where(apart[:, None] == apart[None, :], system, 0))


def _decay_one_step_late(state, query, key, value, g, beta):
    return one_chunk(state, query, key, value, jnp.roll(g, 1), beta)


WRONG = {
    "an inverse in two halves": ("unit_lower_inverse", _without_the_last_join),
    "decay one step late": ("one_chunk", _decay_one_step_late),
    "lengths that are forgotten": ("_normalised", lambda x, eps: x),
}


@pytest.mark.parametrize("what", some(WRONG, lambda i: i == 0))
def test_a_kernel_that_is_wrong_in_one_place_fails(what, monkeypatch):
    given, tokens = convolved(9, 40)
    name, wrong = WRONG[what]
    monkeypatch.setattr(kernel, name, wrong)
    batch = len(REGIMES)
    found = delta_chunks(
        slots=jnp.arange(batch), counts=jnp.full(batch, 40, jnp.int32), **given, eps=L2_EPS, interpret=True
    )
    with pytest.raises(AssertionError):
        assert_close(tuple(np.asarray(x) for x in found), delta_oracle(*tokens))

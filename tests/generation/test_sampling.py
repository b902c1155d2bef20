"""Penalties, filters and the draw against transformers' own processors, NumPy and the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from qwen_moe_jax.engine.sampling import (
    IN_PROMPT,
    RowSampling,
    SamplingParams,
    apply_penalties,
    choose_tokens,
    filter_logits,
    history,
    log_probabilities,
    row_keys,
    sample,
    step_keys,
)
from qwen_moe_jax.generation.options import GenerationConfig

VOCAB = 97
# Float32 softmax and cumulative sums over 97 entries, in two summation orders: some 97 roundings of 6e-8 at
# worst, of numbers up to one. A token whose mass is nearer to a threshold than this may fall on either side.
MASS_ROUNDING = 97 * 6e-8
# exp of a logit: relative error of the logit's own rounding, |logit| * 6e-8 (logits reach 4e6 below at the
# lowest temperature, but then only differences of exactly 0 leave any probability), and of the sum's.
PROBABILITY_TOLERANCE = 2e-5
TIE = 3e-7  # two quotients of float32 that differ in the last place

_penalise = jax.jit(apply_penalties)
_filter = jax.jit(filter_logits)
_sample = jax.jit(sample)
_choose = jax.jit(choose_tokens)


def rows_of(config: GenerationConfig, rows: int) -> SamplingParams:
    """Rows with the same options and seeds of their own."""
    return SamplingParams.of([config.row_sampling(seed, 0) for seed in range(rows)])


def seen(mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What penalties know, of tokens in the prompt and how often each was generated."""
    return np.asarray(counts | np.where(mask, IN_PROMPT, 0), np.int32)


@jax.jit
def _many_draws(logits, seeds):
    return sample(jnp.broadcast_to(logits, (seeds.shape[0], logits.shape[0])), row_keys(seeds, seeds * 0))


def random_options(rng: np.random.Generator) -> GenerationConfig:
    def pick(*values):
        return values[rng.integers(len(values))]

    return GenerationConfig(
        do_sample=True,
        temperature=float(pick(1.0, 0.3, 0.7, 1.7, 1e-6, 1e-3, 50.0, 1e6)),
        top_k=int(pick(0, 1, 2, 5, 20, VOCAB - 1, VOCAB, VOCAB + 50, 2**40)),
        top_p=float(pick(1.0, 0.95, 0.5, 0.1, 1e-6, 0.999)),
        min_p=float(pick(0.0, 0.05, 0.3, 0.9, 1e-4)),
    )


def random_logits(rng: np.random.Generator, case: int) -> np.ndarray:
    logits = rng.normal(size=(4, VOCAB)) * (0.1, 1, 4, 15)[case % 4]
    if case % 3 == 0:
        logits = np.round(logits)  # many ties
    if case % 10 == 9:
        logits[:] = 0.5  # nothing but ties
    return logits.astype(np.float32)


def reference_filter(logits: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """In the order in which `_get_logits_processor` appends them, under the same conditions."""
    processors = []
    if config.temperature != 1.0:
        processors.append(theirs.TemperatureLogitsWarper(config.temperature))
    if config.top_k != 0:
        processors.append(theirs.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(theirs.TopPLogitsWarper(config.top_p))
    processors.append(theirs.MinPLogitsWarper(config.min_p))
    scores = torch.tensor(logits)
    for processor in processors:
        scores = processor(None, scores)
    return scores.numpy()


def distances_to_thresholds(scaled: np.ndarray, config: GenerationConfig, rank: int) -> tuple[float, float]:
    """In float64: how far the token of a rank is from top-p's threshold in mass, and from min-p's.

    The second distance is relative to the largest probability; top-p is a common factor of both.
    """
    ranked = np.sort(scaled.astype(np.float64))[::-1]
    if config.top_k:
        ranked[ranked < ranked[min(config.top_k, VOCAB) - 1]] = -np.inf
    probabilities = np.exp(ranked - ranked[0])
    min_p = abs(probabilities[rank] - config.min_p)
    tail = probabilities[::-1].cumsum()[::-1] / probabilities.sum()
    return abs(tail[rank] - (1 - config.top_p)), min_p


@pytest.mark.parametrize("block", range(4))
def test_filters_leave_the_support_and_probabilities_of_transformers(block):
    edges = 0
    for case in range(block * 60, block * 60 + 60):
        rng = np.random.default_rng(case)
        config, logits = random_options(rng), random_logits(rng, case)
        ours = np.asarray(_filter(jnp.asarray(logits), rows_of(config, len(logits))))
        reference = reference_filter(logits, config)
        scaled = logits / np.float32(config.temperature)
        for row, (a, b) in enumerate(zip(ours, reference, strict=True)):
            count_a, count_b = np.isfinite(a).sum(), np.isfinite(b).sum()
            # torch's sort is not stable, so which of equal tokens top-p keeps is chance: compare by rank
            shared = min(count_a, count_b)
            kept_a, kept_b = (np.sort(scaled[row][np.isfinite(x)])[::-1] for x in (a, b))
            np.testing.assert_allclose(kept_a[:shared], kept_b[:shared], rtol=TIE)
            for rank in range(shared, max(count_a, count_b)):
                # only a token that float32 cannot place may differ: shown from float64
                distances = distances_to_thresholds(scaled[row], config, rank)
                assert min(distances) <= MASS_ROUNDING, (case, row, rank, config, distances)
            if count_a != count_b:
                edges += 1
                continue
            ours_p, reference_p = (np.sort(np.asarray(jax.nn.softmax(x))) for x in (a, b))
            np.testing.assert_allclose(ours_p, reference_p, atol=PROBABILITY_TOLERANCE, rtol=0)
            ties = len(np.unique(scaled[row])) < VOCAB
            assert ties or (np.isfinite(a) == np.isfinite(b)).all()
    assert edges <= 4  # of 240 rows: the excuse is for the edge, not for the rule


def test_a_tie_at_the_edge_of_top_p_keeps_the_larger_ids_as_a_stable_sort_does():
    logits = np.zeros((1, 8), np.float32)  # an eighth each, exact in float32; torch sorts so few stably
    for top_p, kept in ((0.25, 2), (0.3, 3), (0.5, 4), (0.51, 5), (1.0, 8)):
        config = GenerationConfig(do_sample=True, top_k=0, top_p=top_p)
        ours = np.isfinite(_filter(jnp.asarray(logits), rows_of(config, 1)))
        np.testing.assert_array_equal(ours, np.isfinite(reference_filter(logits, config)))
        assert ours[0].tolist() == [False] * (8 - kept) + [True] * kept


def test_repetition_penalty_is_that_of_transformers():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        config = GenerationConfig(repetition_penalty=float(rng.choice([0.5, 1.0, 1.1, 2.0, 7.5])))
        logits = rng.normal(size=(3, VOCAB)).astype(np.float32) * 5
        logits[:, ::7] = 0
        prompts = rng.integers(VOCAB, size=(3, 12))
        generated = rng.integers(VOCAB, size=(3, 6))
        mask, counts = np.zeros((3, VOCAB), bool), np.zeros((3, VOCAB), np.int32)
        for row in range(3):
            mask[row, prompts[row]] = True
            np.add.at(counts[row], generated[row], 1)
        ours = _penalise(jnp.asarray(logits), seen(mask, counts), rows_of(config, 3))
        processor = theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        expected = processor(torch.tensor(np.concatenate([prompts, generated], 1)), torch.tensor(logits))
        # one product or quotient of the same float32 numbers; XLA may multiply by a reciprocal
        np.testing.assert_allclose(ours, expected, rtol=3e-7, atol=0)


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        presence, frequency = rng.normal(size=2)
        config = GenerationConfig(presence_penalty=float(presence), frequency_penalty=float(frequency))
        logits = rng.normal(size=(2, VOCAB)).astype(np.float32)
        counts = rng.integers(0, 4, size=(2, VOCAB)).astype(np.int32)
        mask = rng.random((2, VOCAB)) < 0.5
        expected = logits.astype(np.float64)
        for row in range(2):
            for token in range(VOCAB):
                for occurrence in range(counts[row, token]):
                    expected[row, token] -= frequency + (presence if occurrence == 0 else 0)
        ours = _penalise(jnp.asarray(logits), seen(mask, counts), rows_of(config, 2))
        np.testing.assert_allclose(ours, expected, atol=3e-6)  # a few roundings of numbers below 16


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=12).astype(np.float32)
    draws = 20_000
    tokens = np.asarray(_many_draws(jnp.asarray(logits), jnp.arange(draws, dtype=jnp.uint32)))
    expected = np.exp(logits) / np.exp(logits).sum() * draws
    chi_square = ((np.bincount(tokens, minlength=12) - expected) ** 2 / expected).sum()
    # 11 degrees of freedom: 31.3 is the 99.9 % point; the seeds are fixed, so this does not flicker
    assert chi_square < 31.3


def test_successive_steps_and_sequences_draw_independently():
    logits = jnp.zeros((2000, 4))
    draws = []
    for sequence, step in ((0, 0), (0, 1), (1, 0)):
        keys = row_keys(jnp.arange(2000, dtype=jnp.uint32), jnp.full(2000, sequence, jnp.uint32))
        draws.append(np.asarray(_sample(logits, step_keys(keys, jnp.full(2000, step)))))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agreement = (draws[a] == draws[b]).mean()
        assert abs(agreement - 0.25) < 0.04  # 4 standard deviations of a mean of 2,000


def test_a_filtered_token_is_never_drawn():
    config = GenerationConfig(do_sample=True, top_k=3, top_p=1.0)
    logits = np.random.default_rng(5).normal(size=(1, VOCAB)).astype(np.float32)
    filtered = np.asarray(_filter(jnp.asarray(logits), rows_of(config, 1)))[0]
    tokens = np.asarray(_many_draws(jnp.asarray(filtered), jnp.arange(20_000, dtype=jnp.uint32)))
    assert set(tokens.tolist()) == set(np.argsort(logits[0])[-3:].tolist())


def _inputs(batch: int):
    rng = np.random.default_rng(11)
    logits = rng.normal(size=(batch, VOCAB)).astype(np.float32) * 3
    mask = rng.random((batch, VOCAB)) < 0.2
    counts = rng.integers(0, 3, (batch, VOCAB)).astype(np.int32)
    config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
    )
    return logits, seen(mask, counts), config


MIXED = [
    GenerationConfig(),
    GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=2.0),
    GenerationConfig(do_sample=True, top_k=3),
    GenerationConfig(presence_penalty=1.5),
    GenerationConfig(do_sample=True, min_p=0.2, repetition_penalty=3.0),
    GenerationConfig(),
]


def test_a_row_is_bitwise_independent_of_its_neighbours_and_their_options():
    logits, history_of, _ = _inputs(len(MIXED))
    rows = [config.row_sampling(seed, seed % 2) for seed, config in enumerate(MIXED)]

    def run(order):
        order = np.asarray(order)
        params = SamplingParams.of([rows[i] for i in order])
        return np.asarray(_choose(logits[order], params, 3 * order, history_of[order]))

    tokens = run(range(len(MIXED)))
    for order in ([5, 4, 3, 2, 1, 0], [3, 3, 0, 3, 1, 2], [0], [4], [2, 5, 1], [1], [0, 5], [2]):
        np.testing.assert_array_equal(run(order), tokens[order])
    assert tokens[0] == logits[0].argmax()


def test_rows_may_have_parameters_of_their_own():
    logits, *_ = _inputs(2)
    configs = [GenerationConfig(do_sample=True, top_k=k, top_p=p) for k, p in ((1, 1.0), (0, 0.5))]
    both = SamplingParams.of([config.row_sampling(0, 0) for config in configs])
    together = np.asarray(_filter(jnp.asarray(logits), both))
    for row, config in enumerate(configs):
        np.testing.assert_array_equal(
            np.isfinite(together[row]), np.isfinite(reference_filter(logits[row : row + 1], config)[0])
        )


def test_logprobs_are_the_models_own_log_softmax():
    logits, *_ = _inputs(4)
    tokens = np.asarray([3, 0, 96, 17])
    expected = jax.nn.log_softmax(logits)[np.arange(4), tokens]
    # a rounding of numbers below 16, twice
    np.testing.assert_allclose(log_probabilities(logits, tokens), expected, atol=2e-6)


def test_greedy_takes_the_largest_logit_and_the_first_of_equals():
    logits = np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32)
    logits[2, [7, 50]] = 9.0
    nothing = np.zeros((5, VOCAB), np.int32)
    tokens = _choose(logits, rows_of(GenerationConfig(), 5), np.zeros(5, int), nothing)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert tokens[2] == 7


def test_greedy_sees_penalties():
    config = GenerationConfig(presence_penalty=1e6)
    logits = np.array([[3.0, 2.0, 1.0]], np.float32)
    counts, mask = np.array([[1, 0, 0]], np.int32), np.array([[False, True, False]])
    tokens = _choose(logits, rows_of(config, 1), np.zeros(1, int), seen(mask, counts))
    assert tokens.tolist() == [1]


def test_a_history_counts_what_was_generated_and_marks_the_prompt():
    found = history(6, np.asarray([1, 4, 4], np.int32), np.asarray([4, 2, 2]))
    assert found.tolist() == [0, IN_PROMPT, 2, 0, IN_PROMPT + 1, 0]


def test_a_row_says_what_its_options_need_and_no_more():
    def row(**options):
        return GenerationConfig(**options).row_sampling(0, 0)

    assert row().greedy
    everything = row(do_sample=True, top_k=0, top_p=1.0)
    assert (everything.filters, everything.penalises, everything.greedy) == (False, False, False)
    for change in ({"top_k": 3}, {"top_k": 0, "top_p": 0.5}, {"top_k": 0, "top_p": 1.0, "min_p": 0.1}):
        assert row(do_sample=True, **change).filters
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert row(**{name: 1.5}).penalises
        assert not row(**{name: 1.5}).greedy


def test_parameters_are_traced_so_that_no_value_recompiles():
    before = _filter._cache_size()
    for config in (GenerationConfig(do_sample=True), GenerationConfig(do_sample=True, top_k=0, top_p=0.2)):
        _filter(jnp.zeros((9, VOCAB)), rows_of(config, 9))
    assert _filter._cache_size() == before + 1
    options = {field.name for field in dataclasses.fields(RowSampling)} - {"biases"}
    derived = {"filters", "penalises", "adjusts", "biased", "bias"}
    assert {field.name for field in dataclasses.fields(SamplingParams)} == options | derived

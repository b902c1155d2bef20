"""Scores are the log-softmax of logits, however contexts are shared."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from support import parity
from support.meshes import mesh_case
from support.problems import CHECKPOINT
from support.reference import save_reference

from qwen_moe_jax import QwenMoe, experiments, make_mesh
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.scores import rolling_windows

# Of log-probabilities of logits of about 5, each within the parity bar.
TOLERANCE = 2e-3


@functools.cache
def model(seed: int) -> QwenMoe:
    folder = save_reference(parity.random_model(seed).reference, Path(tempfile.mkdtemp()))
    return QwenMoe.from_pretrained(folder, dtype="float32")


def wanted(model: QwenMoe, context: list[int], text: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities of the text's tokens, most likely tokens there) by the logits of both together."""
    logits = model.logits([[*context, *text]])[0, len(context) - 1 : -1]
    every = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return every[np.arange(len(text)), text], every.argmax(axis=-1)


def pairs(vocab: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Contexts of every length beside a page's border, some of them with several continuations."""
    rng, found = np.random.default_rng(seed), []
    for length in (1, 2, 63, 64, 65, 66, 130):
        context = rng.integers(0, vocab, length).tolist()
        for _ in range(int(rng.integers(1, 5))):
            found.append((context, rng.integers(0, vocab, int(rng.choice([1, 2, 9, 70]))).tolist()))
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def check(scoring: QwenMoe, one: QwenMoe, seed: int) -> None:
    given = pairs(one.config.vocab_size, seed)
    scores = scoring.score([c for c, _ in given], [t for _, t in given], top_logprobs=3)
    for (context, text), score in zip(given, scores, strict=True):
        logprobs, greedy = wanted(one, context, text)
        np.testing.assert_allclose(score.token_logprobs, logprobs, atol=TOLERANCE)
        assert score.logprob == pytest.approx(logprobs.sum(), abs=TOLERANCE * len(text))
        assert score.is_greedy == bool((greedy == text).all())
        assert score.tokens == text
        for best, likely in zip(greedy, score.top_logprobs, strict=True):
            assert len(likely) == 3
            assert next(iter(likely)) == best
            assert list(likely.values()) == sorted(likely.values(), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 22])
def test_scores_are_the_log_softmax_of_logits(seed: int) -> None:
    check(model(seed), model(seed), seed)


@pytest.mark.slow
def test_scores_of_a_mesh_are_those_of_one_device() -> None:
    case = mesh_case(6)
    one = QwenMoe.from_pretrained(case.folder, dtype="float32")
    mesh = QwenMoe.from_pretrained(
        case.folder, dtype="float32", mesh=make_mesh(2, 2, 2), shared_expert="sharded", attention="data"
    )
    check(mesh, one, 1)


@pytest.mark.slow
def test_the_likeliest_continuation_is_greedy_and_an_edit_is_scored() -> None:
    own, rng = model(3), np.random.default_rng(0)
    context = rng.integers(0, own.config.vocab_size, 20).tolist()
    text = own.generate([context], max_new_tokens=5, eos_token_id=[]).sequences[0]
    (score,) = own.score([context], [text])
    assert score.is_greedy
    other = {"layers.0.moe": experiments.scale(3)}
    (edited,) = own.score(context, text, edit=other)
    logits = own.run([[*context, *text]], edit=other).logits.array[0, len(context) - 1 : -1]
    every = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    np.testing.assert_allclose(edited.token_logprobs, every[np.arange(5), text], atol=TOLERANCE)
    assert abs(edited.logprob - score.logprob) > 10 * TOLERANCE


@pytest.mark.slow
def test_what_generate_says_of_prompt_and_tokens_is_what_scores_say() -> None:
    own, rng = model(3), np.random.default_rng(1)
    prompts = [rng.integers(0, own.config.vocab_size, n).tolist() for n in (7, 30)]
    out = own.generate(
        prompts, max_new_tokens=4, eos_token_id=[], top_logprobs=2, prompt_logprobs=1, return_logprobs=True
    )
    assert out.prompt_logprobs
    assert out.top_logprobs
    assert out.logprobs
    for number, prompt in enumerate(prompts):
        logprobs, greedy = wanted(own, prompt[:1], prompt[1:])
        assert out.prompt_logprobs[number][0] is None
        np.testing.assert_allclose(out.prompt_logprobs[number][1:], logprobs, atol=TOLERANCE)
        assert out.prompt_top_logprobs
        assert [next(iter(one)) for one in out.prompt_top_logprobs[number][1:]] == greedy.tolist()
        for token, logprob, likely in zip(
            out.sequences[number], out.logprobs[number], out.top_logprobs[number], strict=True
        ):
            assert likely[token] == pytest.approx(logprob, abs=TOLERANCE)
            assert len(likely) == 2


def test_every_token_is_in_one_window_behind_as_much_as_fits() -> None:
    for count in (1, 2, 7, 8, 9, 31):
        tokens = list(range(100, 100 + count))
        for window in (1, 2, 3, 8, 40):
            windows = rolling_windows(tokens, 7, window)
            assert [token for _, text in windows for token in text] == tokens
            whole = [7, *tokens]
            done = 1
            for context, text in windows:
                assert len(context) + len(text) - 1 <= window
                end = done + len(text)
                assert [*context, *text] == whole[end - len(context) - len(text) : end]
                if done > 1:  # what is fed fills the window
                    assert len(context) + len(text) - 1 == min(window, end - 1)
                done = end


def test_perplexity_is_that_of_logits_and_needs_text() -> None:
    trained = QwenMoe.from_pretrained(CHECKPOINT, dtype="float32")
    assert trained.tokenizer is not None
    text = "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?"
    ids = trained.tokenizer.encode(text)
    logprobs, _ = wanted(trained, [trained._eos_ids[0]], list(ids))
    found = trained.perplexity(text)
    assert np.log(found) == pytest.approx(-logprobs.mean(), abs=TOLERANCE)
    assert trained.perplexity(text, window=5) != pytest.approx(found, rel=0.01)
    spaced, plain = trained.score(["Tom has ", "Tom has"], ["12 apples", " 12 apples"])
    assert spaced == plain
    for given, message in (
        ((["a", "b"], ["c"]), "2 contexts and 1 continuations"),
        ((["a"], [""]), "continuation 0 is empty"),
        (([[1]], [[10**6]]), "outside the vocabulary"),
        ((["a"], [[1]]), "expected two texts or two lists"),
        (("a", []), "continuations is empty"),
        (("a", None), "continuations is None"),
    ):
        with pytest.raises(InputError, match=message):
            trained.score(*given)

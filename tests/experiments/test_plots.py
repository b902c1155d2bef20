"""Pictures show what was captured: their numbers are read back from them."""

import functools

import numpy as np
import pytest
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe, plots
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments import Run

TEXT = "Tom has 12 apples. Anna gives <him> 7 more."


@functools.cache
def model() -> QwenMoe:
    return QwenMoe.from_pretrained(CHECKPOINT, dtype="float32")


@functools.cache
def run() -> Run:
    return model().run(TEXT, capture="*")


def image(figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_usage_counts_every_choice_and_load_is_what_each_rank_would_compute() -> None:
    experts, layers = model().config.num_experts, model().config.num_hidden_layers
    shares = image(plots.expert_usage(run(), experts))
    length = len(run().tokens[0])
    for layer in range(layers):
        for expert in range(experts):
            chosen = (run()[f"layers.{layer}.router"].ids.array[0] == expert).sum()
            assert shares[layer, expert] == pytest.approx(chosen / length)
    lines = plots.rank_load(run(), experts, 4).axes[0].get_lines()
    fullest = shares.reshape(layers, 4, -1).sum(axis=2) / shares.sum(axis=1, keepdims=True) * 4
    np.testing.assert_allclose(lines[0].get_ydata(), fullest.max(axis=1))
    np.testing.assert_allclose(lines[1].get_ydata(), fullest.min(axis=1))


def test_the_lens_ends_in_the_models_own_words() -> None:
    lens = model().logit_lens(run())
    logits = run().logits.array[0]
    np.testing.assert_array_equal(lens.ids.array[-1], logits.argmax(axis=-1))
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(lens.probabilities.array[-1], shares.max(axis=-1), atol=1e-4)
    figure = plots.logit_lens(lens, lambda token: f"<{token}>")
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {f"<{token}>"[:8] for token in lens.ids.array.ravel()} == said
    np.testing.assert_array_equal(image(figure), lens.probabilities.array)


def test_entropy_attention_and_norms_are_those_of_the_arrays() -> None:
    entropy = image(plots.router_entropy(run()))
    logits = run()["layers.1.router_logits"].array[0, 3].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert entropy[1, 3] == pytest.approx(-(shares * np.log2(shares)).sum())
    np.testing.assert_array_equal(
        image(plots.attention(run(), 3, 1)), run()["layers.3.attention"].array[0, 1]
    )
    lines = plots.norms(run(), ("moe", "state")).axes[0].get_lines()
    moe = [np.linalg.norm(run()[f"layers.{i}.moe"].array[0], axis=-1).mean() for i in range(4)]
    np.testing.assert_allclose(lines[0].get_ydata(), moe, rtol=1e-5)
    assert list(lines[1].get_xdata()) == [0, 1, 2]  # the layers that have a state


def test_coloured_text_is_the_text_with_its_values_and_nothing_of_it_is_markup() -> None:
    html = str(plots.colour_by_logprob(run()))
    assert "&lt;" in html
    assert "<him>" not in html
    logits = run().logits.array[0, :-1].astype(np.float64)
    every = logits - np.log(np.exp(logits - logits.max()).sum(axis=-1, keepdims=True)) - logits.max()
    value = every[0, run().tokens[0][1]]
    assert f"log-probability {value:.4g}" in html
    routed = run()["layers.2.router"]
    expert = int(routed.ids.array[0, 0, 0])
    assert f"weight of expert {expert} in layer 2 {routed.weights.array[0, 0, 0]:.4g}" in str(
        plots.colour_by_expert(run(), 2, expert)
    )


def test_what_a_picture_lacks_is_said() -> None:
    bare = model().run(TEXT)
    for make, message in (
        (lambda: plots.expert_usage(bare, 16), r'capture="layers\.\*\.router"'),
        (lambda: plots.router_entropy(bare), r'capture="layers\.\*\.router_logits"'),
        (lambda: model().logit_lens(bare), r'capture="layers\.\*\.residual_out"'),
        (lambda: plots.rank_load(run(), 16, 17), "expected 1 to the model's 16 experts"),
        (lambda: plots.colour_tokens(bare, [1.0]), "one for each token"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_cards_are_short_and_say_what_a_model_is() -> None:
    card = repr(model())
    assert len(card.splitlines()) < 9
    assert "16, 4 a token, and a shared one" in card
    assert "3 Gated DeltaNet, 1 full attention" in model()._repr_html_()
    assert "layers.0.router" in run()._repr_html_()

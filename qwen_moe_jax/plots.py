"""Pictures of what a run captured (extra `notebooks`).

Functions give matplotlib figures, which notebooks show, or HTML. Colours are those of cividis and of Okabe
and Ito, which colour-blind readers can tell apart.
"""

import html
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments.arrays import LabelledArray, RouterCapture
from qwen_moe_jax.experiments.lens import Lens
from qwen_moe_jax.experiments.runs import Run
from qwen_moe_jax.extras import extra_module

_MAP = "cividis"
# Okabe & Ito, "Color Universal Design", 2008.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Labels of an axis, at most.
_LABELS = 64


class Html:
    """A piece of HTML that notebooks show; `str()` is its source."""

    def __init__(self, source: str):
        self.source = source

    def __str__(self) -> str:
        return self.source

    def _repr_html_(self) -> str:
        return self.source


def expert_usage(run: Run, experts: int, *, title: str = "Share of tokens that choose each expert") -> Any:
    """A heat map, layers down and experts across, of how often each expert is chosen.

    Args:
        run: that captured "layers.*.router".
        experts: of the model (`model.config.num_experts`).
        title: of the picture.
    """
    routers = _routers(run)
    shares = np.stack([r.counts(experts) / (r.ids.array[..., 0] >= 0).sum() for r in routers.values()])
    figure, axes = _figure(0.12 * experts + 3, 0.25 * len(routers) + 1.5)
    image = axes.imshow(shares, aspect="auto", cmap=_MAP, vmin=0)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    _ticks(axes, "y", list(routers))
    figure.colorbar(image, ax=axes, label="share of tokens")
    return figure


def rank_load(run: Run, experts: int, ranks: int) -> Any:
    """How unevenly the run's tokens would load the ranks of an expert axis: for each layer each rank's slots
    over their mean. The slowest rank decides how long a layer takes.

    Args:
        run: that captured "layers.*.router".
        experts: of the model.
        ranks: that they are divided among, in whole experts.

    Raises:
        InputError: more ranks than experts.
    """
    if not 1 <= ranks <= experts:
        raise InputError(f"ranks is {ranks}; expected 1 to the model's {experts} experts.")
    held = -(-experts // ranks)
    owner = np.arange(experts) // held
    routers = _routers(run)
    loads = np.stack(
        [np.bincount(owner, weights=r.counts(experts), minlength=ranks) for r in routers.values()]
    )
    loads = loads / loads.mean(axis=1, keepdims=True)
    figure, axes = _figure(7, 3.5)
    layers = list(routers)
    axes.fill_between(layers, loads.min(axis=1), loads.max(axis=1), color=_LINES[5], alpha=0.4, step="mid")
    axes.step(layers, loads.max(axis=1), where="mid", color=_LINES[1], label="fullest rank")
    axes.step(layers, loads.min(axis=1), where="mid", color=_LINES[0], label="emptiest rank")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="layer", ylabel="slots over the mean", title=f"Load of {ranks} ranks, by layer", ylim=(0, None)
    )
    _ticks(axes, "x", layers)
    axes.legend(frameon=False)
    return figure


def router_entropy(run: Run, row: int = 0) -> Any:
    """How undecided each layer's router is, by position: entropy over all experts, in bits.

    Args:
        run: that captured "layers.*.router_logits".
        row: of the run.
    """
    values = _arrays(run, "router_logits")
    length = len(run.tokens[row])
    entropies = []
    for value in values.values():
        logits = value.array[row, :length].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        entropies.append(-(shares * np.log2(np.maximum(shares, 1e-30))).sum(axis=-1))
    return _by_layer_and_position(
        np.stack(entropies), list(values), _texts(run, row), "Entropy of the router", "bits"
    )


def logit_lens(lens: Lens, decode: Callable[[int], str] = str) -> Any:
    """What each layer would say next: its most likely token in each place, coloured by its probability.

    Args:
        lens: of `model.logit_lens`.
        decode: token -> text, such as `lambda i: model.tokenizer.decode([i])`.
    """
    shares = lens.probabilities.array
    layers, length = shares.shape
    figure, axes = _figure(0.75 * length + 2, 0.32 * layers + 1.8)
    image = axes.imshow(shares, aspect="auto", cmap=_MAP, vmin=0, vmax=1, origin="lower")
    for layer in range(layers):
        for place in range(length):
            dark = shares[layer, place] < 0.55
            text = decode(int(lens.ids.array[layer, place])).replace("\n", "\\n")
            axes.text(
                place,
                layer,
                text[:8],
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    axes.set(xlabel="after the token", ylabel="layer", title="Logit lens: most likely next token")
    _ticks(axes, "x", lens.ids.coordinates("position"))
    _ticks(axes, "y", lens.layers)
    figure.colorbar(image, ax=axes, label="probability")
    return figure


def attention(run: Run, layer: int, head: int, row: int = 0) -> Any:
    """What each position reads of the ones before it, in one head.

    Args:
        run: that captured "layers.N.attention".
        layer, head: which one.
        row: of the run.
    """
    length = len(run.tokens[row])
    weights = run[f"layers.{layer}.attention"].array[row, head, :length, :length]
    figure, axes = _figure(0.22 * length + 2.5, 0.22 * length + 2)
    image = axes.imshow(weights, cmap=_MAP, vmin=0)
    axes.set(xlabel="key", ylabel="query", title=f"Attention of layer {layer}, head {head}")
    texts = _texts(run, row)
    _ticks(axes, "x", texts)
    _ticks(axes, "y", texts)
    figure.colorbar(image, ax=axes, label="share read")
    return figure


def norms(run: Run, points: Sequence[str] = ("residual_out", "mixer", "moe"), row: int = 0) -> Any:
    """Lengths of vectors by layer, averaged over positions: how large the residual stream is, and how much
    each branch adds; of "state", Frobenius norms of the recurrent states, averaged over heads.

    Args:
        run: that captured "layers.*.POINT" for each of them.
        points: which ones.
        row: of the run.
    """
    figure, axes = _figure(7, 3.5)
    every: list[int] = []
    for colour, point in zip(_LINES, points, strict=False):
        values = _arrays(run, point)
        lengths = []
        for value in values.values():
            array = value.array[row].astype(np.float64)
            over = (-2, -1) if point == "state" else -1
            lengths.append(np.nanmean(np.linalg.norm(array, axis=over)))
        every += list(values)
        axes.plot(list(values), lengths, "o-", color=colour, label=point, markersize=4)
    axes.set(xlabel="layer", ylabel="norm", title="Norms by layer", ylim=(0, None))
    _ticks(axes, "x", range(max(every) + 1))
    axes.legend(frameon=False)
    return figure


def colour_tokens(
    run: Run,
    values: Any,
    *,
    row: int = 0,
    label: str = "",
    first: float | None = None,
    last: float | None = None,
) -> Html:
    """The text with each token's background by a value; the value is shown where the mouse rests.

    Args:
        run: with texts.
        values: a number for each position of the row; NaN leaves a token as it is.
        row: of the run.
        label: what the values are.
        first, last: of the scale; None for the smallest and the largest value.

    Raises:
        InputError: a checkpoint without tokenizer, or another number of values.
    """
    if run.texts is None:
        raise InputError("the run has no texts: its checkpoint has no tokenizer.json.")
    texts, numbers = run.texts[row], np.asarray(values, np.float64)
    if numbers.shape != (len(texts),):
        raise InputError(
            f"values have shape {list(numbers.shape)}; expected {len(texts)}, one for each token."
        )
    low = np.nanmin(numbers) if first is None else first
    high = np.nanmax(numbers) if last is None else last
    spans = []
    for text, number in zip(texts, numbers, strict=True):
        shown = html.escape(text).replace("\n", "&#8629;<br>")
        if np.isnan(number):
            spans.append(f"<span>{shown}</span>")
            continue
        back, ink = _colours((number - low) / ((high - low) or 1))
        style = f"background:{back};color:{ink};padding:1px 0"
        spans.append(f'<span style="{style}" title="{html.escape(label)} {number:.4g}">{shown}</span>')
    scale = f"{html.escape(label)}: {_swatch(0)} {low:.3g} to {_swatch(1)} {high:.3g}"
    body = "".join(spans)
    return Html(
        f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.7">{body}</div>'
        f'<div style="font-size:smaller">{scale}</div>'
    )


def colour_by_logprob(run: Run, row: int = 0) -> Html:
    """The text with each token's background by its log-probability after those before it."""
    tokens = run.tokens[row]
    logits = run.logits.array[row, : len(tokens) - 1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    every = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    values = np.concatenate([[np.nan], every[np.arange(len(tokens) - 1), tokens[1:]]])
    return colour_tokens(run, values, row=row, label="log-probability", last=0.0)


def colour_by_expert(run: Run, layer: int, expert: int, row: int = 0) -> Html:
    """The text with each token's background by the weight that one expert of one layer has for it.

    Args:
        run: that captured "layers.N.router".
        layer, expert: which one.
        row: of the run.
    """
    router = run[f"layers.{layer}.router"]
    length = len(run.tokens[row])
    chosen = router.ids.array[row, :length] == expert
    weights = np.where(chosen, router.weights.array[row, :length], 0).sum(axis=-1)
    label = f"weight of expert {expert} in layer {layer}"
    return colour_tokens(run, weights, row=row, label=label, first=0.0)


def _routers(run: Run) -> dict[int, RouterCapture]:
    found = {
        int(name.split(".")[1]): value
        for name, value in run.captured.items()
        if isinstance(value, RouterCapture)
    }
    if not found:
        raise InputError('the picture needs the routers: run with capture="layers.*.router".')
    return found


def _arrays(run: Run, point: str) -> dict[int, LabelledArray]:
    matching = run.matching(f"layers.*.{point}").items()
    found = {int(n.split(".")[1]): v for n, v in matching if isinstance(v, LabelledArray)}
    if not found:
        raise InputError(f'the picture needs {point}: run with capture="layers.*.{point}".')
    return found


def _texts(run: Run, row: int) -> list[str]:
    if run.texts is None:
        return [str(token) for token in run.tokens[row]]
    return [text.replace("\n", "\\n") for text in run.texts[row]]


def _by_layer_and_position(
    values: np.ndarray, layers: list[int], texts: list[str], title: str, unit: str
) -> Any:
    figure, axes = _figure(0.22 * len(texts) + 3, 0.3 * len(layers) + 1.8)
    image = axes.imshow(values, aspect="auto", cmap=_MAP)
    axes.set(xlabel="token", ylabel="layer", title=title)
    _ticks(axes, "x", texts)
    _ticks(axes, "y", layers)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def _ticks(axes: Any, axis: str, labels: Sequence[Any]) -> None:
    """A label for each entry, or for some where there are too many."""
    step = -(-len(labels) // _LABELS)
    places = range(0, len(labels), step)
    names = [str(labels[place]) for place in places]
    if axis == "x":
        tilted = any(len(name) > 3 for name in names)
        axes.set_xticks(places, names, fontsize=8, rotation=90 if tilted else 0)
    else:
        axes.set_yticks(places, names, fontsize=8)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, outside of pyplot, so that a notebook shows it once and nothing piles up."""
    figure_of = _shown(extra_module("matplotlib.figure", "notebooks").Figure)
    figure = figure_of(figsize=(min(width, 16), min(height, 12)), layout="constrained")
    return figure, figure.add_subplot()


def _shown(kind: Any) -> Any:
    """matplotlib's Figure with a picture for notebooks."""

    class Shown(kind):
        def _repr_png_(self) -> bytes:
            import io

            from matplotlib.backends.backend_agg import FigureCanvasAgg

            FigureCanvasAgg(self)
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=110)
            return out.getvalue()

    Shown.__name__ = Shown.__qualname__ = "Figure"
    return Shown


def _colours(share: float) -> tuple[str, str]:
    """(background, ink) of cividis for 0 to 1, from five of its points."""
    points = ((0, 34, 78), (64, 77, 107), (124, 123, 120), (187, 175, 113), (254, 232, 56))
    place = min(max(share, 0.0), 1.0) * (len(points) - 1)
    first = min(int(place), len(points) - 2)
    mix = [a + (b - a) * (place - first) for a, b in zip(points[first], points[first + 1], strict=True)]
    red, green, blue = (round(x) for x in mix)
    return f"#{red:02x}{green:02x}{blue:02x}", "white" if share < 0.55 else "black"


def _swatch(share: float) -> str:
    return f'<span style="background:{_colours(share)[0]}">&nbsp;&nbsp;</span>'

"""A forward pass over whole texts, with the values of the points that were asked for."""

import dataclasses
import difflib
import fnmatch
import html
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.observe import Observer, attention_elements
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments.arrays import LabelledArray, RouterCapture
from qwen_moe_jax.experiments.edits import as_edit
from qwen_moe_jax.model.points import points_of
from qwen_moe_jax.model.taps import Edit, Routing

# Attention weights of all layers that are captured, elements at most: 1 GiB.
MOST_ATTENTION = 1 << 28
# Compiled programs that are kept for the next run.
_KEPT = 16


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """What `QwenMoe.run` gives; `run["layers.0.router"]` is what was captured there.

    Attributes:
        tokens: of each row, prompt and what was generated behind it.
        texts: of each token, where there is a tokenizer.
        prompt_tokens: of each row, how many of them are the prompt's.
        logits: float32 (batch, position, vocab).
        captured: point -> values, in the order of a token's way.
    """

    tokens: list[list[int]]
    texts: list[list[str]] | None
    prompt_tokens: list[int]
    logits: LabelledArray
    captured: dict[str, LabelledArray | RouterCapture]

    def __getitem__(self, point: str) -> Any:
        """What was captured at a point.

        Raises:
            InputError: nothing was.
        """
        if point not in self.captured:
            raise InputError(f"{point!r} was not captured; {_nearest(point, self.captured)}")
        return self.captured[point]

    def __contains__(self, point: str) -> bool:
        """Whether something was captured there."""
        return point in self.captured

    def matching(self, pattern: str) -> dict[str, Any]:
        """Captured points whose names fit a pattern, such as "layers.*.router"."""
        return {name: value for name, value in self.captured.items() if fnmatch.fnmatchcase(name, pattern)}

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _lines(self) -> list[str]:
        lengths = ", ".join(map(str, map(len, self.tokens)))
        lines = [f"Run of {len(self.tokens)} row(s) of {lengths} tokens, {len(self.captured)} points"]
        for name, value in list(self.captured.items())[:20]:
            shown = value.ids if isinstance(value, RouterCapture) else value
            sizes = ", ".join(f"{a} {n}" for a, n in zip(shown.axes, shown.shape, strict=True))
            lines.append(f"  {name:<28}({sizes})")
        if len(self.captured) > 20:
            lines.append(f"  ... {len(self.captured) - 20} more")
        return lines


class CompiledPasses:
    """The compiled passes of one model, with and without edits; those of late are kept."""

    def __init__(self, forward: Forward):
        self._forward = forward
        self.points = points_of(forward.decoder.config)
        self._forwards: OrderedDict[tuple[Any, ...], Forward] = OrderedDict()
        self._observers: OrderedDict[tuple[Any, ...], Observer] = OrderedDict()

    def chosen(self, patterns: str | Iterable[str]) -> frozenset[str]:
        """The points that patterns name.

        Raises:
            InputError: a pattern that fits none.
        """
        found: set[str] = set()
        if not isinstance(patterns, Iterable):
            raise InputError(f"capture is {patterns!r}; expected names of points, as model.points().")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise InputError(f"capture names {pattern!r}; expected names of points, as model.points().")
            fits = fnmatch.filter(self.points, pattern)
            if not fits:
                raise InputError(f"{pattern!r} fits no point; {_nearest(pattern, self.points)}")
            found.update(fits)
        return frozenset(found)

    def edits(self, asked: Mapping[str, Any] | None) -> dict[str, Edit]:
        """Point -> edit, of patterns; a later one wins.

        Raises:
            InputError: a pattern that fits no point that can be edited, or no function.
        """
        found: dict[str, Edit] = {}
        for pattern, function in (asked or {}).items():
            names = [n for n in self.points if n in self.chosen(pattern)]
            fixed = [name for name in names if not self.points[name].editable]
            if fixed:
                raise InputError(f"{fixed[0]} can be captured, but not edited.")
            found.update((name, as_edit(pattern, function)) for name in names)
        return found

    def key_of(self, asked: Mapping[str, Any] | None) -> tuple[Any, ...]:
        """What tells one set of edits from another: equal functions for equal points.

        Raises:
            InputError: no mapping.
        """
        if asked is not None and not isinstance(asked, Mapping):
            raise InputError(f"edit is a {type(asked).__name__}; expected a dict, point -> function.")
        return tuple((asked or {}).items())

    def forward(self, asked: Mapping[str, Any] | None) -> Forward:
        """The model with edits.

        Raises:
            InputError: as of `edits` and `Forward.edited`.
        """
        if asked is None or asked == {}:
            return self._forward
        key = self.key_of(asked)
        if key not in self._forwards:
            self._forwards[key] = self._forward.edited(self.edits(asked))
        return _latest(self._forwards, key)

    def observer(self, wanted: frozenset[str], asked: Mapping[str, Any] | None) -> Observer:
        """The compiled pass for these points and edits."""
        key = (wanted, self.key_of(asked))
        if key not in self._observers:
            self._observers[key] = Observer(self.forward(asked), wanted)
        return _latest(self._observers, key)

    def run(
        self,
        rows: Sequence[np.ndarray],
        prompt_tokens: Sequence[int],
        wanted: frozenset[str],
        edit: Mapping[str, Any] | None,
        states_at: Sequence[int],
        texts: list[list[str]] | None,
    ) -> Run:
        """Runs rows and labels what was captured; see `QwenMoe.run`.

        Raises:
            InputError: attention weights beyond MOST_ATTENTION, or a position outside of a row.
        """
        longest = max(map(len, rows))
        self._check_attention(wanted, len(rows), longest)
        at = np.asarray([_positions(states_at, len(row)) for row in rows], np.int32)
        logits, found = self.observer(wanted, edit)(rows, at.reshape(len(rows), -1))
        lengths = [len(row) for row in rows]
        labels = _labels(texts, longest)
        order = [name for name in self.points if name in wanted]
        captured: dict[str, LabelledArray | RouterCapture] = {}
        for name in order:
            axes, value = self.points[name].axes, found[name]
            own = {axis: labels[axis] for axis in axes if axis in labels}
            if "at" in axes and len(rows) == 1:
                own["at"] = at[0].tolist()
            if isinstance(value, Routing):
                ids, weights = (
                    LabelledArray(f"{name}.{part}", _blanked(getattr(value, part), axes, lengths), axes, own)
                    for part in ("ids", "weights")
                )
                captured[name] = RouterCapture(ids, weights)
            else:
                captured[name] = LabelledArray(name, _blanked(value, axes, lengths), axes, own)
        axes = ("batch", "position", "vocab")
        own = {axis: labels[axis] for axis in axes if axis in labels}
        return Run(
            tokens=[row.tolist() for row in rows],
            texts=texts,
            prompt_tokens=list(prompt_tokens),
            logits=LabelledArray("logits", _blanked(logits, axes, lengths), axes, own),
            captured=captured,
        )

    def _check_attention(self, wanted: frozenset[str], rows: int, longest: int) -> None:
        layers = sum("key" in self.points[name].axes for name in wanted)
        heads = self._forward.decoder.config.num_attention_heads
        count = layers * attention_elements(rows, heads, longest)
        if count > MOST_ATTENTION:
            raise InputError(
                f"the attention weights of {layers} layers, {rows} rows and {longest} tokens are {count:,} "
                f"numbers; at most {MOST_ATTENTION:,} are captured at once: name fewer layers, or give a "
                "shorter prompt."
            )


def _latest(kept: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...]) -> Any:
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
    return kept[key]


def _positions(asked: Sequence[int], length: int) -> list[int]:
    """Places in a row; negative ones count from its end."""
    found = []
    for place in asked:
        if isinstance(place, bool) or not isinstance(place, int) or not -length <= place < length:
            raise InputError(f"states_at names {place!r}; expected positions of a row of {length} tokens.")
        found.append(place % length)
    return found


def _labels(texts: list[list[str]] | None, longest: int) -> dict[str, list[str]]:
    """Labels of positions and keys: number and token, of a single row."""
    if texts is None or len(texts) != 1:
        return {}
    names = [f"{place} {text!r}" for place, text in enumerate(texts[0])]
    return {"position": names, "key": names}


def _blanked(value: np.ndarray, axes: tuple[str, ...], lengths: list[int]) -> np.ndarray:
    """NaN, or -1, behind the end of each row."""
    if min(lengths) == max(lengths):
        return value
    value = np.array(value)
    blank = -1 if np.issubdtype(value.dtype, np.integer) else np.nan
    for axis in ("position", "key"):
        if axis in axes:
            moved = np.moveaxis(value, (axes.index("batch"), axes.index(axis)), (0, 1))
            for row, length in enumerate(lengths):
                moved[row, length:] = blank
    return value


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"

"""Named points of a forward pass, where values can be captured or replaced.

A point is a call `taps(name, value)` that gives the value back. With `NO_TAPS` that is all it does, so that
the traced program is the one without points. `model/points.py` lists the names and their axes.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")

# Arrays of the point, and what is known of its tokens, to arrays of the same shapes.
Edit = Callable[[Any, "Tokens"], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What an edit may know of the tokens at hand.

    Attributes:
        ids: int32 [batch, seq].
        positions: int32 [batch, seq], each token's place in its row.
        valid: bool [batch, seq]; the rest are pads.
    """

    ids: jax.Array
    positions: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: the value of the point `router`.

    Attributes:
        ids: int32 [..., top_k].
        weights: float32 [..., top_k].
    """

    ids: jax.Array
    weights: jax.Array


class Taps:
    """Points of one traced forward pass.

    Attributes:
        found: point -> captured value.
        at: int32 [batch, n], places among the pass's tokens behind which recurrent states are captured; None
            for none.
    """

    def __init__(
        self,
        wanted: frozenset[str] = frozenset(),
        edits: Mapping[str, Edit] | None = None,
        tokens: Tokens | None = None,
        at: jax.Array | None = None,
    ):
        """Begins a pass.

        Args:
            wanted: points to capture.
            edits: point -> what replaces its value.
            tokens: of the pass.
            at: see above.
        """
        self.wanted = wanted
        self.edits = dict(edits or {})
        self.found: dict[str, Any] = {}
        self.at = at
        self._tokens = tokens
        self._prefix = ""
        self._rows: tuple[int, ...] = ()

    def within(self, prefix: str) -> "Taps":
        """The points whose names begin so, by the rest of their names."""
        if not self.wanted and not self.edits:
            return self
        inner = copy.copy(self)
        inner._prefix = f"{self._prefix}{prefix}."
        return inner

    def of_rows(self, batch: int, seq: int) -> "Taps":
        """The same points where values have one dimension for all tokens, [batch * seq, ...]: they are
        captured and replaced as [batch, seq, ...]."""
        if not self.wanted and not self.edits:
            return self
        inner = copy.copy(self)
        inner._rows = batch, seq
        return inner

    def uses(self, name: str) -> bool:
        """Whether a point is captured or replaced."""
        return self.captures(name) or self.replaces(name)

    def replaces(self, name: str) -> bool:
        """Whether a point is replaced."""
        return self._prefix + name in self.edits

    def captures(self, name: str) -> bool:
        """Whether a point is captured."""
        return self._prefix + name in self.wanted

    def __call__(self, name: str, value: T) -> T:
        """A point: its value, replaced where that is asked for."""
        if not self.uses(name):
            return value
        full = self._prefix + name
        shaped, edit = self._in_rows(value), self.edits.get(full)
        if edit is not None:
            assert self._tokens is not None
            shaped = _same_kind(full, shaped, edit(shaped, self._tokens))
            value = jax.tree.map(lambda x, y: y.reshape(x.shape), value, shaped)
        if self.captures(name):
            self.found[full] = shaped
        return value

    def keep(self, name: str, value: Any) -> None:
        """Captures a value that cannot be replaced."""
        if self.captures(name):
            self.found[self._prefix + name] = self._in_rows(value)

    def _in_rows(self, value: T) -> T:
        if not self._rows:
            return value
        return jax.tree.map(lambda x: x.reshape(*self._rows, *x.shape[1:]), value)


def _same_kind(point: str, before: Any, after: Any) -> Any:
    """What an edit gave, in the dtypes of what it was given.

    Raises:
        ValueError: another structure or shape.
    """
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(f"the edit of {point} gave {new}; expected what it was given, {old}.")

    def leaf(x: jax.Array, y: Any) -> jax.Array:
        shape = getattr(y, "shape", ())
        if shape != x.shape:
            raise ValueError(f"the edit of {point} gave shape {list(shape)}; expected {list(x.shape)}.")
        return jax.numpy.asarray(y).astype(x.dtype)

    return jax.tree.map(leaf, before, after)


NO_TAPS = Taps()

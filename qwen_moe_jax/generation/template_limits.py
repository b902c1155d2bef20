"""A sandbox for chat templates that bounds what they may take: a template is somebody else's program.

Products and powers are looked at before they are computed, every round of a loop and every macro looks at
the clock, and the text is counted while it is written.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Characters of a prompt, and of anything that is made on the way to it; the longest context is a tenth of
# that.
MOST_CHARACTERS = 16 << 20
# Of a number's binary digits.
MOST_BITS = 4096
SECONDS = 10.0

_TICK = "__tick"


class TemplateLimitError(Exception):
    """A template takes more than it may; the message says of what."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Templates neither change their inputs, nor reach out, nor go on for long."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._deadline = threading.local()
        self.globals[_TICK] = self._tick
        plain = {name: self.filters[name] for name in ("center", "indent")}

        def center(value: Any, width: int = 80) -> Any:
            _check_size(width)
            return plain["center"](value, width)

        def indent(value: Any, width: Any = 4, *given: Any, **named: Any) -> Any:
            size = width if isinstance(width, int) else len(width)
            _check_size(size * (1 + str(value).count("\n")))
            return plain["indent"](value, width, *given, **named)

        self.filters |= {"center": center, "indent": indent}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of a template, unless its result would be too large."""
        if operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(some, (str, bytes, list, tuple)) and isinstance(times, int):
                    _check_size(len(some) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            raise TemplateLimitError("formats text by %, which is not bounded")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *given: Any, **named: Any) -> Any:
        """A call of a template, unless it is a text's own method that would make too much."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, (str, bytes)):
            _check_method(owner, name, given)
        return super().call(context, function, *given, **named)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            call = jinja2.nodes.Call(jinja2.nodes.Name(_TICK, "load"), [], [], None, None)
            tick = jinja2.nodes.ExprStmt(call, lineno=node.lineno)
            for inner in (call, call.node):
                inner.lineno = node.lineno
            node.body.insert(0, tick.set_environment(self))
        return tree

    def _tick(self) -> None:
        deadline = getattr(self._deadline, "at", None)
        if deadline is not None and time.monotonic() > deadline:
            raise TemplateLimitError(f"takes more than {SECONDS:g} seconds")

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """Within, templates have SECONDS."""
        self._deadline.at = time.monotonic() + SECONDS
        try:
            yield
        finally:
            self._deadline.at = None

    def render(self, template: Any, **variables: Any) -> str:
        """The text of a template.

        Raises:
            TemplateLimitError: it takes too long or writes too much.
        """
        pieces, count = [], 0
        with self.bounded():
            for piece in template.generate(**variables):
                count += len(piece)
                _check_size(count)
                self._tick()
                pieces.append(piece)
        return "".join(pieces)


def _check_method(owner: Any, name: str, given: tuple[Any, ...]) -> None:
    """Methods whose result may be much longer than what they are given."""
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs") and given and isinstance(given[0], int):
        _check_size(given[0] * (1 + owner.count("\t") if name == "expandtabs" else 1))
    elif name == "join" and given and isinstance(given[0], (list, tuple)):
        _check_size(len(owner) * len(given[0]))
    elif name == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        _check_size(owner.count(given[0]) * len(given[1]))


def _check_size(count: int) -> None:
    if count > MOST_CHARACTERS:
        raise TemplateLimitError(f"makes {count:,} characters, and at most {MOST_CHARACTERS:,} are taken")


def _check_bits(count: int) -> None:
    if count > MOST_BITS:
        raise TemplateLimitError(f"computes with numbers of more than {MOST_BITS} bits")

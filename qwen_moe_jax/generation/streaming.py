"""Text as it is decided: no half characters, no beginnings of stop strings, no repeated decoding."""

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so after four tokens of one byte or more it is whole or broken.
_LONGEST_CHARACTER_TOKENS = 4


class Decoder(Protocol):
    """Whatever turns token ids into text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids."""
        ...


class TextStream:
    """The text of one row of tokens, given out as soon as no further token can change it.

    Stop strings end the text: what stands before the earliest one is all there is. A tail that could
    still grow into a stop string is held back until it is decided.
    """

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str] = ()):
        self._decoder = decoder
        self._stops = tuple(stop_strings)
        self._ids: list[int] = []
        self._settled = 0  # tokens before this one are whole characters, and their text was taken
        self._context = 0  # decoding starts here, so that the settled part is decoded with its neighbours
        self._taken = ""  # text of all settled tokens
        self._given = 0  # characters of it handed out
        self.stopped = False

    @property
    def text(self) -> str:
        """All text handed out so far."""
        return self._taken[: self._given]

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now decided (often empty). Nothing after a stop."""
        if self.stopped:
            return ""
        self._ids.append(token)
        known = self._decoder.decode(self._ids[self._context : self._settled])
        window = self._decoder.decode(self._ids[self._context :])
        unfinished = window.endswith(_REPLACEMENT) and (
            len(self._ids) - self._settled < _LONGEST_CHARACTER_TOKENS
        )
        if unfinished:
            return ""
        return self._take(window[len(known) :])

    def finish(self) -> str:
        """No more tokens: returns the rest, broken characters as U+FFFD."""
        if self.stopped:
            return ""
        known = self._decoder.decode(self._ids[self._context : self._settled])
        window = self._decoder.decode(self._ids[self._context :])
        piece = self._take(window[len(known) :])
        if not self.stopped:
            piece += self._taken[self._given :]
            self._given = len(self._taken)
        return piece

    def _take(self, new: str) -> str:
        self._context, self._settled = self._settled, len(self._ids)
        before = len(self._taken)
        self._taken += new
        decided = len(self._taken)
        # a stop string may have begun in earlier text, but not before its own length
        starts = [self._taken.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops]
        found = [start for start in starts if start >= 0]
        if found:
            self.stopped = True
            self._taken = self._taken[: min(found)]
            decided = len(self._taken)
        else:
            decided -= max((_overlap(self._taken, stop) for stop in self._stops), default=0)
        piece = self._taken[self._given : decided]
        self._given = max(self._given, decided)
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters could begin the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""Text as it is decided: no half characters, no beginnings of stop strings, no repeated decoding."""

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# A run of broken bytes longer than this many tokens is settled in the middle, to bound what is decoded again.
_LONGEST_OPEN_TOKENS = 8


class Decoder(Protocol):
    """Whatever turns token ids into bytes and these, all together, into text.

    Bytes that are not UTF-8 must become U+FFFD the way Unicode recommends (and Rust and Python do): one
    for each longest beginning of a character, so that an unfinished character is a single U+FFFD.
    """

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids."""
        ...


class TextStream:
    """The text of one row of tokens, given out as soon as no further token can change it.

    Stop strings end the text: it is cut before the first one to be completed, counted in characters, so
    that token boundaries do not matter. A tail that could still grow into a stop string is held back
    until it is decided.
    """

    def __init__(self, decoder: Decoder, stop_strings: Sequence[str] = ()):
        self._decoder = decoder
        self._stops = tuple(stop_strings)
        self._ids: list[int] = []
        self._settled = 0  # no later token changes the text of the tokens before this one
        self._context = 0  # decoding starts here, so that the settled part is decoded with its neighbours
        self._open = 0  # characters taken of the tokens that are not settled
        self._taken = ""  # all text that no token changes
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
        new = self._unsettled_text()
        certain = new.removesuffix(_REPLACEMENT)  # a last U+FFFD may be an unfinished character
        piece = self._take(certain[self._open :])
        self._open = len(certain)
        if certain == new:
            self._settle(len(self._ids), len(new))
        elif len(self._ids) - self._settled > _LONGEST_OPEN_TOKENS:
            last = self._decoder.decode(self._ids[-1:])
            before = self._decoder.decode(self._ids[self._settled : -1])
            # The last token joins no character begun before it, and then no later one does.
            if last and before + last == new:
                self._settle(len(self._ids) - 1, len(before))
        return piece

    def finish(self) -> str:
        """No more tokens: returns the rest, broken characters as U+FFFD."""
        if self.stopped:
            return ""
        new = self._unsettled_text()
        piece = self._take(new[self._open :])
        self._settle(len(self._ids), len(new))
        if not self.stopped:
            piece += self._taken[self._given :]
            self._given = len(self._taken)
        return piece

    def _unsettled_text(self) -> str:
        known = self._decoder.decode(self._ids[self._context : self._settled])
        return self._decoder.decode(self._ids[self._context :])[len(known) :]

    def _settle(self, tokens: int, characters: int) -> None:
        """The first `tokens` are settled, which takes `characters` off the open text."""
        self._context, self._settled = self._settled, tokens
        self._open = max(0, self._open - characters)

    def _take(self, new: str) -> str:
        before = len(self._taken)
        self._taken += new
        decided = len(self._taken)
        ends = []
        for stop in self._stops:
            # it may have begun in earlier text, but not before its own length
            start = self._taken.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self.stopped = True
            self._taken = self._taken[: min(ends)[1]]
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

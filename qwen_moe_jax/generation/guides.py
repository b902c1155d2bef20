"""Which tokens a sequence may choose next: ends of thinking that are forced, words that are banned, and forms
that a reply is given (`forms.py`). The engine asks between two halves of a step (`engine.jobs.Guide`)."""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.generation.replies import CLOSE_THINK, OPEN_THINK
from qwen_moe_jax.generation.tokenizer import Tokenizer

# How a Qwen template ends thinking, and what stands before the content.
_END_OF_THINKING, _BEHIND_THINKING = f"\n{CLOSE_THINK}\n\n", "\n\n"
_FOR_EVER = 1 << 30
# Tokens whose text is looked at for the end of a tag: so many of one character would hold it.
_TAG_TOKENS = 2 * len(CLOSE_THINK)


class RowGuide(abc.ABC):
    """A guide of one sequence, told of every token in order."""

    @property
    def free(self) -> int:
        """Tokens from here on that may be anything; none if the next one may have to be masked."""
        return 0

    @abc.abstractmethod
    def mask(self, words: np.ndarray) -> None:
        """Takes the tokens that may not come next out of a mask, uint32 [words] with all bits set."""

    @abc.abstractmethod
    def accept(self, token: int) -> bool:
        """A token was chosen; returns whether the sequence ends with it."""

    @abc.abstractmethod
    def save(self) -> Any:
        """What `restore` goes back to."""

    @abc.abstractmethod
    def restore(self, saved: Any) -> None:
        """Forgets the tokens since `save`."""

    def allow(self, drafts: Sequence[int], words: np.ndarray) -> None:
        """Writes masks of the tokens that may come next, and of those behind drafts that may.

        Args:
            drafts: tokens that may come to be chosen.
            words: uint32 [tokens, words], at least one more token than drafts; all bits are set.
        """
        saved = self.save()
        try:
            for place, row in enumerate(words):
                self.mask(row)
                if place == len(drafts) or not _holds(row, drafts[place]) or self.accept(drafts[place]):
                    return
        finally:
            self.restore(saved)


class Thinking:
    """Where a reply stands: before its first word, inside of thinking, or behind it.

    Attributes:
        inside, ended: of thinking; neither before the first word.
        tokens: of the thinking so far, its end included.
        behind: text behind the end of thinking, up to the token that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, *, opened: bool):
        """Begins a reply.

        Args:
            tokenizer: of the model.
            opened: the prompt has opened the tag of thinking.
        """
        self._tokenizer = tokenizer
        self._ids: tuple[int, ...] = ()  # the last ones
        self.inside, self.ended = opened, False
        self.tokens = 0
        self.behind = ""

    def accept(self, token: int) -> None:
        """The next token of the reply."""
        if self.ended:
            return
        self._ids = (*self._ids, token)[-_TAG_TOKENS:]
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if self.inside:
            self.tokens += 1
            if CLOSE_THINK in text:
                self.inside, self.ended = False, True
                self.behind = text.rpartition(CLOSE_THINK)[2]
        elif text.lstrip().startswith(OPEN_THINK):
            self.inside, self._ids = True, ()
        elif not OPEN_THINK.startswith(text.lstrip()):
            self.ended = True  # it does not think

    def save(self) -> dict[str, Any]:
        """As of `RowGuide`."""
        return dict(vars(self))

    def restore(self, saved: dict[str, Any]) -> None:
        """As of `RowGuide`."""
        vars(self).update(saved)


class ThinkingBudget(RowGuide):
    """Forces the end of thinking once it has so many tokens."""

    def __init__(self, tokenizer: Tokenizer, budget: int, *, opened: bool):
        """Begins a reply.

        Args:
            tokenizer: of the model.
            budget: tokens of thinking before its end is forced.
            opened: as of `Thinking`.
        """
        self._thinking = Thinking(tokenizer, opened=opened)
        self._budget = budget
        self._end = tokenizer.encode(_END_OF_THINKING)
        self._forced = 0  # tokens of the end that were chosen

    @property
    def free(self) -> int:
        """Tokens that are left of the budget."""
        if 0 < self._forced < len(self._end):
            return 0
        return _FOR_EVER if self._thinking.ended else max(0, self._budget - self._thinking.tokens)

    @property
    def _is_due(self) -> bool:
        thinking = self._thinking
        begun = 0 < self._forced < len(self._end)
        return begun or (thinking.inside and thinking.tokens >= self._budget)

    def mask(self, words: np.ndarray) -> None:
        """The end of thinking only, token by token, once it is due."""
        if self._is_due:
            _only(words, self._end[self._forced])

    def accept(self, token: int) -> bool:
        """Counts; a budget never ends a reply."""
        if self._is_due:
            self._forced += 1
        self._thinking.accept(token)
        return False

    def save(self) -> Any:
        """See `RowGuide`."""
        return self._forced, self._thinking.save()

    def restore(self, saved: Any) -> None:
        """See `RowGuide`."""
        self._forced = saved[0]
        self._thinking.restore(saved[1])


class BannedWords(RowGuide):
    """Keeps some texts from being written, however they are divided into tokens."""

    def __init__(self, tokenizer: Tokenizer, banned: Sequence[str]):
        """Begins a reply.

        Args:
            tokenizer: of the model.
            banned: the texts, not empty.
        """
        self._bytes = tokenizer.token_bytes
        self._tail = b""
        words = [text.encode() for text in banned]
        self._longest = max(map(len, words)) - 1
        # beginnings of words that stand already -> tokens that complete them
        completing: dict[bytes, list[int]] = {b"": []}
        for word in words:
            completing[b""] += [i for i, text in enumerate(self._bytes) if word in text]
            for done in range(1, len(word)):
                completing.setdefault(word[:done], []).extend(tokenizer.tokens_beginning(word[done:]))
        self._completing = {begun: np.asarray(tokens, np.uint32) for begun, tokens in completing.items()}

    def mask(self, words: np.ndarray) -> None:
        """All but the tokens that complete a word."""
        for begun, tokens in self._completing.items():
            if self._tail.endswith(begun):
                np.bitwise_and.at(words, tokens // 32, ~(np.uint32(1) << tokens % 32))

    def accept(self, token: int) -> bool:
        """Remembers the text's end."""
        text = self._bytes[token] if token < len(self._bytes) else b""
        self._tail = (self._tail + text)[-self._longest :] if self._longest else b""
        return False

    def save(self) -> bytes:
        """See `RowGuide`."""
        return self._tail

    def restore(self, saved: bytes) -> None:
        """See `RowGuide`."""
        self._tail = saved


class AfterThinking(RowGuide):
    """Another guide, from the end of thinking on. The line break that a template writes there is forced."""

    def __init__(self, guide: RowGuide, tokenizer: Tokenizer):
        """Begins a reply whose prompt has opened the tag of thinking."""
        self._guide = guide
        self._thinking = Thinking(tokenizer, opened=True)
        self._break = tokenizer.encode(_BEHIND_THINKING)
        self._forced = 0  # tokens of the line break that stand

    def mask(self, words: np.ndarray) -> None:
        """Anything inside of thinking; what the guide says behind it."""
        if self._thinking.ended and self._forced < len(self._break):
            _only(words, self._break[self._forced])
        elif self._thinking.ended:
            self._guide.mask(words)

    def accept(self, token: int) -> bool:
        """Tells the guide of what is behind the line break."""
        if not self._thinking.ended:
            self._thinking.accept(token)
            if self._thinking.ended and self._thinking.behind:
                self._forced = len(self._break)  # something came with the tag
            return False
        if self._forced < len(self._break):
            self._forced += 1
            return False
        return self._guide.accept(token)

    def save(self) -> Any:
        """See `RowGuide`."""
        return self._forced, self._thinking.save(), self._guide.save()

    def restore(self, saved: Any) -> None:
        """See `RowGuide`."""
        self._forced = saved[0]
        self._thinking.restore(saved[1])
        self._guide.restore(saved[2])


class AllOf(RowGuide):
    """What every one of several guides allows."""

    def __init__(self, guides: Sequence[RowGuide]):
        """Of guides in their order: where they leave nothing, a later one decides."""
        self._guides = list(guides)

    @property
    def free(self) -> int:
        """The fewest of all."""
        return min(guide.free for guide in self._guides)

    def mask(self, words: np.ndarray) -> None:
        """Asks them all."""
        for guide in self._guides:
            own = np.full_like(words, 0xFFFFFFFF)
            guide.mask(own)
            words[:] = words & own if (words & own).any() else own

    def accept(self, token: int) -> bool:
        """Tells them all."""
        return any([guide.accept(token) for guide in self._guides])

    def save(self) -> list[Any]:
        """See `RowGuide`."""
        return [guide.save() for guide in self._guides]

    def restore(self, saved: list[Any]) -> None:
        """See `RowGuide`."""
        for guide, one in zip(self._guides, saved, strict=True):
            guide.restore(one)


def _bit(token: int) -> np.uint32:
    return np.uint32(1 << token % 32)


def _only(words: np.ndarray, token: int) -> None:
    words[:] = 0
    words[token // 32] = _bit(token)


def _holds(words: np.ndarray, token: int) -> bool:
    return bool(words[token // 32] & _bit(token))

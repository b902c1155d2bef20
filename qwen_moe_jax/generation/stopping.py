"""One sequence while it is generated: its tokens, its text, and why it ends."""

from collections.abc import Collection, Sequence

from qwen_moe_jax.generation.guides import RowGuide
from qwen_moe_jax.generation.streaming import TextStream
from qwen_moe_jax.generation.tokenizer import Tokenizer


class Row:
    """Collects what one row emits until an end-of-text token, a stop string, the end of its form or the
    length limit.

    The end-of-text token, and the token that completes a stop string, are kept in `tokens`; neither the
    special token nor the stop string shows in `text`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
        stop_strings: Sequence[str],
        max_new_tokens: int,
        guide: RowGuide | None = None,
    ):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.likeliest: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop_strings)
        self._eos_ids = frozenset(eos_ids)
        self._limit = max_new_tokens
        self._guide = guide

    @property
    def text(self) -> str | None:
        """The text decided so far; None without a tokenizer."""
        return None if self._stream is None else self._stream.text

    def stop(self, reason: str) -> None:
        """Ends a row from outside; nothing happens where it has ended already."""
        if self.finish_reason is None:
            self.finish_reason = reason
            if self._stream is not None:
                self._stream.finish()

    def push(self, token: int, logprob: float, likeliest: dict[int, float] | None = None) -> str:
        """Adds a token of a row that has not finished; returns the text it decides."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if likeliest is not None:
            self.likeliest.append(likeliest)
        complete = self._guide is not None and self._guide.accept(token)
        piece = "" if self._stream is None else self._stream.push(token)
        if complete or token in self._eos_ids or (self._stream is not None and self._stream.stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._stream is not None:
            piece += self._stream.finish()
            if self._stream.stopped:  # a stop string that only the last characters completed
                self.finish_reason = "stop"
        return piece

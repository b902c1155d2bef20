"""A prompt as the engine gets it, and who has a say in how it goes on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_moe_jax.engine.sampling import RowSampling

# Token -> log-probability, best first.
Likeliest = dict[int, float]
# (number among the job's sequences, token, its log-probability, the likeliest ones in its place) -> the
# sequence has ended.
Take = Callable[[int, int, float, Likeliest | None], bool]


class Guide(Protocol):
    """Says which tokens one sequence may choose next. It is told what was chosen by whoever takes the tokens.

    Attributes:
        free: tokens from here on that may be anything; then the engine need not ask.
    """

    @property
    def free(self) -> int:
        """See the class."""
        ...

    def allow(self, drafts: Sequence[int], words: np.ndarray) -> None:
        """Says which tokens may follow what was chosen, and which may follow each of some drafts.

        Args:
            drafts: tokens that may come to be chosen; whatever they are, they need not be allowed.
            words: uint32 [tokens, words], at least one more token than drafts; masks as of
                `sampling.unpack_mask`, to be written; all bits are set.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A prompt and how it is to be continued.

    Attributes:
        prompt: int32 [tokens], at least one.
        max_new_tokens: of each sequence.
        sampling: of each sequence.
        end_ids: tokens that end a sequence.
        draft_tokens: that a step verifies at most.
        one_by_one: tokens are looked at one by one: for stop strings, or because somebody reads along.
        take: called with each token in order, in the thread that runs the core.
        guides: of each sequence; empty for none.
        likeliest: how many of the likeliest tokens are wanted in each place.
        drafted: called with the drafts that were verified, and how many of them hold.
        failed: called with the core and the error if a guide fails; the sequence ends then.
    """

    prompt: np.ndarray
    max_new_tokens: int
    sampling: tuple[RowSampling, ...]
    end_ids: tuple[int, ...]
    draft_tokens: int
    one_by_one: bool
    take: Take
    guides: tuple[Guide | None, ...] = ()
    likeliest: int = 0
    drafted: Callable[[int, int], None] = lambda drafted, accepted: None
    failed: Callable[[Any, BaseException], None] = lambda core, error: None

    @property
    def is_guided(self) -> bool:
        """Steps are to be looked at one by one, since the host may have to say what is chosen."""
        return bool(self.likeliest) or any(guide is not None for guide in self.guides)

    def needs_guide(self, index: int, tokens: int) -> bool:
        """Whether the host has a say in some of a sequence's next tokens.

        Args:
            index: of the sequence.
            tokens: chosen from here on at most, with those that are not looked at yet.
        """
        guide = self.guides[index] if self.guides else None
        return bool(self.likeliest) or (guide is not None and guide.free < tokens)

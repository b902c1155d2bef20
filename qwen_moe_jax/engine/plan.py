"""What the scheduler says: rows, and the steps that are planned for them."""

import dataclasses
from typing import Any

import numpy as np

from qwen_moe_jax.engine.prefix_tree import Node

WAITING, PREFILL, DECODE, FINISHED = "waiting", "prefill", "decode", "finished"

# Snapshots that a row which decodes keeps, of the last page borders it has passed: a row may turn out to have
# ended before the last one, and then the one before is wanted.
BORDERS = 2


@dataclasses.dataclass(eq=False)
class Group:
    """The sequences of one prompt: one computes it, and the others find what it has left.

    Attributes:
        leader: the one that computes it.
        ready: all of the prompt is planned.
        waiting: sequences that have not begun.
        left: (data rank, node) that others have left behind for them.
    """

    leader: "Sequence"
    ready: bool
    waiting: int
    left: list[tuple[int, Node]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Sequence:
    """One row's text, from its prompt to its end.

    Attributes:
        number: in the order of arrival.
        prompt: int32 [tokens].
        max_new_tokens: at most.
        draft_tokens: that it drafts at most for a step.
        group: of its prompt's sequences, None if it is alone.
        emitted: new tokens that are known.
        state: WAITING, PREFILL, DECODE or FINISHED.
        epoch: how often it has given its pages back.
        cached: tokens of the prompt that it found in the prefix cache when it first began.
        rank, slot, pages: that it holds.
        node: of the prefix tree, what it has pinned.
        text: prompt and what was known when it began, all of which but the last token is prefilled.
        planned: tokens in the caches, at most, once every planned step has run.
        in_flight: (fewest, most) new tokens of each decode step that is planned and not looked at yet, if the
            row does not end before.
        borders: lengths at which prefill keeps a snapshot, ascending.
        places: for snapshots of the page borders that decoding passes, in turns; None where there is none.
        places_from: the first border that each of them is for.
        begun: its first decode step is planned.
    """

    number: int
    prompt: np.ndarray
    max_new_tokens: int
    draft_tokens: int = 0
    group: Group | None = None
    emitted: list[int] = dataclasses.field(default_factory=list)
    state: str = WAITING
    epoch: int = 0
    cached: int = 0
    rank: int = -1
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    node: Node | None = None
    text: Any = None
    planned: int = 0
    in_flight: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    borders: list[int] = dataclasses.field(default_factory=list)
    places: list[int | None] = dataclasses.field(default_factory=lambda: [None] * BORDERS)
    places_from: list[int] = dataclasses.field(default_factory=lambda: [0] * BORDERS)
    begun: bool = False
    was_admitted: bool = False

    @property
    def confirmed(self) -> int:
        """Tokens that are in the caches for certain, once the steps planned so far have run: the last one
        that it emitted is not among them."""
        if self.state == PREFILL:
            return self.planned
        return len(self.prompt) + len(self.emitted) - 1

    @property
    def fewest_emitted(self) -> int:
        """New tokens once every planned step has run, at least, if it does not end before."""
        return len(self.emitted) + sum(fewest for fewest, _ in self.in_flight)

    @property
    def most_emitted(self) -> int:
        """The same, at most."""
        return min(self.max_new_tokens, len(self.emitted) + sum(most for _, most in self.in_flight))

    def known(self, tokens: int) -> np.ndarray:
        """The first tokens of prompt and emitted text, int32."""
        return np.concatenate([self.prompt, np.asarray(self.emitted, np.int32)])[:tokens]


@dataclasses.dataclass(frozen=True)
class StateMove:
    """A recurrent state between a slot and a snapshot of a data rank; None is the state of nothing seen."""

    rank: int
    slot: int
    snapshot: int | None


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """A row's part of a prefill step.

    Attributes:
        sequence: it is of.
        rank, row: its place among the rows of the step.
        slot: of its data rank.
        start: tokens in the caches before.
        tokens: int32, those to read now.
        following: int32, the token behind each of them.
    """

    sequence: Sequence
    rank: int
    row: int
    slot: int
    start: int
    tokens: np.ndarray
    following: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """A row's part of a decode step.

    Attributes:
        sequence: it is of.
        rank, row: its place among the rows of the step.
        slot: of its data rank.
        epoch: of the sequence; what is emitted for another one is not to be taken.
        token: to feed, at its first step since it began; None where the device goes on with what it chose.
        length, emitted: at its first step, tokens in the caches and new tokens before it.
        places: where it keeps its states when it passes page borders, in turns; None for nowhere.
    """

    sequence: Sequence
    rank: int
    row: int
    slot: int
    epoch: int
    token: int | None
    length: int
    emitted: int
    places: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class PrefillStep:
    """A chunk of prompts.

    Attributes:
        shape: (rows of each data rank, tokens a row).
        rows: that have tokens in it.
        restores: states to put in place before it.
        saves: states to keep behind it.
    """

    shape: tuple[int, int]
    rows: tuple[PrefillRow, ...]
    restores: tuple[StateMove, ...]
    saves: tuple[StateMove, ...]


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Some tokens of each of some rows. The device itself keeps the states of a row that comes to the border
    of a page: the host does not know of it yet.

    Attributes:
        width: rows of the data rank that has most of them.
        rows: that there are.
        steps: forward passes, at most.
        restores: as of `PrefillStep`.
    """

    width: int
    rows: tuple[DecodeRow, ...]
    steps: int
    restores: tuple[StateMove, ...]

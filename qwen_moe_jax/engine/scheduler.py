"""What runs next: which rows get slots and pages, which prompts are read, and who decodes.

Plain Python: no arrays of the device, no clock, no threads. What it decides depends on the requests and on
the tokens alone, in their order, so that several processes that are told the same decide the same.

A step that is planned is taken as run: the device runs steps strictly in the order of their plans, so
whatever is planned later may read what an earlier one writes, and may write over what an earlier one reads.
That a row has ended is known only when the results of its step are looked at, a step or two later.

All but the last token of a prompt is prefilled; the last one is fed by the row's first decode step. A row
that was preempted is computed again from its prompt and all it has emitted, in the same way.
"""

from itertools import takewhile

import numpy as np

from qwen_moe_jax.engine.plan import (
    DECODE,
    FINISHED,
    PREFILL,
    WAITING,
    DecodeRow,
    DecodeStep,
    Group,
    PrefillRow,
    PrefillStep,
    Sequence,
    StateMove,
)
from qwen_moe_jax.engine.prefix_tree import Match
from qwen_moe_jax.engine.rank_pools import RankPools
from qwen_moe_jax.engine.shapes import PrefillShapes
from qwen_moe_jax.errors import InputError


class Scheduler:
    """See the module.

    Attributes:
        tables: int32 [ranks * slots, width], the pages of each slot's row; the number of pages for none.
        tables_version: changes with them.
        preemptions: how often a row gave its pages back.
    """

    def __init__(
        self,
        *,
        ranks: int,
        slots: int,
        pages: int,
        page_length: int,
        snapshots: int,
        shapes: PrefillShapes,
        context: int,
        prefix_cache: bool = True,
    ):
        """Begins with nothing.

        Args:
            ranks: data ranks; slots, pages and snapshots are those of each.
            slots: rows at most.
            pages: of keys and values.
            page_length: tokens a page.
            snapshots: of recurrent states.
            shapes: that prefill steps may have.
            context: tokens of the longest row.
            prefix_cache: keep what rows leave behind. Without it, only the sequences of one prompt share.
        """
        self.tables = np.full((ranks * slots, -(-context // page_length)), pages, np.int32)
        self.tables_version = 0
        self.preemptions = 0
        self._ranks = [RankPools(slots, pages, page_length, snapshots, prefix_cache) for _ in range(ranks)]
        self._slots, self._pages, self._page_length = slots, pages, page_length
        self._shapes = shapes
        self._prefix_cache = prefix_cache
        self._numbers = 0
        self._waiting: list[Sequence] = []  # by number
        self._running: list[Sequence] = []  # by number
        self._restores: list[StateMove] = []
        self._prefilled_last = False

    # How it stands.

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return sum(rank.pool.free for rank in self._ranks)

    @property
    def cached_pages(self) -> int:
        """Pages that only the prefix tree holds."""
        return sum(rank.tree.evictable for rank in self._ranks)

    @property
    def cached_snapshots(self) -> int:
        """Snapshots that the prefix tree holds."""
        return sum(rank.tree.cached_snapshots for rank in self._ranks)

    # What it is told.

    def submit(
        self, prompt: np.ndarray, max_new_tokens: int, sequences: int = 1, draft_tokens: int = 0
    ) -> list[Sequence]:
        """Queues the sequences of a prompt.

        Args:
            prompt: int32 [tokens], at least one.
            max_new_tokens: of each, at least one.
            sequences: how many.
            draft_tokens: that a step of theirs verifies at most.

        Raises:
            InputError: one of them could never have the pages it needs.
        """
        self.check_fits(len(prompt), max_new_tokens)
        made = []
        for _ in range(sequences):
            made.append(Sequence(self._numbers, np.asarray(prompt, np.int32), max_new_tokens, draft_tokens))
            self._numbers += 1
        if sequences > 1:
            group = Group(made[0], ready=False, waiting=sequences)
            for sequence in made:
                sequence.group = group
        self._waiting += made
        return made

    def check_fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raises InputError if a row can never have the pages it needs; may be called in any thread."""
        needed = self._pages_for(prompt_tokens + new_tokens - 1)  # the last token is never written
        if needed > self._pages:
            raise InputError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need {needed} pages of "
                f"{self._page_length} tokens, and the engine has {self._pages}; give the engine more memory, "
                "or fewer tokens."
            )

    def emit(self, sequence: Sequence, tokens: list[int], epoch: int) -> None:
        """Tokens that a row's oldest decode step has chosen; of a row that has ended or given its pages back
        since, they are dropped."""
        if sequence.epoch == epoch and sequence.state == DECODE:
            sequence.emitted += tokens
            sequence.in_flight.pop(0)
            sequence.planned = self._most_planned(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A row has ended, or is to end: gives back what it holds, and leaves the rest to the prefix tree."""
        if sequence.state == FINISHED:
            return
        if sequence.state == WAITING:
            self._waiting.remove(sequence)
        else:
            self._ranks[sequence.rank].leave_behind(sequence)
            self._give_back(sequence)
        self._leave_group(sequence)
        sequence.state = FINISHED

    # What it decides.

    def plan(self, most_steps: int = 1) -> PrefillStep | DecodeStep | None:
        """The next step, to run behind all that were planned before; None if there is nothing to run.

        Prefill and decode take turns where there is something for both: a row that decodes waits for one
        prefill step at most, of `PrefillShapes.while_decoding` tokens.

        Args:
            most_steps: tokens a row of one decode step.
        """
        self._admit()
        step: PrefillStep | DecodeStep | None = None
        if self._prefilled_last:
            step = self._plan_decode(most_steps)
        if step is None:
            step = self._plan_prefill()
        if step is None:
            step = self._plan_decode(most_steps)
        self._prefilled_last = isinstance(step, PrefillStep)
        if step is not None:
            self._restores = []
        return step

    # Coming in.

    def _admit(self) -> None:
        """Gives slots and pages to those that wait, the oldest first; nobody overtakes one who finds none."""
        for sequence in list(self._waiting):
            if not any(rank.slots.free for rank in self._ranks):
                return
            group = sequence.group
            if group is not None and not group.ready and group.leader is not sequence:
                continue  # its prompt is being computed
            if not self._admit_one(sequence):
                return

    def _admit_one(self, sequence: Sequence) -> bool:
        text = sequence.known(len(sequence.prompt) + len(sequence.emitted))
        searches = self._prefix_cache or sequence.group is not None
        found = []
        for number, rank in enumerate(self._ranks):
            if rank.slots.free:
                match = rank.tree.match(text) if searches else Match((), 0)
                found.append((-match.depth, -rank.slots.free, number, match))
        for _, _, number, match in sorted(found, key=lambda each: each[:3]):
            if self._enter(sequence, text, number, match):
                return True
        return False

    def _enter(self, sequence: Sequence, text: np.ndarray, number: int, match: Match) -> bool:
        """Begins a row on a data rank, unless there are too few pages for its text there."""
        rank = self._ranks[number]
        node, pages = rank.tree.use(match)
        wanted = self._pages_for(len(text)) - len(pages)
        here = sum(other.rank == number for other in self._running)
        # a page for each row that runs, so that it need not give way at once
        if rank.available < wanted + here:
            rank.tree.unpin(node)
            for page in pages:
                rank.pool.release(page)
            return False
        slot = rank.slots.allocate()
        assert slot is not None
        sequence.rank, sequence.slot, sequence.node, sequence.text = number, slot, node, text
        sequence.pages = pages
        for _ in range(wanted):
            page = rank.take_page()
            assert page is not None
            pages.append(page)
        self._write_table(sequence)
        start = match.depth * self._page_length
        if not sequence.was_admitted:
            sequence.was_admitted, sequence.cached = True, start
            if sequence.group is not None:
                sequence.group.waiting -= 1
        sequence.planned, sequence.begun = start, False
        sequence.borders = self._borders(sequence, match) if self._keeps(sequence) else []
        self._restores.append(StateMove(number, slot, match.snapshot))
        sequence.state = PREFILL if start < len(text) - 1 else DECODE
        self._note_ready(sequence)
        self._waiting.remove(sequence)
        self._running.append(sequence)
        self._running.sort(key=lambda each: each.number)
        return True

    def _keeps(self, sequence: Sequence) -> bool:
        """Whether what a row has computed of its prompt is for others, too."""
        if not self._ranks[0].tree.snapshots.size:
            return False
        group = sequence.group
        return self._prefix_cache or (group is not None and group.waiting > 0)

    def _borders(self, sequence: Sequence, match: Match) -> list[int]:
        """Where a snapshot is worth its place: at the last page border inside the text, where the same text
        goes on from, and where this one leaves another."""
        last = (len(sequence.text) - 1) // self._page_length * self._page_length
        branch = len(match.path) * self._page_length
        return sorted({border for border in (last, branch) if border > sequence.planned})

    def _note_ready(self, sequence: Sequence) -> None:
        if sequence.group is not None and sequence.state == DECODE:
            sequence.group.ready = True

    # Reading prompts.

    def _plan_prefill(self) -> PrefillStep | None:
        reading = [sequence for sequence in self._running if sequence.state == PREFILL]
        if not reading:
            return None
        of_rank = [[s for s in reading if s.rank == rank] for rank in range(len(self._ranks))]

        def worth(shape: tuple[int, int]) -> float:
            rows, chunk = shape
            done = sum(min(chunk, self._until(s) - s.planned) for some in of_rank for s in some[:rows])
            return done / (rows * chunk * len(self._ranks) + self._shapes.overhead)

        shapes = self._shapes.shapes
        if any(s.state == DECODE for s in self._running):
            shapes = [s for s in shapes if s[0] * s[1] <= self._shapes.while_decoding]
        shape = max(shapes, key=worth)
        planned, saves = [], []
        for number, some in enumerate(of_rank):
            for row, sequence in enumerate(some[: shape[0]]):
                start = sequence.planned
                end = min(start + shape[1], self._until(sequence))
                tokens, following = sequence.text[start:end], sequence.text[start + 1 : end + 1]
                planned.append(PrefillRow(sequence, number, row, sequence.slot, start, tokens, following))
                sequence.planned = end
                if end == len(sequence.text) - 1:
                    sequence.state = DECODE
                if sequence.borders and end == sequence.borders[0]:
                    sequence.borders.pop(0)
                    place = self._ranks[number].keep_prefix(sequence, end)
                    if place is not None:
                        saves.append(StateMove(number, sequence.slot, place))
                self._note_ready(sequence)
        return PrefillStep(shape, tuple(planned), tuple(self._restores), tuple(saves))

    def _until(self, sequence: Sequence) -> int:
        """Where a row's next chunk ends at the latest."""
        return sequence.borders[0] if sequence.borders else len(sequence.text) - 1

    # Decoding.

    def _plan_decode(self, most_steps: int) -> DecodeStep | None:
        rows = [s for s in self._running if s.state == DECODE and s.fewest_emitted < s.max_new_tokens]
        if not rows:
            return None
        steps = min(most_steps, max(s.max_new_tokens - s.fewest_emitted for s in rows))
        for sequence in rows:
            steps = self._get_pages(sequence, steps)
        rows = [s for s in rows if s.state == DECODE]  # others had to give way
        if not rows:
            return None
        of_rank = [[s for s in rows if s.rank == rank] for rank in range(len(self._ranks))]
        planned = []
        for number, some in enumerate(of_rank):
            for row, sequence in enumerate(sorted(some, key=lambda each: each.slot)):
                token = None if sequence.begun else int(sequence.text[-1])
                length, emitted = sequence.planned, len(sequence.emitted)
                fewest = min(steps, sequence.max_new_tokens - sequence.fewest_emitted)
                sequence.in_flight.append((fewest, self._advance(sequence, steps)))
                sequence.planned = self._most_planned(sequence)
                self._ranks[number].get_places(sequence, length)
                planned.append(
                    DecodeRow(
                        sequence,
                        number,
                        row,
                        sequence.slot,
                        sequence.epoch,
                        token,
                        length,
                        emitted,
                        tuple(sequence.places),
                    )
                )
                sequence.begun = True
        return DecodeStep(max(map(len, of_rank)), tuple(planned), steps, tuple(self._restores))

    def _advance(self, sequence: Sequence, steps: int) -> int:
        """New tokens of a decode step, at most."""
        most = steps * (1 + sequence.draft_tokens)
        return min(most, sequence.max_new_tokens - sequence.most_emitted)

    def _most_planned(self, sequence: Sequence) -> int:
        return len(sequence.prompt) + sequence.most_emitted - 1

    def _get_pages(self, sequence: Sequence, steps: int) -> int:
        """Pages for the tokens of a step, if need be of fewer steps, or of the youngest rows.

        Returns:
            the steps that there are pages for.
        """
        rank = self._ranks[sequence.rank]
        while sequence.state == DECODE:
            advance = self._advance(sequence, steps)
            if len(sequence.pages) >= self._pages_for(sequence.planned + advance):
                break
            page = rank.take_page()
            if page is not None:
                sequence.pages.append(page)
                self._write_table(sequence)
            elif steps > 1:
                steps = 1
            elif len(sequence.pages) >= self._pages_for(sequence.planned + min(1, advance)):
                break  # it takes no more tokens than there is room for
            else:
                self._preempt(max((s for s in self._running if s.rank == sequence.rank), key=_by_number))
        return steps

    # Going out.

    def _give_back(self, sequence: Sequence) -> None:
        """What a row holds goes back."""
        self._ranks[sequence.rank].give_back(sequence)
        self.tables[sequence.rank * self._slots + sequence.slot] = self._pages
        self.tables_version += 1
        self._running.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """A row gives way: it waits, in its old turn, to be computed again."""
        self._give_back(sequence)
        sequence.state = WAITING
        sequence.epoch += 1
        self.preemptions += 1
        older = takewhile(lambda other: other.number < sequence.number, self._waiting)
        self._waiting.insert(len(list(older)), sequence)

    def _leave_group(self, sequence: Sequence) -> None:
        """Lets another sequence of the prompt compute it if this one has not."""
        group = sequence.group
        if group is None:
            return
        group.waiting -= not sequence.was_admitted
        if not group.waiting:
            while group.left:
                rank, node = group.left.pop()
                self._ranks[rank].tree.forget(node)
        if group.leader is sequence and not group.ready:
            others = [s for s in self._waiting if s.group is group]
            if others:
                group.leader = others[0]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_length)

    def _write_table(self, sequence: Sequence) -> None:
        row = self.tables[sequence.rank * self._slots + sequence.slot]
        row[: len(sequence.pages)] = sequence.pages
        self.tables_version += 1


def _by_number(sequence: Sequence) -> int:
    return sequence.number

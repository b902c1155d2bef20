"""A device for the scheduler alone: it runs steps in order, checks what rows read, and chooses tokens by
hashing.

What a page holds is the token of each place; what a state is, the exact text it has seen. So a row that reads
another's page, goes on from a wrong state, or has lost a token, is found at once.
"""

import hashlib
from collections import deque

import numpy as np

from qwen_moe_jax.engine.plan import DECODE, DecodeStep, PrefillStep, Sequence, StateMove
from qwen_moe_jax.engine.prefix_tree import Node
from qwen_moe_jax.engine.scheduler import Scheduler

END = 0  # the token that ends a text


def next_token(text: tuple[int, ...], vocabulary: int) -> int:
    """What a text goes on with."""
    digest = hashlib.sha256(np.asarray(text, np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % vocabulary


def alone(prompt: list[int], most: int, vocabulary: int) -> list[int]:
    """The tokens that a prompt gets, without any scheduler."""
    text, emitted = list(prompt), []
    while len(emitted) < most:
        token = next_token(tuple(text), vocabulary)
        emitted.append(token)
        text.append(token)
        if token == END:
            break
    return emitted


class FakeDevice:
    """Runs a scheduler's steps, whose results the host sees `lag` steps later.

    Attributes:
        finished: sequences that have ended by themselves.
        waits: for each running row, prefill steps since its last decode step.
    """

    def __init__(self, scheduler: Scheduler, *, vocabulary: int, lag: int, page_length: int):
        self.scheduler = scheduler
        self.vocabulary, self.lag, self.page_length = vocabulary, lag, page_length
        self.finished: list[Sequence] = []
        self.longest_wait = 0
        self.steps = self.passes = 0
        self._fixed: set[tuple[int, int]] = set()
        self._pages: dict[tuple[int, int], list[int | None]] = {}
        self._states: dict[tuple[int, int], tuple[int, ...]] = {}
        self._snapshots: dict[tuple[int, int], tuple[int, ...]] = {}
        self._rows: dict[tuple[int, int], list] = {}  # (rank, slot) -> [token, length, emitted, ended]
        self._results: deque = deque()
        self._waits: dict[Sequence, int] = {}

    def advance(self, most_steps: int) -> bool:
        """Plans and runs a step; False when there is nothing left at all."""
        shared = self._shared()
        step = self.scheduler.plan(most_steps)
        # what others had before the step and have behind it, the step is not to change
        self._fixed = shared & self._shared()
        if step is None:
            if not self._results:
                return False
            self._deliver()
            return True
        self.steps += 1
        for move in step.restores:
            self._states[move.rank, move.slot] = self._kept(move)
        if isinstance(step, PrefillStep):
            self._prefill(step)
            for move in step.saves:
                assert move.snapshot is not None
                self._snapshots[move.rank, move.snapshot] = self._states[move.rank, move.slot]
        else:
            self._results.append(self._decode(step))
        while len(self._results) > self.lag:
            self._deliver()
        return True

    def _kept(self, move: StateMove) -> tuple[int, ...]:
        return () if move.snapshot is None else self._snapshots[move.rank, move.snapshot]

    def _pages_of(self, rank: int, slot: int) -> np.ndarray:
        slots = self.scheduler._slots
        return self.scheduler.tables[rank * slots + slot]

    def _write(self, rank: int, page: int, place: int, token: int, sequence: Sequence) -> None:
        assert 0 <= page < self.scheduler._pages, "a token without a page"
        assert page in sequence.pages, "a page that is not the row's"
        assert (rank, page) not in self._fixed, "a shared page was written"
        held = self._pages.setdefault((rank, page), [None] * self.page_length)
        held[place] = token

    def _shared(self) -> set[tuple[int, int]]:
        pools = [rank.pool for rank in self.scheduler._ranks]
        return {
            (n, page) for n, pool in enumerate(pools) for page in range(pool.pages) if pool.owners(page) > 1
        }

    def _read(self, rank: int, slot: int, length: int) -> tuple[int, ...]:
        table = self._pages_of(rank, slot)
        found = []
        for position in range(length):
            page = int(table[position // self.page_length])
            token = self._pages[rank, page][position % self.page_length]
            assert token is not None, "a key that nobody wrote"
            found.append(token)
        return tuple(found)

    def _prefill(self, step: PrefillStep) -> None:
        rows, chunk = step.shape
        places = [(row.rank, row.row) for row in step.rows]
        assert len(set(places)) == len(places)
        for row in step.rows:
            assert 0 <= row.row < rows
            assert 1 <= len(row.tokens) <= chunk
            before = self._read(row.rank, row.slot, row.start)
            assert before == self._states[row.rank, row.slot], "state and keys disagree"
            table = self._pages_of(row.rank, row.slot)
            for place, token in enumerate(row.tokens.tolist(), start=row.start):
                page = int(table[place // self.page_length])
                self._write(row.rank, page, place % self.page_length, token, row.sequence)
            self._states[row.rank, row.slot] = before + tuple(row.tokens.tolist())
        for sequence in self.scheduler._running:
            more = sequence.fewest_emitted < sequence.max_new_tokens
            if sequence.state == DECODE and sequence.begun and more:
                self._waits[sequence] = self._waits.get(sequence, 0) + 1
                self.longest_wait = max(self.longest_wait, self._waits[sequence])

    def _decode(self, step: DecodeStep) -> list:
        places = [(row.rank, row.row) for row in step.rows]
        assert len(set(places)) == len(places)
        results = []
        for row in step.rows:
            assert 0 <= row.row < step.width
            self._waits[row.sequence] = 0
            key = (row.rank, row.slot)
            if row.token is not None:
                self._rows[key] = [row.token, row.length, row.emitted, False]
            token, length, emitted, ended = self._rows[key]
            chosen = []
            capacity = self.page_length * int((self._pages_of(*key) < self.scheduler._pages).sum())
            for _ in range(step.steps):
                if ended or length >= capacity:
                    break
                for _ in range(self._tokens_of_a_pass(row.sequence, length)):
                    before = self._read(row.rank, row.slot, length)
                    assert before == self._states[key], "state and keys disagree"
                    page = int(self._pages_of(row.rank, row.slot)[length // self.page_length])
                    self._write(row.rank, page, length % self.page_length, token, row.sequence)
                    text = (*before, token)
                    self._states[key] = text
                    place = row.places[len(text) // self.page_length % len(row.places)]
                    if len(text) % self.page_length == 0 and place is not None:
                        self._snapshots[row.rank, place] = text
                    token, length, emitted = next_token(text, self.vocabulary), length + 1, emitted + 1
                    chosen.append(token)
                    ended = token == END or emitted >= row.sequence.max_new_tokens
                    if ended:
                        break
            self._rows[key] = [token, length, emitted, ended]
            results.append((row, chosen))
        return results

    def _tokens_of_a_pass(self, sequence: Sequence, length: int) -> int:
        """As many as some drafts would hold; none of them beyond the border of a page."""
        self.passes += 1
        held = self.passes * 2654435761 % 97 % (sequence.draft_tokens + 1)
        return 1 + min(held, self.page_length - 1 - length % self.page_length)

    def _deliver(self) -> None:
        for row, chosen in self._results.popleft():
            sequence = row.sequence
            if sequence.epoch != row.epoch or sequence.state == "finished":
                continue
            self.scheduler.emit(sequence, chosen, row.epoch)
            if chosen and (chosen[-1] == END or len(sequence.emitted) >= sequence.max_new_tokens):
                self.scheduler.finish(sequence)
                self.finished.append(sequence)


def _path(node: Node) -> list[Node]:
    """From a node to the first page."""
    found = []
    while node.parent is not None:
        found.append(node)
        node = node.parent
    return found


def check_ownership(scheduler: Scheduler) -> None:
    """Every page and snapshot has exactly the owners that know of it; none is lost."""
    for number, rank in enumerate(scheduler._ranks):
        owners = [0] * rank.pool.pages
        held = [s for s in scheduler._running if s.rank == number]
        for sequence in held:
            assert len(set(sequence.pages)) == len(sequence.pages)
            for page in sequence.pages:
                owners[page] += 1
        nodes = rank.tree.nodes()
        for node in nodes:
            owners[node.page] += 1
        assert owners == [rank.pool.owners(page) for page in range(rank.pool.pages)]
        assert rank.pool.free == owners.count(0)
        assert rank.tree.pages == len(nodes)
        assert rank.tree.evictable == sum(node.pins == 0 for node in nodes)
        for node in nodes:
            mine = [s for s in held if s.node is not None and node in _path(s.node)]
            assert node.pins == len(mine)
        kept = [node.snapshot for node in nodes if node.snapshot is not None]
        kept += [place for s in held for place in s.places if place is not None]
        assert len(set(kept)) == len(kept)
        assert rank.tree.snapshots.free == rank.tree.snapshots.size - len(kept)
        slots = [s.slot for s in held]
        assert len(set(slots)) == len(slots)
        assert rank.slots.free == rank.slots.size - len(slots)

"""The engine's loop: what the scheduler plans goes to the device, and what the device chose comes back.

The host is a step ahead: while the device runs one step, the next is planned and handed to it. The device
finds out by itself that a row has reached an end token or its limit; of stop strings it does not know, so
that one step more is computed for a row that meets one, and dropped.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.plan import BORDERS, DecodeStep, PrefillStep, StateMove
from qwen_moe_jax.engine.plan import Sequence as Row
from qwen_moe_jax.engine.pools import PoolSizes
from qwen_moe_jax.engine.rows import (
    BLOCK_STEPS,
    END_IDS,
    MOVES,
    NO_PLACE,
    Block,
    Entries,
    Layers,
    Roster,
    RowStates,
    States,
    empty_states,
)
from qwen_moe_jax.engine.sampling import RowSampling, SamplingParams, history
from qwen_moe_jax.engine.scheduler import Scheduler
from qwen_moe_jax.engine.shapes import prefill_shapes, row_buckets
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.formats.cache import PAGE, Placement, states_of, with_states

# (number among the job's sequences, token, its log-probability) -> the sequence has ended.
Take = Callable[[int, int, float], bool]


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
        drafted: called with the drafts that were verified, and how many of them hold.
    """

    prompt: np.ndarray
    max_new_tokens: int
    sampling: tuple[RowSampling, ...]
    end_ids: tuple[int, ...]
    draft_tokens: int
    one_by_one: bool
    take: Take
    drafted: Callable[[int, int], None] = lambda drafted, accepted: None


class Core:
    """The pools of one model, the rows in them, and the steps that move them. Not safe for several threads.

    Attributes:
        steps: the compiled ones.
        sizes: of the pools.
        scheduler: what decides.
        ranks: that rows are divided among.
        programs: shapes of the steps that it has run.
        generated_tokens, prompt_tokens, cached_prompt_tokens, drafted_tokens, accepted_tokens: of all jobs so
            far.
    """

    def __init__(self, forward: Forward, steps: Steps, sizes: PoolSizes, *, context: int, prefix_cache: bool):
        self.steps = steps
        self.sizes = sizes
        self.generated_tokens = self.prompt_tokens = self.cached_prompt_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self._forward = forward
        self.ranks = forward.batch_multiple
        self.programs: set[tuple[Any, ...]] = set()
        self._vocab = forward.decoder.config.vocab_size
        self.scheduler = Scheduler(
            ranks=self.ranks,
            slots=sizes.slots,
            pages=sizes.pages,
            page_length=PAGE,
            snapshots=sizes.snapshots,
            shapes=prefill_shapes(sizes.slots, forward.kernels),
            row_buckets=row_buckets(sizes.slots),
            context=context,
            prefix_cache=prefix_cache,
        )
        self._jobs: dict[Row, tuple[Job, int]] = {}
        self._counted: set[Row] = set()
        self._pending: deque[tuple[PrefillStep | DecodeStep, Any]] = deque()
        # Steps that are handed to the device and not looked at yet. Devices that one CPU pretends to have
        # share its threads: collectives of two programs at a time would wait for each other for ever.
        several = len(forward.devices) > 1 and forward.devices[0].platform == "cpu"
        self._ahead = 0 if several else 1
        self._layers: Layers = forward.new_layers(self.ranks * sizes.pages, self.ranks * sizes.slots)
        self._snapshots: States = ()
        if sizes.snapshots:
            self._snapshots = forward.new_states(self.ranks * sizes.snapshots)
        else:  # a place that nothing is kept in, so that there is something to begin from
            self._snapshots = forward.new_states(self.ranks)
        self._states: RowStates = empty_states(self.ranks * sizes.slots, forward.draft_tokens)
        self._seen: jax.Array | None = None
        self._tables: Any = None  # and the tokens that every row has pages for
        self._tables_version = -1
        self._roster: Roster | None = None
        self._roster_rows: tuple[Any, ...] = ()
        self._no_entries: dict[int, Entries] = {}

    def submit(self, job: Job) -> list[Row]:
        """Queues a job; one row for each of its sequences.

        Raises:
            InputError: it can never fit.
        """
        rows = self.scheduler.submit(job.prompt, job.max_new_tokens, len(job.sampling), job.draft_tokens)
        for index, row in enumerate(rows):
            self._jobs[row] = (job, index)
        self.prompt_tokens += len(job.prompt)
        return rows

    def cancel(self, row: Row) -> None:
        """Ends a row, wherever it is; nothing more is taken of it."""
        if row in self._jobs:
            self._end(row)

    def advance(self) -> bool:
        """Hands the device its next step and looks at one that is done; False when there is nothing left."""
        step = self.scheduler.plan(self._most_steps())
        if step is None:
            if not self._pending:
                return False
            self._collect()
            return True
        self._move_states(step.restores, restore=True)
        if isinstance(step, PrefillStep):
            self._pending.append((step, self._prefill(step)))
            self._move_states(step.saves, restore=False)
        else:
            self._pending.append((step, self._decode(step)))
        while len(self._pending) > self._ahead:
            self._collect()
        return True

    def warmup(self, *, sampled: bool) -> None:
        """Runs every step that there can be, without rows.

        Args:
            sampled: also those of rows that draw their tokens or have penalties.
        """
        for shape in prefill_shapes(self.sizes.slots, self._forward.kernels).shapes:
            self._prefill(PrefillStep(shape, (), (), ()))
        for bucket in row_buckets(self.sizes.slots):
            for greedy in (True, False)[: 1 + sampled]:
                jax.block_until_ready(self._decode(DecodeStep(bucket, (), 1, ()), greedy=greedy))
        nothing = [StateMove(0, self.sizes.slots, None)]
        self._move_states(nothing, restore=True)
        if self.sizes.snapshots:
            self._move_states([StateMove(0, self.sizes.slots, self.sizes.snapshots)], restore=False)
        if sampled:
            self._seen = self._remembered(0, 0, np.zeros(self._vocab, np.int32))

    def _most_steps(self) -> int:
        """Steps a device call: many only while nobody waits for a row's end or reads along."""
        if self.scheduler.waiting or any(job.one_by_one for job, _ in self._jobs.values()):
            return 1
        return BLOCK_STEPS

    def _collect(self) -> None:
        """Waits for the oldest step and hands its tokens on."""
        step, result = self._pending.popleft()
        result = jax.device_get(result)
        if isinstance(step, PrefillStep):
            return
        for row in step.rows:
            sequence = row.sequence
            if sequence not in self._jobs or sequence.epoch != row.epoch:
                continue  # it ended, or gave its pages back, while the step ran
            place = row.rank * step.bucket + row.row
            count = int(result.count[place])
            tokens = result.tokens[place, :count].tolist()
            logprobs = result.logprobs[place, :count].tolist()
            job, index = self._jobs[sequence]
            drafted, accepted = int(result.drafted[place]), int(result.accepted[place])
            self.drafted_tokens += drafted
            self.accepted_tokens += accepted
            if drafted:
                job.drafted(drafted, accepted)
            taken, ended = [], False
            for token, logprob in zip(tokens, logprobs, strict=True):
                taken.append(token)
                ended = job.take(index, token, logprob)
                if ended:
                    break
            self.generated_tokens += len(taken)
            self.scheduler.emit(sequence, taken, row.epoch)
            if ended:
                self._end(sequence)

    def _end(self, row: Row) -> None:
        del self._jobs[row]
        self._counted.discard(row)
        self.scheduler.finish(row)

    def _move_states(self, moves: Sequence[StateMove], *, restore: bool) -> None:
        """Slots from snapshots, or snapshots from slots, a few on each data rank a call."""
        states = states_of(self._layers)
        if not states:
            return
        slots, kept = self.sizes.slots, self._snapshots[0].conv.shape[0] // self.ranks
        of_rank = [[m for m in moves if m.rank == rank] for rank in range(self.ranks)]
        for first in range(0, max(map(len, of_rank)), MOVES):
            slot = np.full((self.ranks, MOVES), slots, np.int32)
            snapshot = np.full((self.ranks, MOVES), kept, np.int32)
            for rank, mine in enumerate(of_rank):
                for place, move in enumerate(mine[first : first + MOVES]):
                    slot[rank, place] = move.slot
                    snapshot[rank, place] = kept if move.snapshot is None else move.snapshot
            self.programs.add(("move", restore))
            if restore:
                states = self.steps.move(states, self._snapshots, slot.ravel(), snapshot.ravel())
                self._layers = with_states(self._layers, states)
            else:
                self._snapshots = self.steps.move(self._snapshots, states, snapshot.ravel(), slot.ravel())

    def _prefill(self, step: PrefillStep) -> Any:
        rows, chunk = step.shape
        self.programs.add(("prefill", *step.shape))
        total = rows * self.ranks
        counts = np.zeros(total, np.int32)
        tokens, following = np.zeros((2, total, chunk), np.int32)
        tables: Any = np.full((total, self.scheduler.tables.shape[1]), self.sizes.pages, np.int32)
        slots: Any = np.full(total, self.sizes.slots, np.int32)
        length: Any = np.zeros(total, np.int32)
        for row in step.rows:
            place = row.rank * rows + row.row
            tokens[place, : len(row.tokens)] = row.tokens
            following[place, : len(row.tokens)] = row.following
            counts[place] = len(row.tokens)
            tables[place] = self.scheduler.tables[row.rank * self.sizes.slots + row.slot]
            slots[place], length[place] = row.slot, row.start
            self._count_prompt(row.sequence)
        placed = Placement(tables=tables, slots=slots, length=length)
        behind = following if self._forward.drafter is not None else None
        self._layers, done = self.steps.prefill(self._layers, tokens, behind, counts, placed)
        return done

    def _count_prompt(self, row: Row) -> None:
        """Counts what a row found in the prefix cache, once."""
        if row not in self._counted:
            self._counted.add(row)
            self.cached_prompt_tokens += row.cached

    def _decode(self, step: DecodeStep, *, greedy: bool = True) -> Block:
        """Hands a step over; every row that is not greedy makes the step so."""
        if self._tables_version != self.scheduler.tables_version:
            # a copy: the device reads it when it comes to the step
            tables = self.scheduler.tables.copy()
            capacity = PAGE * (tables < self.sizes.pages).sum(axis=1, dtype=np.int32)
            self._tables = self._kept((tables, capacity))
            self._tables_version = self.scheduler.tables_version
        roster, entries = self._roster_of(step), self._entries_of(step)
        for row in step.rows:
            job, index = self._jobs[row.sequence]
            greedy = greedy and job.sampling[index].greedy
            if row.token is not None:
                self._count_prompt(row.sequence)
        self.programs.add(("decode", step.bucket, greedy))
        if not greedy:
            self._remember(step)
        self._layers, self._snapshots, self._states, seen, block = self.steps.decode(
            self._layers,
            self._snapshots,
            self._states,
            None if greedy else self._seen,
            roster=roster,
            entries=entries,
            tables=self._tables[0],
            capacity=self._tables[1],
            steps=min(step.steps, BLOCK_STEPS),
        )
        if not greedy:
            self._seen = seen
        return block

    def _place(self, step: DecodeStep, rank: int, row: int) -> int:
        return rank * step.bucket + row

    def _roster_of(self, step: DecodeStep) -> Roster:
        """The rows of a step on the device; the last one's again while they are the same."""
        names = (
            step.bucket,
            *((row.rank, row.row, row.slot, row.sequence.number, row.epoch, row.places) for row in step.rows),
        )
        if self._roster is not None and names == self._roster_rows:
            return self._roster
        total = step.bucket * self.ranks
        slots: Any = np.full(total, self.sizes.slots, np.int32)
        limit: Any = np.zeros(total, np.int32)
        drafts: Any = np.zeros(total, np.int32)
        ends: Any = np.full((total, END_IDS), -1, np.int32)
        places: Any = np.full((total, BORDERS), NO_PLACE, np.int32)
        sampling = [RowSampling()] * total
        for row in step.rows:
            place = self._place(step, row.rank, row.row)
            job, index = self._jobs[row.sequence]
            slots[place] = row.slot
            limit[place] = job.max_new_tokens
            some = job.end_ids[:END_IDS]
            ends[place, : len(some)] = some
            drafts[place] = job.draft_tokens
            places[place] = [NO_PLACE if each is None else each for each in row.places]
            sampling[place] = job.sampling[index]
        given = self._kept(Roster(slots, limit, ends, drafts, places, SamplingParams.of(sampling)))
        self._roster, self._roster_rows = given, names
        return given

    def _entries_of(self, step: DecodeStep) -> Entries:
        """What the host says of rows that begin to decode."""
        total = step.bucket * self.ranks
        begin = [row for row in step.rows if row.token is not None]
        if not begin and total in self._no_entries:
            return self._no_entries[total]
        begins = np.zeros(total, bool)
        token, length, emitted = np.zeros((3, total), np.int32)
        for row in begin:
            place = self._place(step, row.rank, row.row)
            begins[place], token[place] = True, row.token or 0
            length[place], emitted[place] = row.length, row.emitted
        arrays: Any = begins, token, length, emitted
        given = Entries(*arrays)
        if not begin:
            self._no_entries[total] = given = self._kept(given)
        return given

    def _kept(self, given: Any) -> Any:
        """Arrays of the host that several steps take: on one device they are handed over once."""
        one = len(self._forward.devices) == 1 and jax.process_count() == 1
        return jax.device_put(given) if one else given

    def _remember(self, step: DecodeStep) -> None:
        """Makes the histories of penalised rows that begin."""
        all_slots = self.ranks * self.sizes.slots
        if self._seen is None:
            seen: Any = np.zeros((all_slots, self._vocab), np.int32)
            self._seen = seen
        for row in step.rows:
            job, index = self._jobs[row.sequence]
            if row.token is None or not job.sampling[index].penalises:
                continue
            generated = np.asarray(row.sequence.emitted, np.int64)
            seen = history(self._vocab, job.prompt, generated)
            self._seen = self._remembered(row.rank, row.slot, seen)

    def _remembered(self, rank: int, slot: int, seen: np.ndarray) -> jax.Array:
        assert self._seen is not None
        self.programs.add(("remember",))
        slots = np.full(self.ranks, self.sizes.slots, np.int32)
        slots[rank] = slot
        return self.steps.remember(self._seen, slots, np.tile(seen, (self.ranks, 1)))

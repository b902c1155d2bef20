"""The engine's loop: what the scheduler plans goes to the device, and what the device chose comes back.

The host is a step ahead: while the device runs one step, the next is planned and handed to it. The device
finds out by itself that a row has reached an end token or its limit; of stop strings it does not know, so
that one step more is computed for a row that meets one, and dropped.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.jobs import Job, Likeliest
from qwen_moe_jax.engine.plan import DecodeStep, PrefillStep, StateMove
from qwen_moe_jax.engine.plan import Sequence as Row
from qwen_moe_jax.engine.pools import PoolSizes
from qwen_moe_jax.engine.rosters import Rosters
from qwen_moe_jax.engine.rows import (
    BLOCK_STEPS,
    MOVES,
    Block,
    Layers,
    RowStates,
    States,
    StepRows,
    empty_states,
)
from qwen_moe_jax.engine.sampling import history, mask_words
from qwen_moe_jax.engine.scheduler import Scheduler
from qwen_moe_jax.engine.shapes import DECODE_KINDS, prefill_shapes, row_buckets
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.formats.cache import PAGE, Placement, states_of, with_states


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
            context=context,
            prefix_cache=prefix_cache,
        )
        self._jobs: dict[Row, tuple[Job, int]] = {}
        self._counted: set[Row] = set()
        # steps that the device has, with the rows that each is computed with
        self._pending: deque[tuple[PrefillStep | DecodeStep, int, Any]] = deque()
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
        self._states: RowStates = forward.put_rows(
            empty_states(self.ranks * sizes.slots, forward.draft_tokens)
        )
        self._seen: jax.Array | None = None
        self._tables: Any = None  # and the tokens that every row has pages for
        self._tables_version = -1
        self._buckets = {kind: row_buckets(sizes.slots, kind) for kind in DECODE_KINDS}
        self._rosters = Rosters(self.ranks, sizes.slots, self._kept)
        # the drafts that a guided row's next pass verifies, as far as is known
        self._drafts: dict[Row, list[int]] = {}

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
            self._pending.append((step, 0, self._prefill(step)))
            self._move_states(step.saves, restore=False)
        else:
            self._pending.append((step, *self._decode(step)))
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
        for kind in DECODE_KINDS if sampled else DECODE_KINDS[:1]:
            for bucket in self._buckets[kind]:
                jax.block_until_ready(self._decode(DecodeStep(bucket, (), 1, ()), kind))
        nothing = [StateMove(0, self.sizes.slots, None)]
        self._move_states(nothing, restore=True)
        if self.sizes.snapshots:
            self._move_states([StateMove(0, self.sizes.slots, self.sizes.snapshots)], restore=False)
        if sampled:
            self._seen = self._remembered(0, 0, np.zeros(self._vocab, np.int32))

    def _most_steps(self) -> int:
        """Steps a device call: many only while nobody waits for a row's end, reads along or guides."""
        if self.scheduler.waiting or any(job.one_by_one or job.is_guided for job, _ in self._jobs.values()):
            return 1
        return BLOCK_STEPS

    def _collect(self) -> None:
        """Waits for the oldest step and hands its tokens on."""
        step, bucket, result = self._pending.popleft()
        result = jax.device_get(result)
        if isinstance(step, PrefillStep):
            return
        for row in step.rows:
            sequence = row.sequence
            if sequence not in self._jobs or sequence.epoch != row.epoch:
                continue  # it ended, or gave its pages back, while the step ran
            place = row.rank * bucket + row.row
            count = int(result.count[place])
            tokens = result.tokens[place, :count].tolist()
            logprobs = result.logprobs[place, :count].tolist()
            job, index = self._jobs[sequence]
            drafted, accepted = int(result.drafted[place]), int(result.accepted[place])
            self.drafted_tokens += drafted
            self.accepted_tokens += accepted
            if drafted:
                job.drafted(drafted, accepted)
            if result.drafts is not None and job.is_guided:
                self._drafts[sequence] = result.drafts[place].tolist()
            taken, ended = [], False
            for number, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                taken.append(token)
                ended = job.take(index, token, logprob, _likeliest(job, result, place, number))
                if ended:
                    break
            self.generated_tokens += len(taken)
            self.scheduler.emit(sequence, taken, row.epoch)
            if ended:
                self._end(sequence)

    def _end(self, row: Row) -> None:
        del self._jobs[row]
        self._counted.discard(row)
        self._drafts.pop(row, None)
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

    def _decode(self, step: DecodeStep, kind: str | None = None) -> tuple[int, Block]:
        """Hands a step over.

        Args:
            step: of the scheduler.
            kind: one of `DECODE_KINDS`; None for the first one that all its rows can have.

        Returns:
            (rows of each data rank that are computed, what the device will say).
        """
        if self._tables_version != self.scheduler.tables_version:
            # a copy: the device reads it when it comes to the step
            tables = self.scheduler.tables.copy()
            capacity = PAGE * (tables < self.sizes.pages).sum(axis=1, dtype=np.int32)
            self._tables = self._kept((tables, capacity))
            self._tables_version = self.scheduler.tables_version
        kind = kind or self._kind_of(step)
        bucket = next(each for each in self._buckets[kind] if each >= step.width)
        of_rows = [self._jobs[row.sequence] for row in step.rows]
        roster, entries = self._rosters.roster(step, bucket, of_rows), self._rosters.entries(step, bucket)
        told = StepRows(roster, entries, *self._tables)
        for row in step.rows:
            if row.token is not None:
                self._count_prompt(row.sequence)
        self.programs.add((kind, bucket))
        if kind == "guided":
            self.programs.add(("guided choice", bucket))
        if kind != "greedy":
            self._remember(step)
        if kind == "guided":
            return bucket, self._guided(step, bucket, told)
        self._layers, self._snapshots, self._states, seen, block = self.steps.decode(
            self._layers,
            self._snapshots,
            self._states,
            None if kind == "greedy" else self._seen,
            told,
            steps=min(step.steps, BLOCK_STEPS),
        )
        if kind != "greedy":
            self._seen = seen
        return bucket, block

    def _kind_of(self, step: DecodeStep) -> str:
        greedy = True
        for row in step.rows:
            job, index = self._jobs[row.sequence]
            in_flight = row.sequence.most_emitted - len(row.sequence.emitted)
            if job.needs_guide(index, in_flight):
                return "guided"
            greedy = greedy and job.sampling[index].greedy
        return "greedy" if greedy else "sampled"

    def _guided(self, step: DecodeStep, bucket: int, told: StepRows) -> Block:
        """A step whose tokens the host has a say in: while the forward pass runs, the results of the steps
        before it are looked at, and what may follow them is found out."""
        self._layers, passed = self.steps.forward_pass(self._layers, self._states, told)
        while self._pending:
            self._collect()
        if not self._ahead:
            jax.block_until_ready(passed)
        allowed = self._allowed(step, bucket, passed.logits.shape[1])
        jobs = [self._jobs[row.sequence][0] for row in step.rows if row.sequence in self._jobs]
        assert self._seen is not None
        self._layers, self._snapshots, self._states, self._seen, block = self.steps.choose(
            self._layers,
            self._snapshots,
            self._states,
            self._seen,
            passed,
            allowed,
            likeliest=any(job.likeliest for job in jobs),
        )
        return block

    def _allowed(self, step: DecodeStep, bucket: int, tokens: int) -> np.ndarray:
        """Which tokens each row may choose behind each of a pass, uint32 [rows, tokens, words]."""
        allowed = np.full((bucket * self.ranks, tokens, mask_words(self._vocab)), 0xFFFFFFFF, np.uint32)
        for row in step.rows:
            if row.sequence not in self._jobs:
                continue  # it has ended meanwhile
            job, index = self._jobs[row.sequence]
            guide = job.guides[index] if job.guides else None
            if guide is None:
                continue
            drafts = self._drafts.get(row.sequence, [])[: tokens - 1]
            try:
                guide.allow(drafts, allowed[row.rank * bucket + row.row])
            except Exception as error:  # harms nobody else
                job.failed(self, error)
                self.cancel(row.sequence)
        return allowed

    def _kept(self, given: Any) -> Any:
        """Arrays of the host that several steps take: on one device they are handed over once."""
        one = len(self._forward.devices) == 1 and jax.process_count() == 1
        return jax.device_put(given) if one else given

    def _remember(self, step: DecodeStep) -> None:
        """Makes the histories of penalised rows that begin."""
        all_slots = self.ranks * self.sizes.slots
        if self._seen is None:
            self._seen = self._forward.put_rows(np.zeros((all_slots, self._vocab), np.int32))
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


def _likeliest(job: Job, result: Any, place: int, number: int) -> Likeliest | None:
    """The likeliest tokens in the place of one that was emitted, if somebody asks for them."""
    if not job.likeliest:
        return None
    most = job.likeliest
    tokens = result.likeliest[place, number, :most].tolist()
    return dict(zip(tokens, result.likeliest_logprobs[place, number, :most].tolist(), strict=True))

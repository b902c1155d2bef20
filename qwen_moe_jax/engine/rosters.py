"""What the device is told of the rows of a decode step, from what the scheduler planned."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.engine.jobs import Job
from qwen_moe_jax.engine.plan import BORDERS, DecodeStep
from qwen_moe_jax.engine.rows import NO_PLACE, Entries, Roster
from qwen_moe_jax.engine.sampling import MOST_ENDS, RowSampling, SamplingParams


class Rosters:
    """Makes rosters and entries, and gives the last ones again while they are the same."""

    def __init__(self, ranks: int, slots: int, kept: Callable[[Any], Any]):
        """Begins with none.

        Args:
            ranks: data ranks.
            slots: of each.
            kept: takes arrays of the host to where several steps may have them.
        """
        self._ranks, self._slots, self._kept = ranks, slots, kept
        self._roster: Roster | None = None
        self._names: tuple[Any, ...] = ()
        self._no_entries: dict[int, Entries] = {}

    def roster(self, step: DecodeStep, bucket: int, jobs: Sequence[tuple[Job, int]]) -> Roster:
        """The rows of a step.

        Args:
            step: of the scheduler.
            bucket: rows of each data rank that are computed.
            jobs: of each row, with the number of the sequence.
        """
        names = (
            bucket,
            *((row.rank, row.row, row.slot, row.sequence.number, row.epoch, row.places) for row in step.rows),
        )
        if self._roster is not None and names == self._names:
            return self._roster
        total = bucket * self._ranks
        slots: Any = np.full(total, self._slots, np.int32)
        limit: Any = np.zeros(total, np.int32)
        drafts: Any = np.zeros(total, np.int32)
        ends: Any = np.full((total, MOST_ENDS), -1, np.int32)
        places: Any = np.full((total, BORDERS), NO_PLACE, np.int32)
        sampling = [RowSampling()] * total
        for row, (job, index) in zip(step.rows, jobs, strict=True):
            place = row.rank * bucket + row.row
            slots[place] = row.slot
            limit[place] = job.max_new_tokens
            some = job.end_ids[:MOST_ENDS]
            ends[place, : len(some)] = some
            drafts[place] = job.draft_tokens
            places[place] = [NO_PLACE if each is None else each for each in row.places]
            sampling[place] = job.sampling[index]
        given = self._kept(Roster(slots, limit, ends, drafts, places, SamplingParams.of(sampling)))
        self._roster, self._names = given, names
        return given

    def entries(self, step: DecodeStep, bucket: int) -> Entries:
        """What the host says of rows that begin to decode; arguments as of `roster`."""
        total = bucket * self._ranks
        begin = [row for row in step.rows if row.token is not None]
        if not begin and total in self._no_entries:
            return self._no_entries[total]
        begins = np.zeros(total, bool)
        token, length, emitted = np.zeros((3, total), np.int32)
        for row in begin:
            place = row.rank * bucket + row.row
            begins[place], token[place] = True, row.token or 0
            length[place], emitted[place] = row.length, row.emitted
        arrays: Any = begins, token, length, emitted
        given = self._kept(Entries(*arrays))
        if not begin:
            self._no_entries[total] = given
        return given

"""How a dimension is divided among ranks that need not divide it evenly.

Ranks hold whole units (a head, an expert, a row), all ranks room for equally many; where the units run out,
room stays empty and is zero. An empty head or expert row multiplies zeros, which changes no result.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Section:
    """Equal units that stand behind one another in a dimension, and which of them each rank holds.

    Attributes:
        width: elements a unit.
        units: how many there are.
        held: units that a rank has room for.
        starts: for each rank, the first unit it holds; at or beyond `units`, it holds none.
    """

    width: int
    units: int
    held: int
    starts: tuple[int, ...]

    @classmethod
    def even(cls, units: int, ranks: int, width: int = 1) -> "Section":
        """Consecutive units, ceil(units / ranks) a rank."""
        held = -(-units // ranks)
        return cls(width, units, held, tuple(rank * held for rank in range(ranks)))


@dataclasses.dataclass(frozen=True)
class Split:
    """A dimension divided along some mesh axes.

    Attributes:
        axes: of the mesh, the first one changing slowest; () where every rank holds all of it.
        sections: one behind the other in the stored dimension, and in each rank's part.
    """

    axes: tuple[str, ...]
    sections: tuple[Section, ...]

    @property
    def local_size(self) -> int:
        """Elements of the dimension that a rank holds, empty room included."""
        return sum(section.held * section.width for section in self.sections)

    @property
    def ranks(self) -> int:
        """Ranks it is divided among."""
        return len(self.sections[0].starts)

    @property
    def size(self) -> int:
        """Elements of the dimension of the global array, in which each rank's part is an equal slice."""
        return self.ranks * self.local_size

    def spans(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """What a rank holds: (elements of the stored dimension, where they lie in the rank's part)."""
        stored, local = 0, 0
        for section in self.sections:
            start = min(section.starts[rank], section.units)
            count = min(section.held, section.units - start) * section.width
            if count:
                first = stored + start * section.width
                yield slice(first, first + count), slice(local, local + count)
            stored += section.units * section.width
            local += section.held * section.width


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads and the key heads they read, divided so that every rank finds its queries' keys at home.

    The same for the value heads of a Gated DeltaNet and the key heads that they read.

    Attributes:
        queries, keys: units that a rank has room for; queries / keys of them read each key head.
        query_starts, key_starts: the first of each, for every rank.
    """

    queries: int
    keys: int
    query_starts: tuple[int, ...]
    key_starts: tuple[int, ...]


def divide_heads(queries: int, keys: int, ranks: int) -> Heads:
    """Divides query heads evenly, each with its key head; a key head read on several ranks is on each.

    A rank gets the smallest number of query heads that is enough for all and is made of whole groups
    (the queries of a key head) or of equal parts of one group.

    Args:
        queries: a multiple of keys; query head h reads key head h // (queries / keys). 0 if there are none.
        keys: how many.
        ranks: any number; some hold nothing if there are more of them than query heads.
    """
    if not queries:
        return Heads(queries=0, keys=0, query_starts=(0,) * ranks, key_starts=(0,) * ranks)
    group = queries // keys
    held = -(-queries // ranks)
    while held % group and group % held:
        held += 1
    starts = tuple(rank * held for rank in range(ranks))
    return Heads(
        queries=held,
        keys=max(1, held // group),
        query_starts=starts,
        key_starts=tuple(start // group for start in starts),
    )

"""What one data rank has: slots, pages, snapshots and its prefix tree, and what rows leave there."""

from qwen_moe_jax.engine.pages import PagePool, PlacePool
from qwen_moe_jax.engine.plan import BORDERS, Sequence
from qwen_moe_jax.engine.prefix_tree import PrefixTree


class RankPools:
    """Slots, pages and snapshots of a data rank.

    Attributes:
        slots: free and taken.
        pool: of pages.
        tree: the prefix tree, which has its own pool of snapshots.
    """

    def __init__(self, slots: int, pages: int, page_length: int, snapshots: int, prefix_cache: bool):
        self.slots = PlacePool(slots)
        self.pool = PagePool(pages)
        self.tree = PrefixTree(page_length, self.pool, snapshots)
        self._page_length = page_length
        self._prefix_cache = prefix_cache

    @property
    def available(self) -> int:
        """Pages that a row could get."""
        return self.pool.free + self.tree.evictable

    def take_page(self) -> int | None:
        """A page, from the prefix tree where none is free."""
        page = self.pool.allocate()
        if page is None and self.tree.evict_page():
            page = self.pool.allocate()
        return page

    def keep_prefix(self, sequence: Sequence, length: int) -> int | None:
        """Leaves a row's pages so far to the prefix tree.

        Args:
            sequence: the row.
            length: its tokens so far, whole pages.

        Returns:
            the snapshot that the states behind them are to be saved in; None if there is one already, or
            no place.
        """
        assert sequence.node is not None
        sequence.node = self.tree.insert(sequence.text[:length], sequence.pages, sequence.node)
        if sequence.node.snapshot is not None:
            return None
        place = self.tree.place_for_snapshot()
        if place is not None:
            self.tree.keep(sequence.node, place)
        return place

    def get_places(self, sequence: Sequence, before: int) -> None:
        """Places for snapshots at the page borders that a row may come to with its next step."""
        if not self._prefix_cache:
            return
        length = self._page_length
        for number in range(before // length + 1, sequence.planned // length + 1):
            turn = number % BORDERS
            if sequence.places[turn] is None:
                sequence.places[turn] = self.tree.place_for_snapshot()
                sequence.places_from[turn] = number * length

    def leave_behind(self, sequence: Sequence) -> None:
        """Puts a row's whole pages into the prefix tree, and the states of the last border it has passed."""
        if self._prefix_cache:
            known = sequence.known(sequence.confirmed // self._page_length * self._page_length)
            assert sequence.node is not None
            sequence.node = self.tree.insert(known, sequence.pages, sequence.node)
            found = self._passed_border(sequence)
            if found is not None:
                turn, length = found
                place, sequence.places[turn] = sequence.places[turn], None
                node = sequence.node
                while node.depth * self._page_length > length:
                    assert node.parent is not None
                    node = node.parent
                assert place is not None
                self.tree.keep(node, place)

    def _passed_border(self, sequence: Sequence) -> tuple[int, int] | None:
        """(turn, length) of the last page border that a row has decoded past and whose snapshot still holds
        it; None if there is none."""
        page = self._page_length
        last = sequence.confirmed // page * page
        for border in range(last, last - BORDERS * page, -page):
            turn = border // page % BORDERS
            kept = sequence.places[turn] is not None and sequence.places_from[turn] <= border
            # the row may have come further than is known, and have written over it
            if kept and border <= sequence.confirmed and sequence.planned < border + BORDERS * page:
                return turn, border
        return None

    def give_back(self, sequence: Sequence) -> None:
        """What a row holds goes back; its place is free at once, since steps run in their order."""
        assert sequence.node is not None
        for place in sequence.places:
            if place is not None:
                self.tree.snapshots.release(place)
        sequence.places, sequence.in_flight = [None] * BORDERS, []
        self.tree.unpin(sequence.node)
        group = sequence.group
        if not self._prefix_cache and group is not None and group.waiting:
            group.left.append((sequence.rank, sequence.node))
        elif not self._prefix_cache:
            self.tree.forget(sequence.node)
        for page in sequence.pages:
            self.pool.release(page)
        self.slots.release(sequence.slot)
        sequence.pages, sequence.node = [], None

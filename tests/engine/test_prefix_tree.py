"""The tree by itself: what a text finds, and what leaves first."""

import numpy as np
import pytest

from qwen_moe_jax.engine.pages import PagePool
from qwen_moe_jax.engine.prefix_tree import Node, PrefixTree

PAGE = 4


def text(*pages: int, rest: int = 0) -> np.ndarray:
    """Pages of equal tokens, and a few more."""
    return np.asarray([page for page in pages for _ in range(PAGE)] + [99] * rest, np.int32)


class Cache:
    """A tree with its pages, as a row would use it."""

    def __init__(self, pages: int = 16, snapshots: int = 4):
        self.pool = PagePool(pages)
        self.tree = PrefixTree(PAGE, self.pool, snapshots)

    def add(self, *pages: int, snapshot: bool = True) -> Node:
        """A row computes a text of whole pages, leaves it behind and goes."""
        tokens = text(*pages)
        held = [self.pool.allocate() for _ in pages]
        assert None not in held
        node = self.tree.insert(tokens, held, self.tree.root)  # type: ignore[arg-type]
        if snapshot:
            place = self.tree.place_for_snapshot()
            assert place is not None
            self.tree.keep(node, place)
        self.tree.unpin(node)
        for page in held:
            self.pool.release(page)  # type: ignore[arg-type]
        return node

    def hit(self, tokens: np.ndarray) -> int:
        """Pages that a text goes on from, as a row that comes and goes."""
        match = self.tree.match(tokens)
        node, pages = self.tree.use(match)
        self.tree.unpin(node)
        for page in pages:
            self.pool.release(page)
        return match.depth


def test_a_text_finds_the_deepest_snapshot_strictly_inside_of_it():
    cache = Cache()
    cache.add(1, 2)
    cache.add(1, 2, 3, 4)
    assert cache.tree.match(text(1, 2, 3, 4, rest=1)).depth == 4
    assert cache.tree.match(text(1, 2, 3, 4)).depth == 2  # its last token is to be run
    assert cache.tree.match(text(1, 2, rest=1)).depth == 2
    assert cache.tree.match(text(1, 2)).depth == 0
    assert cache.tree.match(text(2, 1, rest=1)).path == ()


def test_keys_without_a_state_are_matched_but_not_gone_on_from():
    cache = Cache()
    cache.add(1, 2)
    cache.add(1, 2, 3, snapshot=False)
    match = cache.tree.match(text(1, 2, 3, 7))
    assert (match.depth, len(match.path)) == (2, 3)


def test_equal_pages_are_kept_once():
    cache = Cache()
    cache.add(1, 2)
    cache.add(1, 2)
    cache.add(1, 3)
    assert cache.tree.pages == 3
    assert cache.pool.free == 13
    assert cache.tree.cached_snapshots == 2


def test_the_least_recently_used_leaf_leaves_first_with_its_snapshot():
    cache = Cache()
    cache.add(1, 2)
    cache.add(1, 3)
    cache.hit(text(1, 2, rest=1))
    assert cache.tree.evict_page()  # 1, 3
    assert cache.tree.match(text(1, 3, rest=1)).depth == 0
    assert cache.tree.match(text(1, 2, rest=1)).depth == 2
    assert cache.tree.snapshots.free == 3
    assert cache.tree.evict_page()
    assert cache.tree.evict_page()
    assert not cache.tree.evict_page()
    assert (cache.tree.pages, cache.pool.free, cache.tree.snapshots.free) == (0, 16, 4)


def test_a_page_that_a_row_has_never_leaves():
    cache = Cache()
    cache.add(1, 2)
    node, pages = cache.tree.use(cache.tree.match(text(1, 2, rest=1)))
    assert cache.tree.evictable == 0
    assert not cache.tree.evict_page()
    cache.tree.unpin(node)
    for page in pages:
        cache.pool.release(page)
    assert cache.tree.evictable == 2
    assert cache.tree.evict_page()


def test_snapshots_leave_apart_and_only_the_one_that_was_used_counts_as_used():
    """Refreshing a whole path keeps every turn of one chat and evicts the others (sglang PR 31643)."""
    cache = Cache(snapshots=3)
    cache.add(1)
    cache.add(1, 2)
    other = cache.add(7)
    cache.hit(text(1, 2, rest=1))  # the state behind 1 is on the way, and was not used
    assert cache.tree.place_for_snapshot() is not None
    assert cache.tree.match(text(1, rest=1)).depth == 0  # the pages stay
    assert len(cache.tree.match(text(1, 2, rest=1)).path) == 2
    assert other.snapshot is not None
    assert cache.tree.place_for_snapshot() is not None
    assert other.snapshot is None
    assert cache.tree.match(text(1, 2, rest=1)).depth == 2


def test_a_snapshot_that_is_there_is_not_replaced():
    cache = Cache()
    node = cache.add(1, 2)
    kept = node.snapshot
    place = cache.tree.place_for_snapshot()
    assert place is not None
    cache.tree.keep(node, place)
    assert node.snapshot == kept
    assert cache.tree.snapshots.free == 3


def test_without_room_for_snapshots_there_is_none():
    assert Cache(snapshots=0).tree.place_for_snapshot() is None


def test_a_long_text_needs_no_recursion():
    cache = Cache(pages=5000, snapshots=1)
    cache.add(*range(5000))
    assert cache.hit(text(*range(5000), rest=1)) == 5000
    for _ in range(5000):
        assert cache.tree.evict_page()
    assert cache.pool.free == 5000


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_find_what_was_left(seed):
    """Against a plain set of the beginnings that were kept."""
    rng = np.random.default_rng(seed)
    cache = Cache(pages=300, snapshots=100)
    kept: set[tuple[int, ...]] = set()
    for _ in range(40):
        pages = tuple(int(p) for p in rng.integers(0, 3, rng.integers(1, 6)))
        if rng.random() < 0.5:
            cache.add(*pages)
            kept.add(pages)
        else:
            expected = max((n for n in range(1, len(pages) + 1) if pages[:n] in kept), default=0)
            assert cache.hit(text(*pages, rest=1)) == expected

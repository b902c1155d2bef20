"""The prefix cache of one data rank: which pages hold the keys of which beginnings of texts.

A node is one full page of tokens behind those of its parent (a radix tree whose edges are pages; the idea is
RadixAttention, Zheng et al., arXiv:2312.07104). Keys can be cut at any page's border, a recurrent state only
where it was kept: so a node may hold a *snapshot* of the states behind its last token, and a text finds its
way back to the deepest node on its path that has one.

Pages and snapshots have budgets of their own and leave apart, the one that was used least recently first.
Only
the snapshot that a text goes on from counts as used, not those on its way: else every turn of a chat would
stay as long as its newest one, and other chats would go instead. Time is a counter, so that every process of
a mesh takes the same decisions.
"""

import dataclasses
import heapq

import numpy as np

from qwen_moe_jax.engine.pages import PagePool, PlacePool


@dataclasses.dataclass(eq=False)
class Node:
    """A page of tokens.

    Attributes:
        key: the bytes of its tokens.
        page: that holds their keys and values; the tree is one of its owners.
        parent: None for the root, which has no page.
        depth: pages from the root, this one counted.
        children: by the bytes of their tokens.
        snapshot: of the states behind its last token, or None.
        pins: rows whose text begins with it. Those of a node are pins of all nodes on its path too.
        used, snapshot_used: when.
        alive: it is in the tree.
    """

    key: bytes
    page: int
    parent: "Node | None"
    depth: int
    children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict)
    snapshot: int | None = None
    pins: int = 0
    used: int = 0
    snapshot_used: int = 0
    alive: bool = True


@dataclasses.dataclass(frozen=True)
class Match:
    """What a text finds.

    Attributes:
        path: the nodes whose pages it begins with, from the first page on.
        depth: how many of them it can go on from: those down to the deepest snapshot; 0 for none.
    """

    path: tuple[Node, ...]
    depth: int

    @property
    def snapshot(self) -> int | None:
        """To go on from."""
        return self.path[self.depth - 1].snapshot if self.depth else None


class PrefixTree:
    """See the module.

    Attributes:
        page_length: tokens a page.
        pool: that the pages belong to.
        snapshots: the places that snapshots take.
        pages: how many pages the tree owns.
        evictable: how many of them no row pins, so that `evict_page` could free them one after the other.
    """

    def __init__(self, page_length: int, pool: PagePool, snapshots: int):
        self.page_length = page_length
        self.pool = pool
        self.snapshots = PlacePool(snapshots)
        self.pages = 0
        self.evictable = 0
        self.root = Node(b"", -1, None, 0)
        self._clock = 0
        # (when used, order, node) of leaves, and of nodes with snapshots; entries that no longer hold are
        # passed over when they come up
        self._leaves: list[tuple[int, int, Node]] = []
        self._kept: list[tuple[int, int, Node]] = []
        self._order = 0

    @property
    def cached_snapshots(self) -> int:
        """Snapshots that nodes hold."""
        return sum(node.snapshot is not None for node in self.nodes())

    def nodes(self) -> list[Node]:
        """All but the root, parents first."""
        found, todo = [], list(self.root.children.values())
        while todo:
            node = todo.pop()
            found.append(node)
            todo += node.children.values()
        return found

    def match(self, tokens: np.ndarray) -> Match:
        """What a text finds, strictly inside of it: its last token is always to be run.

        Args:
            tokens: int32 [tokens].
        """
        path: list[Node] = []
        node, depth = self.root, 0
        for number in range((len(tokens) - 1) // self.page_length):
            found = node.children.get(self._key(tokens, number))
            if found is None:
                break
            path.append(found)
            node = found
            if found.snapshot is not None:
                depth = found.depth
        return Match(tuple(path), depth)

    def use(self, match: Match) -> tuple[Node, list[int]]:
        """Takes what a match can go on from: its path is pinned, its pages get one owner more, and its
        snapshot counts as used now.

        Returns:
            (the node that it goes on from, the root for none; the pages down to it).
        """
        self._clock += 1
        path = match.path[: match.depth]
        node = self.root
        for node in path:
            self.pool.share(node.page)
            self._pin(node)
            self._touch(node)
        if path:
            node.snapshot_used = self._clock
            self._push(self._kept, self._clock, node)
        return node, [each.page for each in path]

    def insert(self, tokens: np.ndarray, pages: list[int], behind: Node) -> Node:
        """Adds a row's pages that are not there yet, and pins the way down to the last of them.

        Args:
            tokens: whole pages of a text, from its beginning.
            pages: that hold them, in order. The tree becomes an owner of each that it takes; where it has a
                page of the same tokens it keeps its own.
            behind: what the row has pinned so far, on the way.

        Returns:
            what the row has pinned now.
        """
        self._clock += 1
        node = behind
        for number in range(behind.depth, len(tokens) // self.page_length):
            key = self._key(tokens, number)
            found = node.children.get(key)
            if found is None:
                self.pool.share(pages[number])
                self.pages += 1
                self.evictable += 1
                found = Node(key, pages[number], node, node.depth + 1)
                node.children[key] = found
            self._pin(found)
            self._touch(found)
            node = found
        return node

    def unpin(self, node: Node) -> None:
        """A row lets go of a node and all on its path."""
        while node.parent is not None:
            node.pins -= 1
            self.evictable += node.pins == 0
            node = node.parent

    def keep(self, node: Node, snapshot: int) -> None:
        """Gives a node the snapshot of its states; one that it has already stays, and this one is freed."""
        if node.snapshot is not None or not node.alive:
            self.snapshots.release(snapshot)
            return
        self._clock += 1
        node.snapshot, node.snapshot_used = snapshot, self._clock
        self._push(self._kept, self._clock, node)

    def place_for_snapshot(self) -> int | None:
        """A place to put a snapshot in, which may cost the one that was used least recently; None if all are
        being made."""
        place = self.snapshots.allocate()
        while place is None and self._kept:
            used, _, node = heapq.heappop(self._kept)
            if node.alive and node.snapshot is not None and node.snapshot_used == used:
                place, node.snapshot = node.snapshot, None
        return place

    def evict_page(self) -> bool:
        """Gives up the page that was used least recently, of those that no row pins and none is behind; False
        if there is none."""
        passed, done = [], False
        while self._leaves and not done:
            entry = heapq.heappop(self._leaves)
            used, _, node = entry
            if not node.alive or node.children or node.used != used:
                continue  # said of it before something changed
            if node.pins:
                passed.append(entry)
            else:
                self._drop(node)
                done = True
        for entry in passed:
            heapq.heappush(self._leaves, entry)
        return done

    def forget(self, node: Node) -> None:
        """Gives up a node and those on its path that neither a row nor another text needs."""
        while node.parent is not None and node.alive and not node.children and not node.pins:
            parent = node.parent
            self._drop(node)
            node = parent

    def _pin(self, node: Node) -> None:
        self.evictable -= node.pins == 0
        node.pins += 1

    def _drop(self, node: Node) -> None:
        if node.snapshot is not None:
            self.snapshots.release(node.snapshot)
            node.snapshot = None
        node.alive = False
        self.pages -= 1
        self.evictable -= 1
        self.pool.release(node.page)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if parent.parent is not None and not parent.children:
            self._push(self._leaves, parent.used, parent)

    def _touch(self, node: Node) -> None:
        node.used = self._clock
        if not node.children:
            self._push(self._leaves, node.used, node)

    def _push(self, heap: list[tuple[int, int, Node]], when: int, node: Node) -> None:
        self._order += 1
        heapq.heappush(heap, (when, self._order, node))

    def _key(self, tokens: np.ndarray, number: int) -> bytes:
        length = self.page_length
        return np.ascontiguousarray(tokens[number * length : (number + 1) * length], np.int32).tobytes()

"""Who owns what of a device pool: pages that rows share by counted references, and places with one owner."""


class PagePool:
    """Pages of one data rank, each with the number of its owners: rows and the prefix tree.

    Attributes:
        pages: how many there are.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._owners = [0] * pages
        # taken from the end: the first page first, so that a pool that is hardly used touches little memory
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many own a page."""
        return self._owners[page]

    def allocate(self) -> int | None:
        """A free page, now with one owner; None if there is none."""
        if not self._free:
            return None
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One owner more of a page that has one.

        Raises:
            ValueError: it has none.
        """
        if not self._owners[page]:
            raise ValueError(f"page {page} has no owner to share it with")
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """One owner less; the last one frees it.

        Raises:
            ValueError: it has none.
        """
        if not self._owners[page]:
            raise ValueError(f"page {page} has no owner that could give it back")
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)


class PlacePool:
    """Numbers from 0 that have one owner each: slots, or snapshots.

    Attributes:
        size: how many there are.
    """

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._taken = [False] * size

    @property
    def free(self) -> int:
        """How many have no owner."""
        return len(self._free)

    def allocate(self) -> int | None:
        """A free number; None if there is none."""
        if not self._free:
            return None
        place = self._free.pop()
        self._taken[place] = True
        return place

    def release(self, place: int) -> None:
        """Gives a number back.

        Raises:
            ValueError: it is free.
        """
        if not self._taken[place]:
            raise ValueError(f"place {place} is free already")
        self._taken[place] = False
        self._free.append(place)

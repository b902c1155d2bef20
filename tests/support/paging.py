"""Contiguous keys and values put into pages, in any order, with NaN wherever no row has written."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Paged:
    """Attributes:
    pools: keys and values [pages, page length, kv_heads, head_dim].
    tables: int32 [batch, width]; behind a row's last page there is an id that no page has.
    """

    pools: tuple[Any, Any]
    tables: Any

    def places(self, row: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(pages, places in them) of a row's first tokens."""
        page = self.pools[0].shape[1]
        positions = np.arange(tokens)
        return np.asarray(self.tables)[row, positions // page], positions % page

    def row(self, pool: Any, row: int, tokens: int) -> np.ndarray:
        """A row's first tokens of one of the pools, one behind the other."""
        return np.asarray(pool)[self.places(row, tokens)]


def in_pages(key: Any, value: Any, page: int, lengths: Any, *, seed: int = 0, room: int = 0) -> Paged:
    """Keys and values [batch, capacity, kv_heads, head_dim], of which a row has `lengths` [batch], in pages.

    Args:
        key, value: see above.
        page: tokens of one.
        lengths: tokens of each row.
        seed: of the pages' order.
        room: tokens that each row has pages for beyond its own.
    """
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    wanted = -(-(lengths + room) // page)
    width, pages = int(wanted.max()) + 1, int(wanted.sum()) + 3
    order = iter(rng.permutation(pages))
    tables = np.full((len(lengths), width), pages, np.int32)
    for row, count in enumerate(wanted):
        tables[row, :count] = [next(order) for _ in range(count)]
    pools = []
    for given in (key, value):
        pool = np.full((pages, page, *given.shape[2:]), np.nan, np.asarray(given).dtype)
        for row, length in enumerate(lengths):
            positions = np.arange(length)
            pool[tables[row, positions // page], positions % page] = np.asarray(given)[row, :length]
        pools.append(jnp.asarray(pool))
    return Paged((pools[0], pools[1]), jnp.asarray(tables))

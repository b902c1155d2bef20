"""Slots sorted by their group and cut into tiles of one group each."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which slots each tile holds. There is room for as many tiles as any routing needs; those in excess are
    empty (start == stop).

    Attributes:
        slots: int32 [slots + rows], slot numbers sorted by group, those without a group behind them.
        group: int32 [tiles].
        start, stop: int32 [tiles], the tile's part of `slots`.
        rows: slots a tile has room for.
        expected_slots: slots with a group, on average, for costs.
    """

    slots: jax.Array
    group: jax.Array
    start: jax.Array
    stop: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    expected_slots: float = dataclasses.field(metadata={"static": True})

    def expected(self, groups: float) -> float:
        """How many tiles hold a slot, on average, where `groups` groups have any: a group's last tile is half
        full on average."""
        return max(groups, self.expected_slots / self.rows + groups / 2)


def sort_into_tiles(groups_of_slots: jax.Array, groups: int, rows: int, expected_slots: float) -> Tiles:
    """Tiles of at most `rows` slots of one group, in the order of groups and, within one, of slots.

    Args:
        groups_of_slots: int32 [slots]; `groups` or more means that the slot has none.
        groups: how many there are.
        rows: a power of two, 16 or more.
        expected_slots: see `Tiles`.
    """
    slots = groups_of_slots.shape[0]
    order = jnp.argsort(groups_of_slots, stable=True).astype(jnp.int32)
    counts = jnp.zeros(groups, jnp.int32).at[groups_of_slots].add(1, mode="drop")
    first = jnp.cumsum(counts) - counts
    tiles = -(-counts // rows)
    last = jnp.cumsum(tiles)
    # each group that has slots has one tile that need not be full
    most = min(slots, groups) + slots // rows
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), groups - 1).astype(jnp.int32)
    within = (number - (last[group] - tiles[group])) * rows
    used = number < last[-1]
    start = jnp.where(used, first[group] + within, 0)
    stop = jnp.where(used, first[group] + jnp.minimum(within + rows, counts[group]), 0)
    return Tiles(
        slots=jnp.pad(order, (0, rows)),
        group=group,
        start=start.astype(jnp.int32),
        stop=stop.astype(jnp.int32),
        rows=rows,
        expected_slots=expected_slots,
    )

"""Dividing dimensions: everything is somewhere, once where it should be, and queries find their keys."""

import numpy as np
import pytest

from qwen_moe_jax.parallel.splits import Section, Split, divide_heads


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("units", [1, 2, 3, 6, 8, 67])
def test_consecutive_units_are_each_on_one_rank(units: int, ranks: int) -> None:
    width = 3
    split = Split(("expert",), (Section.even(units, ranks, width), Section.even(units, ranks, width)))
    stored = np.arange(2 * units * width)
    seen = []
    for rank in range(ranks):
        local = np.full(split.local_size, -1)
        for source, place in split.spans(rank):
            local[place] = stored[source]
        first, second = np.split(local, 2)  # both sections lie alike in every rank's part
        np.testing.assert_array_equal(np.where(first < 0, -1, first + units * width), second)
        seen += local[local >= 0].tolist()
    assert sorted(seen) == stored.tolist()
    assert split.size == ranks * split.local_size


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize(
    "heads", [(1, 1), (4, 2), (6, 3), (16, 2), (9, 3), (32, 2), (12, 1), (64, 16), (5, 5)]
)
def test_every_query_head_is_on_one_rank_with_the_key_head_it_reads(
    heads: tuple[int, int], ranks: int
) -> None:
    queries, keys = heads
    plan = divide_heads(queries, keys, ranks)
    group = queries // keys
    local_group = plan.queries // plan.keys  # what the model on a rank takes its heads to be
    assert plan.queries % plan.keys == 0
    held = []
    for query_start, key_start in zip(plan.query_starts, plan.key_starts, strict=True):
        for local in range(plan.queries):
            query = query_start + local
            if query < queries:
                held.append(query)
                assert key_start + local // local_group == query // group
    assert held == list(range(queries))


def test_the_397b_divides_without_waste() -> None:
    """32 query heads on 2 key/value heads, 64 value heads on 16 key heads, over 8 ranks."""
    attention, delta = divide_heads(32, 2, 8), divide_heads(64, 16, 8)
    assert (attention.queries, attention.keys) == (4, 1)
    assert attention.key_starts == (0, 0, 0, 0, 1, 1, 1, 1)
    assert (delta.queries, delta.keys) == (8, 2)

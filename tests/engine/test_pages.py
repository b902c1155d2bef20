"""Pages with counted owners, and places with one."""

import pytest

from qwen_moe_jax.engine.pages import PagePool, PlacePool


def test_a_page_is_free_again_when_its_last_owner_gives_it_back():
    pool = PagePool(2)
    first, second = pool.allocate(), pool.allocate()
    assert {first, second} == {0, 1}
    assert pool.allocate() is None
    assert first is not None
    pool.share(first)
    pool.release(first)
    assert pool.free == 0
    pool.release(first)
    assert pool.free == 1
    assert pool.allocate() == first


def test_a_page_without_an_owner_is_neither_shared_nor_given_back():
    pool = PagePool(1)
    for call in (pool.share, pool.release):
        with pytest.raises(ValueError, match="page 0 has no owner"):
            call(0)


def test_the_first_pages_are_used_first():
    pool = PagePool(100)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]


def test_a_place_has_one_owner():
    pool = PlacePool(2)
    places = [pool.allocate(), pool.allocate()]
    assert sorted(places) == [0, 1]
    assert pool.allocate() is None
    pool.release(1)
    with pytest.raises(ValueError, match="place 1 is free already"):
        pool.release(1)
    assert (pool.free, pool.allocate()) == (1, 1)

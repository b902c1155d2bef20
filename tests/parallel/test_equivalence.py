"""Every layout says what one device says: as close to the float64 truth, the same greedy tokens."""

from typing import Any

import pytest
from support.layouts import Layout, drawn, layouts, name
from support.meshes import assert_as_one_device, assert_on_average_as_one_device, mesh_case, on_mesh, run

# Two layers (Gated DeltaNet, attention) of 6 query heads on 3, 4 value heads on 1, 8 experts top-3 with a
# shared one as wide, 67 tokens: next to nothing is divided evenly by 4 or 8.
SEED = 22


def check(seed: int, layout: Layout) -> None:
    case = mesh_case(seed)
    found = run(on_mesh(seed, **layout), case.rows)
    assert_as_one_device(case, found)


# Each axis alone and together, every mode in both dispatches, attention data parallelism with tensor
# parallelism inside (the layout that broke a peer), and meshes of 3 and 6 devices, which divide nothing
# evenly.
COVERING = [
    (1, 2, 2, "sharded", "psum", "tensor"),
    (1, 2, 2, "outside", "psum", "data"),
    (1, 8, 1, "fused", "psum", "tensor"),
    (2, 2, 2, "prescaled", "all_to_all", "tensor"),
    (1, 2, 2, "fused", "all_to_all", "data"),
    (1, 2, 4, "prescaled", "psum", "data"),
    (4, 1, 2, "sharded", "psum", "tensor"),
    (1, 3, 1, "sharded", "psum", "tensor"),
    (1, 2, 3, "outside", "all_to_all", "tensor"),
]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(parts, marks=pytest.mark.slow if i > 2 else ()) for i, parts in enumerate(COVERING)],
    ids=lambda parts: "-".join(map(str, parts)),
)
def test_a_layout_equals_one_device(layout: tuple[Any, ...]) -> None:
    keys = ("data", "expert", "tensor", "shared_expert", "expert_dispatch", "attention")
    check(SEED, dict(zip(keys, layout, strict=True)))


EVERY = layouts((1, 2, 4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [one for one in EVERY if one["attention"] == "tensor"], ids=name)
def test_every_layout_equals_one_device(layout: Layout) -> None:
    check(SEED, layout)


# A third of them: the steps share no factor with the eight combinations of mode and dispatch.
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [one for one in EVERY if one["attention"] == "data"][::3] + layouts((3, 6))[::5], ids=name
)
def test_data_parallel_attention_and_odd_meshes_equal_one_device(layout: Layout) -> None:
    check(SEED, layout)


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=pytest.mark.slow if s != 4 else ()) for s in range(36)]
)
def test_random_configurations_on_random_layouts_equal_one_device(seed: int) -> None:
    case = mesh_case(seed)
    found = run(on_mesh(seed, **drawn(seed)), case.rows)
    assert_on_average_as_one_device(case, found)

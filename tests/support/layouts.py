"""Every way in which a model can lie on so many devices."""

import itertools
from typing import Any

import numpy as np

from support.configs import random_config
from support.meshes import factorisations

MODES = ("prescaled", "outside", "sharded", "fused")
DISPATCHES = ("psum", "all_to_all")

Layout = dict[str, Any]


def layouts(sizes: tuple[int, ...]) -> list[Layout]:
    """Every factorisation x mode x dispatch, and attention data parallelism where that is another layout."""
    found = []
    for devices, mode, dispatch in itertools.product(sizes, MODES, DISPATCHES):
        for data, expert, tensor in factorisations(devices):
            for attention in ("tensor", "data") if expert > 1 else ("tensor",):
                found.append(
                    {
                        "data": data,
                        "expert": expert,
                        "tensor": tensor,
                        "shared_expert": mode,
                        "expert_dispatch": dispatch,
                        "attention": attention,
                    }
                )
    return found


def name(layout: Layout) -> str:
    sizes = "x".join(str(layout[axis]) for axis in ("data", "expert", "tensor"))
    return f"{sizes}-{layout['shared_expert']}-{layout['expert_dispatch']}-{layout['attention']}"


def drawn(seed: int) -> Layout:
    """A random layout for a seed's configuration."""
    rng = np.random.default_rng(seed)
    config = random_config(seed)
    fusable = config["moe_intermediate_size"] == config["shared_expert_intermediate_size"]
    choices = [
        layout for layout in layouts((2, 3, 4, 5, 6, 7, 8)) if fusable or layout["shared_expert"] != "fused"
    ]
    return choices[rng.integers(len(choices))]

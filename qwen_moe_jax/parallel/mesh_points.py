"""Points of a model on a mesh: how their values are divided, and which edits mean there what they mean on one
device."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.points import Point, points_of
from qwen_moe_jax.model.taps import Edit, Routing
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.splits import Section

# Axis of a point -> the logical axis of the sharding table whose units it counts.
_HEADS = {"head": "query", "kv_head": "kv", "value_head": "value_head"}
_ROUTING = ("router", "router_logits")


def point_specs(layout: Layout, wanted: Iterable[str]) -> dict[str, Any]:
    """Point -> the mesh axes of its value's dimensions."""
    points, found = points_of(layout.config), {}
    for name in sorted(wanted):
        spec: Any = PartitionSpec(*(_mesh_axes(layout, axis) for axis in points[name].axes))
        found[name] = Routing(ids=spec, weights=spec) if name.endswith(".router") else spec
    return found


def _mesh_axes(layout: Layout, axis: str) -> Any:
    if axis == "batch":
        return layout.batch_axes or None
    return (layout.head_axes or None) if axis in _HEADS else None


def in_order(layout: Layout, name: str, value: Any) -> Any:
    """A captured value whose heads stand as on one device: each once, without the room that ranks have."""
    point: Point = points_of(layout.config)[name]
    for dimension, axis in enumerate(point.axes):
        if axis in _HEADS and layout.head_axes:
            places = _places(layout.splits[_HEADS[axis]].sections[0])
            value = jax.tree.map(lambda x, d=dimension, p=places: jnp.take(x, p, axis=d), value)
    return value


def _places(section: Section) -> np.ndarray:
    """Where each unit lies among those of all ranks behind one another."""
    places = np.zeros(section.units, np.int32)
    for rank, start in enumerate(section.starts):
        for unit in range(start, min(start + section.held, section.units)):
            places[unit] = rank * section.held + unit - start
    return places


def check_edits(layout: Layout, edits: Mapping[str, Edit]) -> None:
    """Raises InputError unless each edit means on every rank what it means on one device."""
    points = points_of(layout.config)
    for name in edits:
        if layout.mesh.size > 1 and not points[name].whole:
            raise InputError(
                f"{name} is divided among the ranks of the mesh, so an edit would see a part of it; load the "
                "model without mesh."
            )
        dispatched = layout.expert_dispatch != "psum" or layout.exact or "expert" in layout.batch_axes
        if name.rpartition(".")[2] in _ROUTING and dispatched:
            raise InputError(
                f"{name} can be edited on a mesh with expert_dispatch='psum', attention='tensor' and without "
                f"exact only, and this is a {layout}."
            )

"""The mesh: which devices compute together, along three named axes.

`data` holds other rows of the batch, `expert` other experts, `tensor` other slices of every matrix.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from qwen_moe_jax.errors import InputError

DATA, EXPERT, TENSOR = "data", "expert", "tensor"
AXES = (DATA, EXPERT, TENSOR)

AnyMesh = TypeVar("AnyMesh", bound=Mesh | AbstractMesh)


def make_mesh(
    data: int = 1, expert: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of data x expert x tensor devices; neighbours along `tensor` are neighbours in `devices`.

    Args:
        data: groups of devices that each hold the whole model and other rows of the batch.
        expert: ranks that the experts are divided among.
        tensor: ranks that every head, expert and vocabulary row group is divided among.
        devices: of JAX, default all of them, in every process.

    Raises:
        InputError: a size that is not a positive integer, or other than exactly as many devices.
    """
    sizes = _checked(data, expert, tensor)
    wanted = prod(sizes.values())
    available = list(jax.devices() if devices is None else devices)
    shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if wanted > len(available):
        hint = ""
        if devices is None and available[0].platform == "cpu":
            hint = (
                f' On a CPU, jax.config.update("jax_num_cpu_devices", {wanted}) before the first use of JAX '
                "makes that many to try a layout with."
            )
        raise InputError(
            f"the mesh {shape} needs {wanted} devices, and there are {len(available)}; give smaller axes "
            f"or more devices.{hint}"
        )
    if jax.process_count() > 1 and wanted != len(available):
        raise InputError(
            f"the mesh {shape} needs {wanted} devices, and the {jax.process_count()} processes have "
            f"{len(available)}; a mesh over several processes takes all of them."
        )
    grid = np.asarray(available[:wanted], dtype=object).reshape(data, expert, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(data: int = 1, expert: int = 1, tensor: int = 1) -> AbstractMesh:
    """The shape of a mesh without devices, to calculate with.

    Raises:
        InputError: a size that is not a positive integer.
    """
    sizes = _checked(data, expert, tensor)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(mesh: AnyMesh) -> AnyMesh:
    """The mesh, if it has this library's axes.

    Raises:
        InputError: something else.
    """
    is_mesh = isinstance(mesh, (Mesh, AbstractMesh))
    if not is_mesh or tuple(mesh.axis_names) != AXES:
        given = f"a mesh with axes {mesh.axis_names}" if is_mesh else f"a {type(mesh).__name__}"
        raise InputError(f"mesh is {given}; expected one from make_mesh(data=, expert=, tensor=).")
    return mesh


def _checked(data: Any, expert: Any, tensor: Any) -> dict[str, int]:
    sizes = {DATA: data, EXPERT: expert, TENSOR: tensor}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError(f"the mesh axis {name} is {size!r}; expected a positive integer.")
    return sizes

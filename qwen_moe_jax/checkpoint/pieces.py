"""How parameters and the tensors of a file are made of each other."""

import dataclasses
from functools import cached_property

from qwen_moe_jax.checkpoint.fused_rows import fused_tensor
from qwen_moe_jax.checkpoint.names import matrix_name
from qwen_moe_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of the file that is a part of a parameter.

    Attributes:
        name: its canonical name.
        shape: of what it has of the parameter.
        origin: index of its first element in the parameter, which may have more, leading dimensions.
        first: row of the tensor that it begins in, where the tensor holds more than the piece.
        rows: of the tensor; None where the piece is all of it.
    """

    name: str
    shape: tuple[int, ...]
    origin: tuple[int, ...]
    first: int = 0
    rows: int | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Where it lies in the parameter: one slice a dimension, of one element in those it lacks."""
        extent = (1,) * (len(self.origin) - len(self.shape)) + self.shape
        return tuple(slice(o, o + n) for o, n in zip(self.origin, extent, strict=True))


def whole_piece(name: str, shape: tuple[int, ...]) -> Piece:
    """A parameter that is one tensor."""
    return Piece(name, shape, (0,) * len(shape))


def expert_pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """What a fused expert stack is made of in the layout of one matrix an expert; [] for other parameters.

    Args:
        name: canonical name.
        shape: of the parameter, [experts, out, in], or of its scales.
    """
    if ".experts." not in name:
        return []
    stack, projection = name.rsplit(".", 1)
    ending = projection[len(matrix_name(projection)) :]
    projection = matrix_name(projection)
    if projection not in ("gate_up_proj", "down_proj"):
        return []  # a matrix of one expert
    experts, out, width = shape
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    part_shape = (out // len(parts), width)
    return [
        Piece(f"{stack}.{expert}.{part}.weight{ending}", part_shape, (expert, i * part_shape[0], 0))
        for expert in range(experts)
        for i, part in enumerate(parts)
    ]


def fused_pieces(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The rows of a fused tensor that a parameter is made of; [] for a parameter that is stored by itself.

    Args:
        config: of the text model.
        name: canonical, of a parameter or of its scales or zero points.
        shape: of it.
    """
    fused, rest = fused_tensor(config, name), shape[1:]
    if fused is None:
        return []
    return [
        Piece(fused.name, (run.count, *rest), (run.first, *(0 for _ in rest)), run.place, fused.rows)
        for run in fused.runs
        if run.name == name
    ]


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a file that parameters are written to.

    Attributes:
        name: its canonical name.
        shape: in elements of the parameters.
        boxes: (parameter, box of it), behind one another in the rows.
    """

    name: str
    shape: tuple[int, ...]
    boxes: tuple[tuple[str, tuple[slice, ...]], ...]


def file_tensors(
    config: ModelConfig, name: str, shape: tuple[int, ...], *, split_experts: bool
) -> list[FileTensor]:
    """The tensors that a parameter goes to; [] where those of an earlier parameter hold it.

    Args:
        config: of the text model.
        name: canonical.
        shape: of the parameter.
        split_experts: experts become one matrix each.
    """
    fused = fused_tensor(config, name)
    if fused is None:
        pieces = (expert_pieces(name, shape) if split_experts else []) or [whole_piece(name, shape)]
        return [FileTensor(piece.name, piece.shape, ((name, piece.box),)) for piece in pieces]
    if name != fused.runs[0].name:
        return []
    rest = tuple(slice(0, n) for n in shape[1:])
    boxes = tuple((run.name, (slice(run.first, run.first + run.count), *rest)) for run in fused.runs)
    # where there is one scale, it is that of all
    return [FileTensor(fused.name, (fused.rows, *shape[1:]), boxes[:1] if fused.rows == 1 else boxes)]

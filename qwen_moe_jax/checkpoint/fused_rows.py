"""Projections of Gated DeltaNet that Qwen3-Next stores fused, head by head.

`linear_attn.in_proj_qkvz` holds for each key head its query, its key, the values of its value heads and
their output gates z, one behind another; `linear_attn.in_proj_ba` the betas and decays of its value heads.
The model holds `in_proj_qkv` (all queries, then keys, then values), `in_proj_z`, `in_proj_b` and `in_proj_a`.
Source: `Qwen3NextGatedDeltaNet.fix_query_key_value_ordering` of transformers 5.23.0.
"""

import dataclasses
from typing import NamedTuple

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError

_FUSED = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
_FUSED_OF = {part: fused for fused, parts in _FUSED.items() for part in parts}


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows of a parameter that lie together in a fused tensor.

    Attributes:
        name: of the parameter, canonical.
        first: of them, in the parameter.
        count: rows.
        place: row of the fused tensor that they begin in.
    """

    name: str
    first: int
    count: int
    place: int


@dataclasses.dataclass(frozen=True)
class FusedTensor:
    """A tensor that holds several parameters.

    Attributes:
        name: canonical.
        rows: of it.
        runs: what it is made of, in the order of its rows.
    """

    name: str
    rows: int
    runs: tuple[Run, ...]


def fused_name(config: ModelConfig, name: str) -> str | None:
    """The canonical name of the fused tensor that a parameter is stored in, or None if it is not fused.

    Args:
        config: of the text model.
        name: canonical, of a matrix or of its scales or zero points, whose fused tensor's are meant then.
    """
    found = _split(config, name)
    return found and f"{found.layer}.linear_attn.{found.fused}{found.ending}"


def fused_members(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The parameters that are stored in one tensor with this one, itself among them, in their order there."""
    found = _split(config, name)
    if found is None:
        return (name,)
    return tuple(f"{found.layer}.linear_attn.{part}{found.ending}" for part in _FUSED[found.fused])


def fused_tensor(config: ModelConfig, name: str) -> FusedTensor | None:
    """The tensor that a parameter is stored in, or None if it is not fused.

    Args:
        config: of the text model.
        name: as of `fused_name`; of scales there may be one for several rows.

    Raises:
        CheckpointError: a scale is shared by rows of more than one of them.
    """
    found, fused, members = _split(config, name), fused_name(config, name), fused_members(config, name)
    if found is None or fused is None:
        return None
    key, values = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
    each = values * config.linear_value_head_dim
    # of the first head: (which member, first row of it, rows)
    order = {
        "in_proj_ba": ((0, 0, values), (1, 0, values)),
        "in_proj_qkvz": ((0, 0, key), (0, config.key_dim, key), (0, 2 * config.key_dim, each), (1, 0, each)),
    }[found.fused]
    whole, shared = config.linear_num_key_heads * sum(count for *_, count in order), 1
    if found.ending != ".weight" and config.quantization is not None:
        scheme = config.quantization.scheme(f"{found.layer}.linear_attn.{found.fused}", "model.")
        shared = scheme.group[0] if scheme is not None else 1
        if not shared or shared >= whole:  # one scale for all of the fused tensor
            return FusedTensor(fused, 1, tuple(Run(member, 0, 1, 0) for member in members))
    if any(count % shared or first % shared for _, first, count in order):
        counts = ", ".join(str(count) for _, _, count in order)
        raise CheckpointError(
            f"{fused} has one scale for {shared} rows, while a head has {counts} "
            "rows of what is fused in it; only scales that each belong to one of these are read and written. "
            "Leave the matrix unquantised."
        )
    runs, place = [], 0
    for head in range(config.linear_num_key_heads):
        for which, first, count in order:
            runs.append(Run(members[which], (first + head * count) // shared, count // shared, place))
            place += count // shared
    return FusedTensor(fused, place, tuple(runs))


class _Split(NamedTuple):
    layer: str
    fused: str
    ending: str


def _split(config: ModelConfig, name: str) -> _Split | None:
    if not config.family.fused_delta_net:
        return None
    layer, _, inside = name.partition(".linear_attn.")
    part, weight, ending = inside.partition(".weight")
    fused = _FUSED_OF.get(part)
    return None if fused is None else _Split(layer, fused, weight + ending)

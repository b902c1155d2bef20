"""The routed experts' products by Pallas kernels; same signature and result as in `model/experts.py`."""

import jax
import jax.numpy as jnp

from qwen_moe_jax.formats.block_scaled import BlockScaled, Matrix
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.kernels.combine import combine_slots
from qwen_moe_jax.kernels.gathered_matmul import gathered_matmul
from qwen_moe_jax.kernels.grouped_matmul import TileSizes, grouped_matmul
from qwen_moe_jax.kernels.launch import Schedule
from qwen_moe_jax.kernels.tiles import sort_into_tiles

_ROW = TileSizes(columns=16, inner=256, schedule=Schedule(warps=4, stages=2))
# so that a thread loads 16 bytes of packed codes, as it does of codes of a byte
_PACKED_ROW = TileSizes(columns=16, inner=512, schedule=Schedule(warps=4, stages=2))


def gathered_kernels(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    chance: float,
    widening: str,
    interpret: bool,
    by_slot: bool = False,
) -> jax.Array:
    """A slot at a time, without sorting: for a few tokens.

    Args:
        x, expert_ids, weights, gate_up, down: as in `model/experts.py`.
        chance: that an expert is among those of a token, for costs.
        widening, interpret: as of `gathered_matmul`.
        by_slot: return the weighted slots, [tokens, top_k, hidden], instead of their sum.
    """
    slots = expert_ids.reshape(-1)
    expected = x.shape[0] * gate_up.shape[0] * chance

    def product(x: jax.Array, matrix: Matrix, name: str, *, gated: bool, slots_per_row: int) -> jax.Array:
        return gathered_matmul(
            x,
            matrix,
            slots,
            gated=gated,
            slots_per_row=slots_per_row,
            sizes=_PACKED_ROW if _is_packed(matrix) else _ROW,
            expected_slots=expected,
            widening=widening,
            name=name,
            interpret=interpret,
        )

    inner = product(x, gate_up, "gathered_gate_up", gated=True, slots_per_row=expert_ids.shape[1])
    outputs = product(inner, down, "gathered_down", gated=False, slots_per_row=1)
    weighted = _weighted(outputs, expert_ids, weights, gate_up.shape[0])
    return weighted if by_slot else weighted.sum(axis=1)


def grouped_kernels(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    *,
    chance: float,
    widening: str,
    interpret: bool,
    by_slot: bool = False,
) -> jax.Array:
    """Slots sorted by expert, in tiles: for many tokens. Arguments as of `gathered_kernels`."""
    tokens, top_k = expert_ids.shape
    experts = gate_up.shape[0]
    expected = tokens * experts * chance
    rows = tile_rows(tokens * chance)
    tiles = sort_into_tiles(expert_ids.reshape(-1), experts, rows, expected)

    def product(x: jax.Array, matrix: Matrix, name: str, *, gated: bool, slots_per_row: int) -> jax.Array:
        return grouped_matmul(
            x,
            matrix,
            tiles,
            gated=gated,
            slots_per_row=slots_per_row,
            sizes=tile_sizes(rows, codes=isinstance(matrix, BlockScaled)),
            expected_groups=experts * (1 - (1 - chance) ** tokens),
            widening=widening,
            name=name,
            interpret=interpret,
        )

    inner = product(x, gate_up, "grouped_gate_up", gated=True, slots_per_row=top_k)
    outputs = product(inner, down, "grouped_down", gated=False, slots_per_row=1)
    if by_slot:
        return _weighted(outputs, expert_ids, weights, experts)
    total = combine_slots(outputs, expert_ids, weights, experts, expected_slots=expected, interpret=interpret)
    return total.astype(jnp.promote_types(total.dtype, jnp.float32))


def tile_rows(mean: float) -> int:
    """Slots a tile, for experts of `mean` slots on average.

    Half of each expert's last tile is empty on average, so a tile has at most half of an
    expert's slots; at least 16, the least that a matrix unit takes, and at most 128.
    """
    rows = 16
    while rows < 128 and 4 * rows <= mean:
        rows *= 2
    return rows


def _is_packed(matrix: Matrix) -> bool:
    """Whether two columns share a byte."""
    return isinstance(matrix, BlockScaled) and CODES[matrix.codes].packed > 1


def tile_sizes(rows: int, *, codes: bool) -> TileSizes:
    """Columns and steps of a program. Two stages of the tiles of x, gate and up fit into the 64 KiB of LDS of
    gfx942."""
    if rows >= 64:
        return TileSizes(columns=128, inner=64, schedule=Schedule(warps=8, stages=2))
    return TileSizes(columns=64, inner=128 if codes else 64, schedule=Schedule(warps=4, stages=2))


def _weighted(outputs: jax.Array, expert_ids: jax.Array, weights: jax.Array, experts: int) -> jax.Array:
    """Slots [tokens * top_k, hidden] -> each weighted, float32 [tokens, top_k, hidden]; what has no expert is
    zero, whatever lies in its memory."""
    tokens, top_k = expert_ids.shape
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    slots = outputs.reshape(tokens, top_k, -1)
    weighted = (slots * weights[..., None]).astype(wide)
    return jnp.where((expert_ids < experts)[..., None], weighted, 0)

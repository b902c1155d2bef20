"""Starting a Pallas kernel through Triton, typed for `jax.shard_map` and with its cost written down.

XLA sees a kernel as one opaque call. What it costs is therefore said where it is launched, in the call's
metadata, which the reader of a compiled program adds to XLA's own figures.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qwen_moe_jax.kernels.varying import vary_like, varying_axes

COST = "qwen_moe_jax_cost"


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What one call does, where routing or lengths decide, in expectation.

    Attributes:
        flops: two a multiply-add, padding rows and masked blocks included.
        bytes: read and written in the device's memory; what neighbouring programs share is read once.
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How Triton is to build a kernel.

    Attributes:
        warps: of 64 threads on AMD, 32 on NVIDIA.
        stages: of software pipelining of loops; each holds its own tiles in LDS.
    """

    warps: int = 4
    stages: int = 2


def launch(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    name: str,
    cost: KernelCost,
    schedule: Schedule,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Runs a kernel whose references are whole arrays in the device's memory.

    Args:
        kernel: takes a reference to each operand, then to each result.
        operands: inside a `shard_map` they may differ over other mesh axes each.
        results: shapes and dtypes; elements that no program writes mean nothing.
        grid: programs along at most three dimensions, the first one fastest.
        name: in the compiled program.
        cost: of the call.
        schedule: for Triton.
        interpret: evaluate it with XLA instead of compiling it: the same arithmetic on any backend, slowly.
        aliases: operand -> result that takes its memory over.
    """
    # A kernel's results differ wherever one of its operands does, and so do all operands inside it.
    operands = [vary_like(x, *operands) for x in operands]
    varying = jax.sharding.ManualAxisType(varying=varying_axes(operands[0]))
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(r.shape, r.dtype, manual_axis_type=varying) for r in results],
        grid=grid,
        name=name,
        interpret=interpret,
        input_output_aliases=dict(aliases or {}),
        compiler_params=plt.CompilerParams(num_warps=schedule.warps, num_stages=schedule.stages),
        metadata={COST: json.dumps(dataclasses.asdict(cost))},
    )(*operands)

"""What a device of a mesh has to hold, from the configuration alone."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.checkpoint.inspect import size_in_words
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device; `str()` is the printed report.

    Attributes:
        layout: described in words.
        weights: dtype the matrices are held in -> bytes of all parameters.
        sequence: dtype of keys, values and convolution -> bytes of the caches of one row of the batch.
        context: tokens of that row.
    """

    layout: str
    weights: Mapping[str, int]
    sequence: Mapping[str, int]
    context: int

    def __str__(self) -> str:
        weights, sequence = (
            " or ".join(f"{size_in_words(count)} in {dtype}" for dtype, count in sizes.items())
            for sizes in (self.weights, self.sequence)
        )
        return "\n".join(
            [
                f"a device of the {self.layout}",
                f"  weights          {weights}",
                f"  a sequence       {sequence}, of {self.context} tokens",
            ]
        )


def device_memory(
    config: ModelConfig, sizes: tuple[int, int, int], context: int, **choices: Any
) -> DeviceMemory:
    """What one device of a mesh holds.

    Args:
        config: of the model.
        sizes: data, expert and tensor.
        context: tokens of a sequence.
        **choices: attention, shared_expert, expert_dispatch and exact, as of `Layout`; a shared expert that
            is "auto" counts as "prescaled", "outside" if exact, which hold the most.

    Raises:
        InputError: a size or choice that is none.
    """
    if choices.get("shared_expert") == "auto":
        choices["shared_expert"] = "outside" if choices.get("exact") else "prescaled"
    layout = Layout(config, abstract_mesh(*sizes), **choices)
    weights, sequence = {}, {}
    for name in _DTYPES:
        dtype = jnp.dtype(name)
        structs = [t.struct for t in layout.targets(DtypePolicy(compute=dtype, matrix=dtype)).values()]
        weights[name] = sum(_local_bytes(s.sharding.shard_shape(s.shape), s.dtype) for s in structs)
        rows = layout.batch_multiple
        cache = jax.eval_shape(lambda d=dtype, n=rows: layout.empty_cache(n, context, d, d))
        specs = layout.cache_specs()
        local = jax.tree.map(
            lambda array, spec: _local_bytes(layout.sharding(spec).shard_shape(array.shape), array.dtype),
            cache,
            specs,
        )
        sequence[name] = sum(jax.tree.leaves(local))
    return DeviceMemory(str(layout), weights, sequence, context)


def _local_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    return prod(shape) * dtype.itemsize

"""What a device of a mesh has to hold, and what fits beside it, from the configuration alone."""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.checkpoint.inspect import by_component, size_in_words
from qwen_moe_jax.checkpoint.layout import held_in_words
from qwen_moe_jax.checkpoint.parts import mtp_forms, mtp_shapes
from qwen_moe_jax.checkpoint.targets import Target
from qwen_moe_jax.config import FULL_ATTENTION, ModelConfig
from qwen_moe_jax.devices import Device
from qwen_moe_jax.formats.cache import PAGE, KVCache, pages_for
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.caches import cache_specs, empty_layers
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh

# What is left of a device's memory is for compiled programs, their temporaries and the runtime.
USABLE = 0.9
_CONTEXTS = (4096, 32_768, 131_072)


@dataclasses.dataclass(frozen=True)
class Holding:
    """Bytes of one device, for one choice of dtypes.

    Attributes:
        weights: component -> bytes of its parameters.
        kv_per_token: of keys and values that a token of one row of the batch adds.
        state: of a row, whatever its length: recurrent state and convolution.
    """

    weights: Mapping[str, int]
    kv_per_token: int
    state: int

    def sequence(self, tokens: int) -> int:
        """Bytes of the caches of a row with room for so many tokens, in whole pages."""
        return pages_for(tokens) * PAGE * self.kv_per_token + self.state

    def free(self, device: Device) -> int:
        """What the weights leave of the usable memory; negative where they do not fit."""
        return int(USABLE * device.memory) - sum(self.weights.values())

    def rows(self, device: Device, tokens: int) -> int:
        """Most rows with so many tokens that fit beside the weights."""
        return max(0, self.free(device) // self.sequence(tokens))

    def longest(self, device: Device, limit: int) -> int:
        """Most tokens of a single row that fit beside the weights, at most `limit`."""
        room = self.free(device) - self.state
        if room < 0:
            return 0
        return min(limit, room // (PAGE * self.kv_per_token) * PAGE) if self.kv_per_token else limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What one device of a layout holds; `str()` is the printed report.

    Attributes:
        layout: described in words.
        holdings: by dtypes, in words.
        context: tokens of a row.
        longest: tokens that the model's context holds.
        batch_multiple: ranks that rows of a batch are divided among.
        device: that it is to fit, or None.
    """

    layout: str
    holdings: Mapping[str, Holding]
    context: int
    longest: int
    batch_multiple: int
    device: Device | None = None

    def largest_batch(self, dtype: str, tokens: int) -> int:
        """Rows of the whole mesh with so many tokens each; 0 where not even the weights fit."""
        assert self.device is not None
        return self.batch_multiple * self.holdings[dtype].rows(self.device, tokens)

    def __str__(self) -> str:
        lines = [f"a device of the {self.layout}"]
        for dtype, held in self.holdings.items():
            parts = ", ".join(f"{part} {size_in_words(n)}" for part, n in held.weights.items())
            lines += [
                f"  in {dtype}",
                f"    weights        {size_in_words(sum(held.weights.values()))}: {parts}",
                f"    a token        {size_in_words(held.kv_per_token)} of keys and values",
                f"    a sequence     {size_in_words(held.state)} of state, whatever its length; "
                f"{size_in_words(held.sequence(self.context))} with {self.context} tokens",
            ]
            if self.device is not None:
                lines += self._fits(dtype, held, self.device)
        if self.device is not None:
            lines.append(
                f"  {self.device.name}: {size_in_words(self.device.memory)}, {USABLE:.0%} of it for weights "
                "and caches, the rest for programs and their temporaries, which are not counted here"
            )
        return "\n".join(lines)

    def _fits(self, dtype: str, held: Holding, device: Device) -> list[str]:
        free = held.free(device)
        if free < held.sequence(1):
            return [f"    does not fit   {size_in_words(held.sequence(1) - free)} too much for one sequence"]
        contexts = sorted({n for n in (*_CONTEXTS, self.context) if n <= max(self.longest, self.context)})
        batches = ", ".join(f"{self.largest_batch(dtype, n):,} of {n:,} tokens" for n in contexts)
        return [
            f"    leaves         {size_in_words(free)} for caches",
            f"    largest batch  {batches}",
            f"    longest        {held.longest(device, self.longest):,} tokens, one row a device",
        ]


def device_memory(
    config: ModelConfig,
    sizes: tuple[int, int, int],
    context: int,
    *,
    device: Device | None = None,
    **choices: Any,
) -> DeviceMemory:
    """What one device of a mesh holds in bfloat16 and in float32, of a quantised checkpoint beside its codes.

    Args:
        config: of the model.
        sizes: data, expert and tensor.
        context: tokens of a sequence.
        device: that it is to fit.
        **choices: attention, shared_expert, expert_dispatch and exact, as of `Layout`; what "auto" stands for
            holds the most.

    Raises:
        InputError: a size or choice that is none.
    """
    layout = Layout(config, abstract_mesh(*sizes), **choices)
    kinds = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    holdings = {
        held_in_words(config, d.name): holding(layout, DtypePolicy(compute=d, matrix=d)) for d in kinds
    }
    return layout_memory(layout, holdings, context, device)


def layout_memory(
    layout: Layout, holdings: Mapping[str, Holding], context: int, device: Device | None = None
) -> DeviceMemory:
    """The report on a layout."""
    return DeviceMemory(
        layout=str(layout),
        holdings=holdings,
        context=context,
        longest=layout.config.max_position_embeddings,
        batch_multiple=layout.batch_multiple,
        device=device,
    )


def holding(layout: Layout, policy: DtypePolicy, *, drafter: bool = False) -> Holding:
    """Bytes of a device, where keys and values have the dtype of matrices; nothing is allocated.

    Args:
        layout: of the model.
        policy: dtypes.
        drafter: with multi-token prediction of one layer.
    """
    weights = by_component(_shard_bytes(layout.targets(policy)))
    kinds = layout.config.layer_types
    if drafter:
        targets = layout.part_targets(mtp_shapes(layout.config, 1), mtp_forms(layout.config, 1), policy)[0]
        weights["multi-token prediction"] = sum(_shard_bytes(targets).values())
        kinds += (FULL_ATTENTION,)
    # a page and a slot a device
    ranks = layout.batch_multiple
    layers = jax.eval_shape(lambda: empty_layers(layout, ranks, ranks, policy.matrix, policy.compute, kinds))
    kv, state = 0, 0
    for layer, specs in zip(layers, cache_specs(layout, kinds).layers, strict=True):
        local = jax.tree.map(
            lambda array, spec: prod(layout.sharding(spec).shard_shape(array.shape)) * array.dtype.itemsize,
            layer,
            specs,
        )
        if isinstance(layer, KVCache):
            kv += sum(jax.tree.leaves(local))
        else:
            state += sum(jax.tree.leaves(local))
    return Holding(weights=weights, kv_per_token=kv // PAGE, state=state)


def _shard_bytes(targets: Mapping[str, Target]) -> dict[str, int]:
    """Name -> bytes of a device."""
    structs = {name: target.struct for name, target in targets.items()}
    return {name: prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for name, s in structs.items()}

"""The model on a mesh: one `jax.shard_map` around all of it, in which every rank runs its part."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from qwen_moe_jax.formats.cache import HybridCache
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout

Parameters = Mapping[str, jax.Array]


class MeshForward:
    """The engine's view of a model on a mesh; see `generation.forward.Forward`.

    JAX checks the types of everything inside: a sum that was forgotten, or a part taken for the whole, leaves
    a value that differs between ranks where the layout promises the same, and does not trace.
    """

    def __init__(
        self, layout: Layout, policy: DtypePolicy, kernels: Kernels, parameters: dict[str, jax.Array]
    ):
        self.layout = layout
        self.kernels = kernels
        self.parameters = parameters
        self.batch_multiple = layout.batch_multiple
        self.decoder = layout_decoder(layout, policy, kernels)
        self._specs = {name: layout.spec(name, value.ndim) for name, value in parameters.items()}
        self._batch = PartitionSpec(layout.batch_axes or None)
        self._caches: dict[tuple[int, int], Any] = {}
        self._kv_dtype = held_dtype(policy.compute, kernels)

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`."""
        cache_specs = self.layout.cache_specs()

        def on_a_rank(parameters, tokens, valid, cache):
            return with_parameters(self.decoder, parameters)(tokens, valid, cache)

        return jax.shard_map(
            on_a_rank,
            mesh=self.layout.mesh,
            in_specs=(self._specs, self._batch, self._batch, cache_specs),
            out_specs=(self._batch, cache_specs),
        )(dict(parameters), tokens, valid, cache)

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""

        def on_a_rank(parameters, hidden):
            return with_parameters(self.decoder, parameters).logits(hidden)

        return jax.shard_map(
            on_a_rank, mesh=self.layout.mesh, in_specs=(self._specs, self._batch), out_specs=self._batch
        )(dict(parameters), hidden)

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache, made where it lies."""
        compute = self.decoder.dtypes.compute
        if (batch, capacity) not in self._caches:
            make = partial(self.layout.empty_cache, batch, capacity, self._kv_dtype, compute)
            shardings = jax.tree.map(
                self.layout.sharding,
                self.layout.cache_specs(),
                is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
            )
            self._caches[batch, capacity] = jax.jit(make, out_shardings=shardings)
        return self._caches[batch, capacity]()

    def everywhere(self, tree: Any) -> Any:
        """The same arrays, whole on every device."""
        return lax.with_sharding_constraint(tree, self.layout.sharding(PartitionSpec()))


def layout_decoder(layout: Layout, policy: DtypePolicy, kernels: Kernels) -> Decoder:
    """The abstract decoder that every rank of a layout runs on its part of the parameters."""
    return abstract_decoder(
        layout.config,
        policy,
        kernels,
        layout.ranks(),
        fused=layout.shared_expert == "fused",
        blocks=layout.blocks,
    )

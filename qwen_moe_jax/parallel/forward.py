"""The model on a mesh: one `jax.shard_map` around all of it, in which every rank runs its part."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen_moe_jax.formats.cache import PAGE, DeltaNetCache, HybridCache, LayerCache, move_states, states_of
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.memory import holding

Parameters = Mapping[str, jax.Array]


class MeshForward:
    """The engine's view of a model on a mesh; see `engine.forward.Forward`.

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
        self._makers: dict[tuple[Any, ...], Any] = {}
        self.devices = [d for d in _mesh_devices(layout) if d.process_index == jax.process_index()]
        self.memory_as_used = False
        held = holding(layout, dataclasses.replace(policy, matrix=held_dtype(policy.compute, kernels)))
        self.page_bytes, self.state_bytes = held.kv_per_token * PAGE, held.state
        self._conv_dtype = policy.compute
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
        make = partial(self.layout.empty_cache, batch, capacity, self._kv_dtype, self._conv_dtype)
        return self._made(("cache", batch, capacity), make, self.layout.cache_specs())

    def new_layers(self, pages: int, slots: int) -> tuple[LayerCache, ...]:
        """Pools of the whole mesh, made where they lie."""
        make = partial(self.layout.empty_layers, pages, slots, self._kv_dtype, self._conv_dtype)
        return self._made(("layers", pages, slots), make, self.layout.cache_specs().layers)

    def new_states(self, entries: int) -> tuple[DeltaNetCache, ...]:
        """Pools of recurrent states only, made where they lie."""
        ranks = self.layout.batch_multiple

        def make() -> tuple[DeltaNetCache, ...]:
            return states_of(self.layout.empty_layers(ranks, entries, self._kv_dtype, self._conv_dtype))

        return self._made(("states", entries), make, states_of(self.layout.cache_specs().layers))

    def move_states(
        self,
        to: tuple[DeltaNetCache, ...],
        given: tuple[DeltaNetCache, ...],
        places: jax.Array,
        sources: jax.Array,
    ) -> tuple[DeltaNetCache, ...]:
        """As `formats.cache.move_states`, on each data rank by its own part of the lists."""
        specs = states_of(self.layout.cache_specs().layers)
        return jax.shard_map(
            move_states,
            mesh=self.layout.mesh,
            in_specs=(specs, specs, self._batch, self._batch),
            out_specs=specs,
        )(to, given, places, sources)

    def _made(self, key: tuple[Any, ...], make: Callable[[], Any], specs: Any) -> Any:
        """What `make` gives, divided as `specs` say."""
        if key not in self._makers:
            shardings = jax.tree.map(
                self.layout.sharding, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
            )
            self._makers[key] = jax.jit(make, out_shardings=shardings)
        return self._makers[key]()

    def by_row(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Each data rank computes its own rows."""
        specs = jax.tree.map(lambda x: self._batch if jnp.ndim(x) else PartitionSpec(), trees)
        return jax.shard_map(function, mesh=self.layout.mesh, in_specs=specs, out_specs=self._batch)(*trees)

    def everywhere(self, tree: Any) -> Any:
        """Arrays whole on every device."""
        return lax.with_sharding_constraint(tree, self.layout.sharding(PartitionSpec()))


def _mesh_devices(layout: Layout) -> list[Any]:
    """The devices of a layout; none where it is only a shape."""
    return list(layout.mesh.devices.flat) if isinstance(layout.mesh, Mesh) else []


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

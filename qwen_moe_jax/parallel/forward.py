"""The model on a mesh: one `jax.shard_map` around all of it, in which every rank runs its part."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qwen_moe_jax.checkpoint.parts import mtp_forms, mtp_shapes
from qwen_moe_jax.checkpoint.targets import Target
from qwen_moe_jax.config import FULL_ATTENTION
from qwen_moe_jax.formats.cache import (
    PAGE,
    DeltaNetCache,
    HybridCache,
    LayerCache,
    LookedAt,
    states_of,
)
from qwen_moe_jax.kernels.state_moves import move_states
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, abstract_decoder, run_tapped, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.mtp import MTP, MtpHead, abstract_mtp, drafter_keys, run_drafter
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.model.taps import Edit
from qwen_moe_jax.parallel.caches import (
    cache_specs,
    empty_cache,
    empty_layers,
    looked_at_specs,
    spec_of,
)
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.memory import holding
from qwen_moe_jax.parallel.mesh_points import check_edits, in_order, point_specs

Parameters = Mapping[str, jax.Array]


class MeshForward:
    """The engine's view of a model on a mesh; see `engine.forward.Forward`.

    JAX checks the types of everything inside: a sum that was forgotten, or a part taken for the whole, leaves
    a value that differs between ranks where the layout promises the same, and does not trace.
    """

    def __init__(
        self,
        layout: Layout,
        policy: DtypePolicy,
        kernels: Kernels,
        parameters: dict[str, jax.Array],
        drafter: MtpHead | None = None,
        draft_tokens: int = 0,
        *,
        edits: Mapping[str, Edit] | None = None,
    ):
        self.layout = layout
        self._policy = policy
        self._edits = dict(edits or {})
        self.drafter = drafter
        self.draft_tokens = draft_tokens
        self.exact = layout.exact
        self._drafter_kinds = (FULL_ATTENTION,) * (drafter is not None)
        self.kernels = kernels
        self.parameters = parameters
        self.batch_multiple = layout.batch_multiple
        self.decoder = layout_decoder(layout, policy, kernels)
        self._specs = {
            name: layout.spec(name.removeprefix(MTP), value.ndim) for name, value in parameters.items()
        }
        self._batch = spec_of(layout.batch_axes)
        self._makers: dict[tuple[Any, ...], Any] = {}
        self.devices = [d for d in _mesh_devices(layout) if d.process_index == jax.process_index()]
        self.memory_as_used = False
        held_policy = dataclasses.replace(policy, matrix=held_dtype(policy.compute, kernels))
        held = holding(layout, held_policy, drafter=drafter is not None)
        self.page_bytes, self.state_bytes = held.kv_per_token * PAGE, held.state
        self._conv_dtype = policy.compute
        self._kv_dtype = held_dtype(policy.compute, kernels)

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`."""
        caches = cache_specs(self.layout)

        def on_a_rank(parameters, tokens, valid, cache):
            return run_tapped(self.decoder, parameters, tokens, valid, cache, self._edits)[:2]

        return jax.shard_map(
            on_a_rank,
            mesh=self.layout.mesh,
            in_specs=(self._specs, self._batch, self._batch, caches),
            out_specs=(self._batch, caches),
        )(dict(parameters), tokens, valid, cache)

    def observe(
        self,
        parameters: Parameters,
        tokens: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        at: jax.Array,
        wanted: frozenset[str],
    ) -> tuple[jax.Array, HybridCache, dict[str, Any]]:
        """As of the protocol. Heads are put into their order."""
        caches = cache_specs(self.layout)

        def on_a_rank(parameters, tokens, valid, cache, at):
            return run_tapped(self.decoder, parameters, tokens, valid, cache, self._edits, wanted, at)

        hidden, cache, found = jax.shard_map(
            on_a_rank,
            mesh=self.layout.mesh,
            in_specs=(self._specs, self._batch, self._batch, caches, self._batch),
            out_specs=(self._batch, caches, point_specs(self.layout, wanted)),
        )(dict(parameters), tokens, valid, cache, at)
        return hidden, cache, {name: in_order(self.layout, name, value) for name, value in found.items()}

    def edited(self, edits: Mapping[str, Edit]) -> "MeshForward":
        """As of the protocol."""
        check_edits(self.layout, edits)
        own = {name: value for name, value in self.parameters.items() if not name.startswith(MTP)}
        return MeshForward(self.layout, self._policy, self.kernels, own, edits=edits)

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""

        def on_a_rank(parameters, hidden):
            return with_parameters(self.decoder, parameters).logits(hidden)

        return jax.shard_map(
            on_a_rank, mesh=self.layout.mesh, in_specs=(self._specs, self._batch), out_specs=self._batch
        )(dict(parameters), hidden)

    def look(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, tuple[LookedAt, ...]]:
        """As `Decoder.look`."""

        def on_a_rank(parameters, tokens, valid, cache):
            return with_parameters(self.decoder, parameters).look(tokens, valid, cache)

        return jax.shard_map(
            on_a_rank,
            mesh=self.layout.mesh,
            in_specs=(self._specs, self._batch, self._batch, cache_specs(self.layout)),
            out_specs=(self._batch, looked_at_specs(self.layout)),
        )(dict(parameters), tokens, valid, cache)

    def accept(
        self,
        parameters: Parameters,
        looked: tuple[LookedAt, ...],
        counts: jax.Array,
        slots: jax.Array,
        layers: tuple[LayerCache, ...],
    ) -> tuple[LayerCache, ...]:
        """As `Decoder.accept`."""
        pools = cache_specs(self.layout).layers

        def on_a_rank(parameters, looked, counts, slots, layers):
            return with_parameters(self.decoder, parameters).accept(looked, counts, slots, layers)

        return jax.shard_map(
            on_a_rank,
            mesh=self.layout.mesh,
            in_specs=(self._specs, looked_at_specs(self.layout), self._batch, self._batch, pools),
            out_specs=pools,
        )(dict(parameters), looked, counts, slots, layers)

    def draft(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> tuple[jax.Array, HybridCache]:
        """As `run_drafter`."""
        return self._drafted(
            run_drafter, (self._batch, self._drafter_specs), parameters, hidden, following, valid, cache
        )

    def remember(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> HybridCache:
        """As `drafter_keys`."""
        return self._drafted(drafter_keys, self._drafter_specs, parameters, hidden, following, valid, cache)

    @property
    def _drafter_specs(self) -> HybridCache:
        return cache_specs(self.layout, self._drafter_kinds)

    def _drafted(self, run: Callable[..., Any], out_specs: Any, parameters: Parameters, *given: Any) -> Any:
        """What the drafter gives, each rank by its part."""
        batch = self._batch
        return jax.shard_map(
            partial(run, self.decoder, self.drafter),
            mesh=self.layout.mesh,
            in_specs=(self._specs, batch, batch, batch, self._drafter_specs),
            out_specs=out_specs,
        )(dict(parameters), *given)

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache, made where it lies."""
        make = partial(empty_cache, self.layout, batch, capacity, self._kv_dtype, self._conv_dtype)
        return self._made(("cache", batch, capacity), make, cache_specs(self.layout))

    def new_layers(self, pages: int, slots: int) -> tuple[LayerCache, ...]:
        """Pools of the whole mesh, made where they lie."""
        kinds = self.layout.config.layer_types + self._drafter_kinds
        make = partial(empty_layers, self.layout, pages, slots, self._kv_dtype, self._conv_dtype, kinds)
        return self._made(("layers", pages, slots), make, cache_specs(self.layout, kinds).layers)

    def new_states(self, entries: int) -> tuple[DeltaNetCache, ...]:
        """Pools of recurrent states only, made where they lie."""
        ranks = self.layout.batch_multiple

        def make() -> tuple[DeltaNetCache, ...]:
            return states_of(empty_layers(self.layout, ranks, entries, self._kv_dtype, self._conv_dtype))

        return self._made(("states", entries), make, states_of(cache_specs(self.layout).layers))

    def move_states(
        self,
        to: tuple[DeltaNetCache, ...],
        given: tuple[DeltaNetCache, ...],
        places: jax.Array,
        sources: jax.Array,
    ) -> tuple[DeltaNetCache, ...]:
        """As `kernels.state_moves.move_states`, on each data rank by its own part of the lists."""
        specs = states_of(cache_specs(self.layout).layers)
        return jax.shard_map(
            partial(move_states, self.kernels),
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

    def put_rows(self, tree: Any) -> Any:
        """Each data rank gets its own rows."""
        sharding = self.layout.sharding(self._batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, partial(operator.getitem, x)), tree
        )

    def by_row(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Each data rank computes its own rows."""
        specs = jax.tree.map(lambda x: self._batch if jnp.ndim(x) else PartitionSpec(), trees)
        return jax.shard_map(function, mesh=self.layout.mesh, in_specs=specs, out_specs=self._batch)(*trees)

    def by_pool(self, function: Callable[..., Any], layers: tuple[LayerCache, ...], *trees: Any) -> Any:
        """Each rank computes its own pools."""
        pools = cache_specs(self.layout, self.layout.config.layer_types + self._drafter_kinds).layers
        specs = jax.tree.map(lambda x: self._batch if jnp.ndim(x) else PartitionSpec(), trees)
        return jax.shard_map(function, mesh=self.layout.mesh, in_specs=(pools, *specs), out_specs=pools)(
            layers, *trees
        )

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
        layout.ranks(policy.compute),
        fused=layout.shared_expert == "fused",
        forms=layout.forms,
    )


def layout_drafter(
    layout: Layout, layers: int, policy: DtypePolicy, kernels: Kernels
) -> tuple[MtpHead, dict[str, Target]]:
    """The abstract drafter that every rank of a layout runs, and what its parameters are read as (by
    canonical name, without `MTP`).

    Args:
        layers: `mtp_num_hidden_layers` of config.json.
        layout, policy, kernels: of the model.
    """
    targets, forms = layout.part_targets(
        mtp_shapes(layout.config, layers), mtp_forms(layout.config, layers), policy
    )
    fused = layout.shared_expert == "fused"
    head = abstract_mtp(
        layout.config, layers, policy, kernels, forms, layout.ranks(policy.compute), fused=fused
    )
    return head, targets

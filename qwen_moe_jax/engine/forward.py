"""The model as two functions of its parameters, on one device or on a mesh."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax

from qwen_moe_jax.config import FULL_ATTENTION
from qwen_moe_jax.formats.cache import (
    CacheSizes,
    DeltaNetCache,
    HybridCache,
    LayerCache,
    LookedAt,
    bytes_of,
    empty_cache,
    empty_layers,
    states_of,
)
from qwen_moe_jax.kernels.cpu.calls import native_reserve
from qwen_moe_jax.kernels.state_moves import move_states
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, named_parameters, run_tapped, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.mtp import MTP, MtpHead, drafter_keys, run_drafter
from qwen_moe_jax.model.taps import Edit

Parameters = Mapping[str, jax.Array]


class Forward(Protocol):
    """What the engine compiles.

    Attributes:
        decoder: its configuration and dtypes.
        drafter: multi-token prediction, None where it is not used. Its keys and values are the last of the
            layers' pools.
        draft_tokens: that it drafts at most for each step; 0 without it.
        exact: drafts are verified by passes over one token, so that no sum depends on whether there are any.
        kernels: what it is compiled for.
        parameters: canonical name -> array.
        batch_multiple: ranks that rows are divided among; a batch's number of rows is a multiple of it.
        devices: of this process, that the model lies on.
        memory_as_used: pools take memory as they are written, not when they are made.
        page_bytes: of keys and values of a page, all layers, on one device.
        state_bytes: of a row's recurrent states and convolution inputs, all layers, on one device.
    """

    decoder: Decoder
    drafter: MtpHead | None
    draft_tokens: int
    exact: bool
    kernels: Kernels
    parameters: dict[str, jax.Array]
    batch_multiple: int
    devices: list[Any]
    memory_as_used: bool
    page_bytes: int
    state_bytes: int

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`, with the model's edits."""
        ...

    def observe(
        self,
        parameters: Parameters,
        tokens: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        at: jax.Array,
        wanted: frozenset[str],
    ) -> tuple[jax.Array, HybridCache, dict[str, Any]]:
        """As `hidden`, with the values of some points.

        Args:
            parameters, tokens, valid, cache: as there.
            at: int32 [batch, n], places among these tokens behind which recurrent states are captured.
            wanted: points of `model/points.py`.

        Returns:
            (hidden states; the cache; point -> value).
        """
        ...

    def edited(self, edits: Mapping[str, Edit]) -> "Forward":
        """The same model, with the values of some points replaced in every pass, and without drafts.

        Raises:
            InputError: a point that cannot be replaced where the model lies on a mesh.
        """
        ...

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""
        ...

    def look(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, tuple[LookedAt, ...]]:
        """As `Decoder.look`."""
        ...

    def accept(
        self,
        parameters: Parameters,
        looked: tuple[LookedAt, ...],
        counts: jax.Array,
        slots: jax.Array,
        layers: tuple[LayerCache, ...],
    ) -> tuple[LayerCache, ...]:
        """As `Decoder.accept`."""
        ...

    def draft(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> tuple[jax.Array, HybridCache]:
        """As `MtpHead.__call__`, of hidden states [batch, seq, hidden] and the tokens that follow them, int32
        [batch, seq]; the cache has the drafter's layer only."""
        ...

    def remember(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> HybridCache:
        """As `MtpHead.remember`; arguments as of `draft`."""
        ...

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` tokens, with pages and slots of their own."""
        ...

    def new_layers(self, pages: int, slots: int) -> tuple[LayerCache, ...]:
        """Pools of all data ranks together; what they hold means nothing."""
        ...

    def new_states(self, entries: int) -> tuple[DeltaNetCache, ...]:
        """Pools of recurrent states only, for snapshots, of all data ranks together."""
        ...

    def move_states(
        self,
        to: tuple[DeltaNetCache, ...],
        given: tuple[DeltaNetCache, ...],
        places: jax.Array,
        sources: jax.Array,
    ) -> tuple[DeltaNetCache, ...]:
        """As `kernels.state_moves.move_states`, on each data rank by its own part of the lists."""
        ...

    def put_rows(self, tree: Any) -> Any:
        """Arrays of the host with an entry a row or slot, equal in all processes, where `by_row` gives them.
        Steps that are compiled for the ones take the others, then."""
        ...

    def by_row(self, function: Callable[..., Any], *trees: Any) -> Any:
        """A function on the data ranks that rows lie on, each with its own part of arrays that have an entry
        a row or slot; what it gives has that, too. Scalars are the same for all ranks."""
        ...

    def by_pool(self, function: Callable[..., Any], layers: tuple[LayerCache, ...], *trees: Any) -> Any:
        """A function that gives pools, of the pools and arrays with an entry a row, on each data rank."""
        ...

    def everywhere(self, tree: Any) -> Any:
        """The same arrays, whole on every device, so that any process can read them."""
        ...


class OneDeviceForward:
    """The model on the device its parameters lie on."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        drafter: MtpHead | None = None,
        draft_tokens: int = 0,
        *,
        exact: bool = False,
        edits: Mapping[str, Edit] | None = None,
    ):
        self._edits = dict(edits or {})
        self.decoder = decoder
        self.drafter = drafter
        self.draft_tokens = draft_tokens
        self.exact = exact
        self.kernels = kernels
        self.parameters = named_parameters(decoder)
        if drafter is not None:
            self.parameters |= {MTP + name: value for name, value in named_parameters(drafter).items()}
        self._kinds = decoder.config.layer_types + (FULL_ATTENTION,) * (drafter is not None)
        self.batch_multiple = 1
        # Keys and values follow the weights: XLA:CPU multiplies float32 at memory speed only.
        self._kv_dtype = held_dtype(decoder.dtypes.compute, kernels)
        self.devices = [jax.local_devices()[0]]
        self.memory_as_used = kernels.native is not None
        one = jax.eval_shape(lambda: self._empty_pools(self._kinds, 1, 1))
        self.page_bytes, self.state_bytes = bytes_of(one)

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`."""
        return run_tapped(self.decoder, parameters, tokens, valid, cache, self._edits)[:2]

    def observe(
        self,
        parameters: Parameters,
        tokens: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
        at: jax.Array,
        wanted: frozenset[str],
    ) -> tuple[jax.Array, HybridCache, dict[str, Any]]:
        """As of the protocol."""
        return run_tapped(self.decoder, parameters, tokens, valid, cache, self._edits, wanted, at)

    def edited(self, edits: Mapping[str, Edit]) -> "OneDeviceForward":
        """As of the protocol."""
        return OneDeviceForward(self.decoder, self.kernels, edits=edits)

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""
        return with_parameters(self.decoder, parameters).logits(hidden)

    def look(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, tuple[LookedAt, ...]]:
        """As `Decoder.look`."""
        return with_parameters(self.decoder, parameters).look(tokens, valid, cache)

    def accept(
        self,
        parameters: Parameters,
        looked: tuple[LookedAt, ...],
        counts: jax.Array,
        slots: jax.Array,
        layers: tuple[LayerCache, ...],
    ) -> tuple[LayerCache, ...]:
        """As `Decoder.accept`."""
        return with_parameters(self.decoder, parameters).accept(looked, counts, slots, layers)

    def draft(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> tuple[jax.Array, HybridCache]:
        """As of the protocol."""
        return run_drafter(self.decoder, self.drafter, parameters, hidden, following, valid, cache)

    def remember(
        self,
        parameters: Parameters,
        hidden: jax.Array,
        following: jax.Array,
        valid: jax.Array,
        cache: HybridCache,
    ) -> HybridCache:
        """As of the protocol."""
        return drafter_keys(self.decoder, self.drafter, parameters, hidden, following, valid, cache)

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache."""
        config, compute = self.decoder.config, self.decoder.dtypes.compute
        return empty_cache(config, batch, capacity, self._kv_dtype, compute)

    def new_layers(self, pages: int, slots: int) -> tuple[LayerCache, ...]:
        """Pools of this device."""
        return self._pools(self._kinds, pages, slots)

    def new_states(self, entries: int) -> tuple[DeltaNetCache, ...]:
        """Pools of recurrent states only."""
        kinds = tuple(kind for kind in self.decoder.config.layer_types if kind != FULL_ATTENTION)
        return states_of(self._pools(kinds, 0, entries))

    def move_states(
        self,
        to: tuple[DeltaNetCache, ...],
        given: tuple[DeltaNetCache, ...],
        places: jax.Array,
        sources: jax.Array,
    ) -> tuple[DeltaNetCache, ...]:
        """As `kernels.state_moves.move_states`."""
        return move_states(self.kernels, to, given, places, sources)

    def put_rows(self, tree: Any) -> Any:
        """Arrays of the host, bound to this device as what the steps give is."""
        return jax.device_put(tree, self.devices[0])

    def by_row(self, function: Callable[..., Any], *trees: Any) -> Any:
        """All rows lie here."""
        return function(*trees)

    def by_pool(self, function: Callable[..., Any], layers: tuple[LayerCache, ...], *trees: Any) -> Any:
        """All pools lie here."""
        return function(layers, *trees)

    def everywhere(self, tree: Any) -> Any:
        """What lies on one device is whole there."""
        return tree

    def _empty_pools(self, kinds: tuple[str, ...], pages: int, slots: int) -> tuple[LayerCache, ...]:
        config, compute = self.decoder.config, self.decoder.dtypes.compute
        return empty_layers(kinds, CacheSizes.of(config), pages, slots, self._kv_dtype, compute)

    def _pools(self, kinds: tuple[str, ...], pages: int, slots: int) -> tuple[LayerCache, ...]:
        make = partial(self._empty_pools, kinds, pages, slots)
        native = self.kernels.native
        if native is None:
            pools = jax.jit(make)()
        else:
            # Memory that nobody has written is not taken from the machine yet.
            shapes = jax.eval_shape(make)
            pools = jax.tree.map(lambda x: native_reserve(x.shape, x.dtype, native), shapes)
        return jax.device_put(pools, self.devices[0])

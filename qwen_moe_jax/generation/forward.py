"""The model as two functions of its parameters, on one device or on a mesh."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from qwen_moe_jax.formats.cache import HybridCache, empty_cache
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, named_parameters, with_parameters
from qwen_moe_jax.model.linear import held_dtype

Parameters = Mapping[str, jax.Array]


class Forward(Protocol):
    """What the engine compiles.

    Attributes:
        decoder: its configuration and dtypes.
        kernels: what it is compiled for.
        parameters: canonical name -> array.
        batch_multiple: what a batch's number of rows must be a multiple of.
    """

    decoder: Decoder
    kernels: Kernels
    parameters: dict[str, jax.Array]
    batch_multiple: int

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`."""
        ...

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""
        ...

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        ...

    def everywhere(self, tree: Any) -> Any:
        """The same arrays, whole on every device, so that any process can read them."""
        ...


class OneDeviceForward:
    """The model on the device its parameters lie on."""

    def __init__(self, decoder: Decoder, kernels: Kernels):
        self.decoder = decoder
        self.kernels = kernels
        self.parameters = named_parameters(decoder)
        self.batch_multiple = 1
        # Keys and values follow the weights: XLA:CPU multiplies float32 at memory speed only.
        self._kv_dtype = held_dtype(decoder.dtypes.compute, kernels)

    def hidden(
        self, parameters: Parameters, tokens: jax.Array, valid: jax.Array, cache: HybridCache
    ) -> tuple[jax.Array, HybridCache]:
        """As `Decoder.__call__`."""
        return with_parameters(self.decoder, parameters)(tokens, valid, cache)

    def logits(self, parameters: Parameters, hidden: jax.Array) -> jax.Array:
        """As `Decoder.logits`."""
        return with_parameters(self.decoder, parameters).logits(hidden)

    def new_cache(self, batch: int, capacity: int) -> HybridCache:
        """An empty cache."""
        config, compute = self.decoder.config, self.decoder.dtypes.compute
        return empty_cache(config, batch, capacity, self._kv_dtype, compute)

    def everywhere(self, tree: Any) -> Any:
        """The same."""
        return tree

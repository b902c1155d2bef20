"""The programs of generation, lowered for devices that are only described, as `Engine` compiles them.

A program's arguments are shapes, dtypes and shardings; no array is made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qwen_moe_jax.formats.cache import HybridCache
from qwen_moe_jax.generation.engine import DecodeState, Engine, Sampler
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.sampling import SamplingParams, SamplingPlan
from qwen_moe_jax.generation.shapes import cache_capacity, chunk_length
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.forward import MeshForward
from qwen_moe_jax.parallel.layout import Layout

PROGRAMS = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model on described devices, with a batch in its caches.

    Attributes:
        layout: of the model, on a mesh of described devices.
        policy: dtypes.
        kernels: the table of the devices' architecture.
        batch: rows of the whole mesh.
        context: tokens that a row may hold.
    """

    layout: Layout
    policy: DtypePolicy
    kernels: Kernels
    batch: int
    context: int

    @property
    def capacity(self) -> int:
        """Tokens that the caches have room for: what generation would make for this context."""
        return cache_capacity(self.context)

    @property
    def rows(self) -> int:
        """Rows that are computed: the batch, padded to what the mesh divides."""
        multiple = self.layout.batch_multiple
        return -(-self.batch // multiple) * multiple

    @property
    def chunk(self) -> int:
        """Tokens a row in one chunk of prefill."""
        return min(chunk_length(self.rows, self.kernels), self.capacity)

    def engine(self) -> Engine:
        """Generation's functions over parameters without values."""
        structs: dict[str, Any] = {
            name: target.struct for name, target in self.layout.targets(self.policy).items()
        }
        return Engine(MeshForward(self.layout, self.policy, self.kernels, structs))

    def lower(self, program: str) -> jax.stages.Lowered:
        """One of `PROGRAMS`: a chunk of prompts into the caches, or the loop of greedy decoding."""
        if program == "prefill":
            return self.engine().lower_prefill(self._cache(), self._rows(jnp.int32, self.chunk))
        return self.engine().lower_decode(self._state(), self._sampler(), SamplingPlan.of(GenerationConfig()))

    def _rows(self, dtype: Any, *rest: int) -> Any:
        """One entry a row, divided as the rows are."""
        spec = PartitionSpec(self.layout.batch_axes or None)
        return jax.ShapeDtypeStruct((self.rows, *rest), dtype, sharding=self.layout.sharding(spec))

    def _cache(self) -> HybridCache:
        held, compute = self.policy.matrix, self.policy.compute
        cache = jax.eval_shape(lambda: self.layout.empty_cache(self.rows, self.capacity, held, compute))
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.layout.sharding(spec)),
            cache,
            self.layout.cache_specs(),
        )

    def _state(self) -> DecodeState:
        return DecodeState(
            cache=self._cache(),
            token=self._rows(jnp.int32),
            finished=self._rows(jnp.bool_),
            emitted=self._rows(jnp.int32),
            counts=None,
        )

    def _sampler(self) -> Sampler:
        # what the host gives is the same on every device
        numbers: Any = np.zeros(self.rows, np.uint32)
        ends: Any = np.zeros(2, np.int32)
        given = Sampler(
            params=SamplingParams.of(GenerationConfig(), self.rows),
            seeds=numbers,
            sequence_index=numbers,
            eos_ids=ends,
            prompt_mask=None,
        )
        everywhere = self.layout.sharding(PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), given)

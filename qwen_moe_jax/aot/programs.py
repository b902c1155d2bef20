"""The engine's steps, lowered for devices that are only described.

A program's arguments are shapes, dtypes and shardings; no array is made.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qwen_moe_jax.config import FULL_ATTENTION
from qwen_moe_jax.engine.drafting import Drafts, no_drafts
from qwen_moe_jax.engine.plan import BORDERS
from qwen_moe_jax.engine.rows import Entries, Layers, Roster, RowStates, StepRows
from qwen_moe_jax.engine.sampling import MOST_ENDS, RowSampling, SamplingParams
from qwen_moe_jax.engine.shapes import chunk_length
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.formats.cache import PAGE, Placement, pages_for, states_of
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.mtp import MTP
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.caches import cache_specs, empty_layers
from qwen_moe_jax.parallel.forward import MeshForward, layout_drafter
from qwen_moe_jax.parallel.layout import Layout

PROGRAMS = ("prefill", "decode")
# Beside them where drafts are made.
VERIFY = "verify"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model on described devices, with a batch in its pools.

    Attributes:
        layout: of the model, on a mesh of described devices.
        policy: dtypes.
        kernels: the table of the devices' architecture.
        batch: rows of the whole mesh.
        context: tokens that a row may hold.
        mean_context: tokens that the rows hold on average, if not as many as they may: what a step reads.
        draft_tokens: of multi-token prediction, for each row and step; 0 leaves it out.
    """

    layout: Layout
    policy: DtypePolicy
    kernels: Kernels
    batch: int
    context: int
    mean_context: int | None = None
    draft_tokens: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that a row's pages have room for."""
        return pages_for(self.context) * PAGE

    @property
    def rows(self) -> int:
        """Rows that are computed: the batch, padded to what the mesh divides."""
        multiple = self.layout.batch_multiple
        return -(-self.batch // multiple) * multiple

    def step_rows(self, program: str) -> int:
        """Rows that a program is about: prefill of one on each data rank, the others of all of them."""
        return self.layout.batch_multiple if program == "prefill" else self.rows

    def step_tokens(self, program: str) -> int:
        """New tokens a row."""
        if program == "prefill":
            return min(chunk_length(1, self.kernels), self.capacity)
        return 1 if program == "decode" else self.draft_tokens + 1

    def step_context(self, program: str) -> int:
        """Tokens a row before them, on average: those of a step that fills the row, or the mean of all."""
        tokens = self.step_tokens(program)
        full = self.capacity if self.mean_context is None else self.mean_context
        return max(0, full - tokens)

    def steps(self, program: str) -> Steps:
        """The engine's steps over parameters without values."""
        structs: dict[str, Any] = {
            name: target.struct for name, target in self.layout.targets(self.policy).items()
        }
        keys = self.step_context(program) + self.step_tokens(program)
        kernels = dataclasses.replace(self.kernels, expected_keys=keys)
        head = None
        if self.draft_tokens:
            head, targets = layout_drafter(self.layout, 1, self.policy, kernels)
            structs |= {MTP + name: target.struct for name, target in targets.items()}
        return Steps(MeshForward(self.layout, self.policy, kernels, structs, head, self.draft_tokens))

    def lower(self, program: str) -> jax.stages.Lowered:
        """One of `PROGRAMS`, a chunk of prompts into the pools, or greedy decoding, or `VERIFY`."""
        steps = self.steps(program)
        rows, width = self.step_rows(program), pages_for(self.context)
        if program == "prefill":
            # what the host gives is the same on every device
            placed: Any = Placement(
                tables=self._given(jnp.int32, rows, width),
                slots=self._given(jnp.int32, rows),
                length=self._given(jnp.int32, rows),
            )
            tokens = self._given(jnp.int32, rows, self.step_tokens(program))
            following = tokens if self.draft_tokens else None
            counts = self._given(jnp.int32, rows)
            return steps.lower_prefill(self.pools(), tokens, following, counts, placed)
        integers = self._given(jnp.int32, rows)
        truths = self._given(jnp.bool_, rows)
        states = RowStates(
            token=integers,
            length=integers,
            emitted=integers,
            finished=truths,
            drafts=self._drafts(rows) if self.draft_tokens else None,
        )
        sampling = SamplingParams.of([RowSampling()] * rows)
        roster = Roster(
            slots=integers,
            limit=integers,
            end_ids=self._given(jnp.int32, rows, MOST_ENDS),
            draft_limit=integers,
            places=self._given(jnp.int32, rows, BORDERS),
            sampling=jax.tree.map(lambda x: self._given(x.dtype, *x.shape), sampling),
        )
        entries = Entries(begins=truths, token=integers, length=integers, emitted=integers)
        tables = self._given(jnp.int32, rows, width)
        one_each = states_of(self._pools(self.layout.batch_multiple, self.layout.batch_multiple))
        pools = self.pools()
        told = StepRows(roster, entries, tables, integers)
        return steps.lower_decode(pools, one_each, states, told, only=program)

    def pools(self) -> Layers:
        """A slot and pages for every row."""
        return self._pools(self.rows * pages_for(self.context), self.rows)

    def _drafts(self, rows: int) -> Drafts:
        return jax.tree.map(lambda x: self._given(x.dtype, *x.shape), no_drafts(rows, self.draft_tokens))

    def _pools(self, pages: int, slots: int) -> Layers:
        held, compute = self.policy.matrix, self.policy.compute
        kinds = self.layout.config.layer_types + (FULL_ATTENTION,) * bool(self.draft_tokens)
        layers = jax.eval_shape(lambda: empty_layers(self.layout, pages, slots, held, compute, kinds))
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.layout.sharding(spec)),
            layers,
            cache_specs(self.layout, kinds).layers,
        )

    def _given(self, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.sharding(PartitionSpec()))

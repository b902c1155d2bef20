"""Which rank holds what: one table of logical axes, and how each axis is divided on a mesh."""

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qwen_moe_jax.checkpoint.layout import (
    codes_a_byte,
    matrix_scheme,
    parameter_forms,
    parameter_shapes,
    stored_dtype,
    whole_shape,
)
from qwen_moe_jax.checkpoint.names import is_matrix, is_side, matrix_name
from qwen_moe_jax.checkpoint.scale_targets import Forms, with_scales
from qwen_moe_jax.checkpoint.targets import Target, give_back
from qwen_moe_jax.config import SPARSE, ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.copies import Copies, SharedSlot
from qwen_moe_jax.parallel.mesh import DATA, EXPERT, TENSOR, check_mesh
from qwen_moe_jax.parallel.ranks import MeshRanks
from qwen_moe_jax.parallel.splits import Section, Split, divide_heads

SHARED_EXPERT_MODES = ("prescaled", "outside", "sharded", "fused")
NO_SHARED_EXPERT = "none"  # the mode of a model that has none
DISPATCHES = ("psum", "all_to_all")
ATTENTION_MODES = ("tensor", "data")
SUMS = ("auto", "compute", "float32")

# The table: logical axis of each dimension of a parameter, by the end of its name; None is not divided.
# Parameters that are not named (norms, router, shared expert's gate) are the same on every rank.
_TABLE: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": ("vocab", None),
    "lm_head.weight": ("vocab", None),
    "self_attn.q_proj.weight": ("query_gate", None),
    "self_attn.k_proj.weight": ("kv", None),
    "self_attn.v_proj.weight": ("kv", None),
    "self_attn.q_proj.bias": ("query_gate",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
    "self_attn.o_proj.weight": (None, "query"),
    "linear_attn.in_proj_qkv.weight": ("qkv", None),
    "linear_attn.in_proj_z.weight": ("value", None),
    "linear_attn.in_proj_b.weight": ("value_head", None),
    "linear_attn.in_proj_a.weight": ("value_head", None),
    "linear_attn.conv1d.weight": ("qkv", None, None),
    "linear_attn.A_log": ("value_head",),
    "linear_attn.dt_bias": ("value_head",),
    "linear_attn.out_proj.weight": (None, "value"),
    "mlp.experts.gate_up_proj": ("expert", "gate_up", None),
    "mlp.experts.down_proj": ("expert", None, "inner"),
    "mlp.shared_expert.gate_proj.weight": ("shared_inner", None),
    "mlp.shared_expert.up_proj.weight": ("shared_inner", None),
    "mlp.shared_expert.down_proj.weight": (None, "shared_inner"),
    "mlp.gate_proj.weight": ("dense_inner", None),
    "mlp.up_proj.weight": ("dense_inner", None),
    "mlp.down_proj.weight": (None, "dense_inner"),
}
# Stacks of experts, and what of the shared expert lies in them where it is fused.
_FUSED = (
    ("experts.gate_up_proj", "shared_expert.gate_proj.weight"),
    ("experts.gate_up_proj", "shared_expert.up_proj.weight"),
    ("experts.down_proj", "shared_expert.down_proj.weight"),
)
_ANY = jnp.dtype(jnp.float32)  # where only places matter
_ENDING = re.compile(r"(?:layers\.\d+\.)?(.*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model lies on a mesh.

    Attributes:
        config: of the whole model.
        mesh: from `make_mesh`, or only its shape, where nothing is computed.
        attention: what the expert axis is to attention, Gated DeltaNet, dense MLPs and vocabulary: "tensor"
            (more head shards) or "data" (other rows of the batch).
        shared_expert: one of `SHARED_EXPERT_MODES`; see `parallel/expert_dispatch.py`. "auto" stands for
            "prescaled", or "outside" with `exact`. Where the model has none, it becomes `NO_SHARED_EXPERT`.
        expert_dispatch: "psum" or "all_to_all".
        exact: logits do not depend on the size of the expert axis, bit by bit. Attention, Gated DeltaNet and
            vocabulary are then the same on every rank of the expert axis.
        ragged: all-to-all sends only the rows there are (`lax.ragged_all_to_all`), where the backend can.
        sums: what parts of sums travel in between ranks: "compute" (the compute dtype, half the bytes in
            bfloat16, each part rounded once), "float32", or "auto", which is "float32" with `exact`, else
            "compute".
    """

    config: ModelConfig
    mesh: Mesh | AbstractMesh
    attention: str = "tensor"
    shared_expert: str = "auto"
    expert_dispatch: str = "psum"
    exact: bool = False
    ragged: bool = False
    sums: str = "auto"

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        _check_choice("attention", self.attention, ATTENTION_MODES)
        object.__setattr__(self, "shared_expert", self._mode())
        _check_choice("expert_dispatch", self.expert_dispatch, DISPATCHES)
        if self.expert_dispatch == "all_to_all" and not self.config.num_experts:
            raise InputError(
                "expert_dispatch is 'all_to_all', and this model has no experts to send tokens to; leave it "
                "at 'psum'."
            )
        _check_choice("sums", self.sums, SUMS)
        if self.shared_expert == "fused":
            check_fusable(self.config)
        if self.exact:
            self._check_exact()

    def _mode(self) -> str:
        """The mode that `shared_expert` asks for."""
        has_shared = self.config.shared_expert_intermediate_size > 0
        if not has_shared and self.shared_expert in ("auto", NO_SHARED_EXPERT):
            return NO_SHARED_EXPERT
        if self.shared_expert == "auto":
            return "outside" if self.exact else "prescaled"
        _check_choice("shared_expert", self.shared_expert, (*SHARED_EXPERT_MODES, "auto"))
        if not has_shared:
            raise InputError(
                f"shared_expert is {self.shared_expert!r}, and this model has no shared expert; leave it at "
                "'auto'."
            )
        return self.shared_expert

    def sum_dtype(self, compute: DTypeLike) -> jnp.dtype:
        """What parts of sums travel in, of a model that computes in a dtype."""
        narrow = self.sums == "compute" or (self.sums == "auto" and not self.exact)
        return jnp.dtype(compute if narrow else jnp.float32)

    def _check_exact(self) -> None:
        if self.sums == "compute":
            raise InputError(
                "exact=True was given with sums='compute', which rounds them; expected 'float32'."
            )
        for name, given, wanted in (
            ("expert_dispatch", self.expert_dispatch, "psum"),
            ("attention", self.attention, "tensor"),
            ("shared_expert", self.shared_expert, "outside"),
        ):
            if given not in (wanted, NO_SHARED_EXPERT):
                raise InputError(
                    f"exact=True was given with {name}={given!r}, whose sums depend on the number of ranks; "
                    f"expected {wanted!r}."
                )

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        attention = "not divided over expert" if self.exact else f"over expert as {self.attention}"
        exact = ", exact" if self.exact else ""
        shared = "" if self.shared_expert == NO_SHARED_EXPERT else f"shared expert {self.shared_expert}, "
        experts = f"dispatch {self.expert_dispatch}, " if self.config.num_experts else "no experts, "
        return f"mesh {sizes}: {shared}{experts}attention {attention}{exact}"

    # Axes of the mesh that something is divided along; axes of one rank divide nothing.

    def _real(self, *axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """What the rows of a batch are divided along."""
        return self._real(DATA, EXPERT) if self.attention == "data" else self._real(DATA)

    @property
    def head_axes(self) -> tuple[str, ...]:
        """What heads, inner rows of dense MLPs and vocabulary are divided along."""
        if self.exact or self.attention == "data":
            return self._real(TENSOR)
        return self._real(EXPERT, TENSOR)

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """What the shared expert's inner rows are divided along."""
        if self.shared_expert == "sharded" and self.expert_dispatch == "psum":
            return self._real(EXPERT, TENSOR)
        return self._real(TENSOR)

    @property
    def scatter_ranks(self) -> int:
        """Ranks among which the residual stream of many tokens is scattered (`Ranks.scatters`); 1 where it
        never is: where ranks of the expert axis have different tokens, where all-to-all divides them, where
        the shared expert has a sum of its own, and with `exact`."""
        own_sum = self.shared_expert == "outside" and bool(self._real(TENSOR))
        if self.exact or own_sum or self.expert_dispatch != "psum" or self.tokens_divided:
            return 1
        return self.ranks_along(self.head_axes)

    def ranks_along(self, axes: tuple[str, ...]) -> int:
        """How many ranks there are along these axes."""
        return int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=np.int64))

    @property
    def batch_multiple(self) -> int:
        """What the number of rows of a batch must be a multiple of."""
        return self.ranks_along(self.batch_axes)

    @property
    def tokens_divided(self) -> bool:
        """Whether ranks of the expert axis have rows of their own."""
        return EXPERT in self.batch_axes

    def local_rows(self, batch: int) -> int:
        """Rows of a batch that a device has."""
        return -(-batch // self.batch_multiple)

    def group_rows(self, batch: int) -> int:
        """Rows of a batch whose tokens may choose a device's experts."""
        own = self.local_rows(batch)
        return min(batch, own * self.mesh.shape[EXPERT]) if self.tokens_divided else own

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Logical axis -> how it is divided."""
        c = self.config
        heads = self.ranks_along(self.head_axes)
        attention = divide_heads(c.num_attention_heads, c.num_key_value_heads, heads)
        delta = divide_heads(c.linear_num_value_heads, c.linear_num_key_heads, heads)

        def queries(width: int) -> Section:
            return Section(width, c.num_attention_heads, attention.queries, attention.query_starts)

        def values(width: int) -> Section:
            return Section(width, c.linear_num_value_heads, delta.queries, delta.query_starts)

        kv = Section(c.head_dim, c.num_key_value_heads, attention.keys, attention.key_starts)
        keys = Section(c.linear_key_head_dim, c.linear_num_key_heads, delta.keys, delta.key_starts)
        tensor, experts = self._real(TENSOR), self._real(EXPERT)
        inner = _inner(c, c.moe_intermediate_size, self.ranks_along(tensor))
        shared = _inner(c, c.shared_expert_intermediate_size, self.ranks_along(self.shared_axes))
        dense = _inner(c, c.intermediate_size, heads)
        expert_sections = (Section.even(c.num_experts, self.ranks_along(experts)),)
        if self.shared_expert == "fused":
            # room for one more, which the shared expert fills
            expert_sections += (Section(1, 0, 1, (0,) * self.ranks_along(experts)),)
        return {
            "vocab": Split(self.head_axes, (Section.even(c.vocab_size, heads),)),
            "query_gate": Split(self.head_axes, (queries(c.head_dim * (2 if c.attn_output_gate else 1)),)),
            "query": Split(self.head_axes, (queries(c.head_dim),)),
            "kv": Split(self.head_axes, (kv,)),
            "qkv": Split(self.head_axes, (keys, keys, values(c.linear_value_head_dim))),
            "value": Split(self.head_axes, (values(c.linear_value_head_dim),)),
            "value_head": Split(self.head_axes, (values(1),)),
            "expert": Split(experts, expert_sections),
            "gate_up": Split(tensor, (inner, inner)),
            "inner": Split(tensor, (inner,)),
            "shared_inner": Split(self.shared_axes, (shared,)),
            "dense_inner": Split(self.head_axes, (dense,)),
        }

    def ranks(self, compute: DTypeLike) -> MeshRanks:
        """What a model that computes in a dtype asks each rank."""
        return MeshRanks(
            head_axes=self.head_axes,
            expert_axes=self._real(EXPERT),
            tensor_axes=self._real(TENSOR),
            shared_axes=self.shared_axes,
            expert_ranks=self.mesh.shape[EXPERT],
            experts_held=self.splits["expert"].sections[0].held,
            vocab_held=self.splits["vocab"].local_size,
            vocab_size=self.config.vocab_size,
            shared_expert=self.shared_expert,
            expert_dispatch=self.expert_dispatch,
            tokens_divided=self.tokens_divided,
            scatter_ranks=self.scatter_ranks,
            exact=self.exact,
            ragged=self.ragged,
            sum_dtype=self.sum_dtype(compute),
        )

    def dimensions(self, name: str, rank: int) -> tuple[Split | None, ...]:
        """How each of a parameter's dimensions is divided.

        Args:
            name: canonical.
            rank: its number of dimensions.
        """
        ending = _ENDING.fullmatch(name)
        # scales are divided as their matrix
        axes = _TABLE.get(matrix_name(ending.group(1) if ending else name), (None,) * rank)
        return tuple(None if axis is None else self.splits[axis] for axis in axes)

    def spec(self, name: str, rank: int) -> PartitionSpec:
        """The mesh axes of each dimension of a parameter."""
        return _spec(self.dimensions(name, rank))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A sharding on this mesh."""
        return NamedSharding(self.mesh, spec)

    def targets(self, policy: DtypePolicy) -> dict[str, Target]:
        """Every parameter as it is held on the mesh, by canonical name; fused, the shared expert is part of
        the expert stacks and has no parameters of its own."""
        return self.part_targets(parameter_shapes(self.config), parameter_forms(self.config), policy)[0]

    @property
    def forms(self) -> Forms:
        """How each matrix of codes is held."""
        policy = DtypePolicy(compute=_ANY, matrix=_ANY)
        return self.part_targets(parameter_shapes(self.config), parameter_forms(self.config), policy)[1]

    def part_targets(
        self, shapes: Mapping[str, tuple[int, ...]], forms: Forms, policy: DtypePolicy
    ) -> tuple[dict[str, Target], Forms]:
        """As `targets` and `forms`, of another set of parameters: decoder layers, and what is the same on
        every rank.

        Args:
            shapes, forms: as of `checkpoint.layout.parameter_shapes` and `parameter_forms`.
            policy: dtypes to hold them in.
        """
        targets = {}
        for name, stored in shapes.items():
            if is_side(name):
                continue
            shape = whole_shape(name, stored, forms)
            if self.shared_expert == "fused" and ".mlp.shared_expert." in name:
                continue
            dimensions = self.dimensions(name, len(shape))
            held = tuple(
                size if split is None else split.size for size, split in zip(shape, dimensions, strict=True)
            )
            struct = jax.ShapeDtypeStruct(
                held,
                policy.matrix if is_matrix(name) else policy.vector,
                sharding=self.sharding(_spec(dimensions)),
            )
            targets[name] = Target(struct, Copies(name, shape, dimensions, self._shared_slot_of(name)))
        return with_scales(targets, shapes, forms)

    def _shared_slot_of(self, name: str) -> SharedSlot | None:
        """Where in a stack of experts the shared expert lies; None in what it is no part of."""
        if self.shared_expert != "fused" or ".mlp.experts." not in name:
            return None
        return SharedSlot(self.splits["expert"].local_size - 1, self.splits["inner"], self.config.hidden_size)

    def stored(
        self,
        parameters: Mapping[str, jax.Array],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        forms: Forms | None = None,
    ) -> dict[str, np.ndarray]:
        """The parameters as a checkpoint has them, from arrays that lie on this mesh; all of it on the host.

        Args:
            parameters: canonical name -> array.
            shapes, forms: of another set of parameters, as of `part_targets`; None for the text model's.

        Raises:
            InputError: another process holds some of them.
        """
        if jax.process_count() > 1:
            raise InputError(
                "the model lies on the devices of several processes; save it from a model loaded in one."
            )
        if shapes is None or forms is None:
            shapes, forms = parameter_shapes(self.config), parameter_forms(self.config)
        matrix = next(v.dtype for name, v in parameters.items() if is_matrix(name) and name not in forms)
        policy = DtypePolicy(compute=matrix, matrix=matrix)
        hosts = {name: np.zeros(shape, stored_dtype(name, forms, matrix)) for name, shape in shapes.items()}
        for name, target in self.part_targets(shapes, forms, policy)[0].items():
            give_back(target, parameters[name], hosts)
        return hosts


def _inner(config: ModelConfig, size: int, ranks: int) -> Section:
    """Inner rows of an expert, which are columns of its last matrix; of 4-bit codes two share a byte."""
    width = codes_a_byte(config) if size % codes_a_byte(config) == 0 else 1
    return Section.even(size // width, ranks, width)


def _spec(dimensions: tuple[Split | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if split is None else split.axes or None for split in dimensions))


def _check_choice(what: str, given: Any, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"{what} is {given!r}; expected {', '.join(map(repr, choices))}.")


def frugal_mode(config: ModelConfig, *, exact: bool = False) -> str:
    """The mode in which ranks read and hold the least of the shared expert."""
    if not config.shared_expert_intermediate_size:
        return NO_SHARED_EXPERT
    return "outside" if exact else "sharded"


def check_fusable(config: ModelConfig) -> None:
    """Raises InputError unless the shared expert fits into a slot of the expert stacks."""
    shared, routed = config.shared_expert_intermediate_size, config.moe_intermediate_size
    if shared != routed:
        raise InputError(
            "shared_expert='fused' needs a shared expert as wide as the others, and this model's are "
            f"{shared} and {routed} wide; use 'prescaled', 'outside', 'sharded' or 'auto'."
        )
    for layer in [i for i, kind in enumerate(config.layers) if kind.mlp == SPARSE]:
        for stack, part in _FUSED:
            own, others = (matrix_scheme(config, f"layers.{layer}.mlp.{name}") for name in (part, stack))
            if own != others:
                raise InputError(
                    "shared_expert='fused' needs a shared expert in the format of the others, and this "
                    f"model's are {own or 'not quantised'} and {others or 'not quantised'}; use 'prescaled', "
                    "'outside', 'sharded' or 'auto'."
                )

"""The least that a step has to read, compute and exchange on one device of a layout, and the time that takes.

A compiled program can be compared with it, and no program of this library on such a device can be faster.
Counted are matrix products, attention over visible keys, the delta rule as its recurrence and the
convolution; of memory, weights, caches and states, each once. Not counted is what a program may keep on the
chip or hide: activations, norms, softmax, sampling, the time that a launch or a message takes to begin.

All numbers are for the device that has the most of everything: rows, heads and experts that do not divide
evenly are rounded up. Experts are taken to be chosen evenly and independently: their part is an expectation.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import comb, prod
from typing import Any

from qwen_moe_jax.checkpoint.inspect import by_component, size_in_words
from qwen_moe_jax.checkpoint.layout import whole_shape
from qwen_moe_jax.checkpoint.names import is_matrix, is_side
from qwen_moe_jax.config import DENSE, FULL_ATTENTION, LINEAR_ATTENTION, SPARSE
from qwen_moe_jax.devices import Device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.memory import holding
from qwen_moe_jax.parallel.mesh import EXPERT, TENSOR
from qwen_moe_jax.parallel.ranks import is_scattered

# Sums over ranks are float32, as are logits; ids and weights of all_to_all have 4 bytes too.
_WIDE = 4
# An AMD device has one to each other of its host; NVIDIA's are switched, so that any group has all of them.
_LINKS = 7
_EMBEDDING = "embed_tokens.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The least work of one step on one device; `str()` is a table.

    Parts are the components of `checkpoint.inspect` (bytes of weights, and flops of products with them), and
    those that have no weights.

    Attributes:
        bytes: part -> bytes read and written; beside the components "keys and values" and "recurrent state"
            (with the convolution's inputs).
        flops: part -> floating-point operations, two a multiply-add; beside the components "attention over
            keys" and "delta rule".
        tokens: new tokens that the step gives in the whole mesh.
    """

    bytes: Mapping[str, float]
    flops: Mapping[str, float]
    tokens: int

    @property
    def total_bytes(self) -> float:
        """Of all parts."""
        return sum(self.bytes.values())

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())

    def __str__(self) -> str:
        parts = list(dict.fromkeys([*self.bytes, *self.flops]))
        rows = [(part, self.bytes.get(part, 0), self.flops.get(part, 0)) for part in parts]
        rows.append(("total", self.total_bytes, self.total_flops))
        return "\n".join(
            [
                f"{'least work of a device':<24}{'bytes':>12}{'GFLOP':>12}",
                *(
                    f"  {part:<22}{size_in_words(int(size)):>12}{flops / 1e9:>12.4g}"
                    for part, size, flops in rows
                ),
            ]
        )


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between ranks, as often as a step has it.

    Attributes:
        operation: "all-reduce", "all-gather", "reduce-scatter" or "all-to-all".
        what: is exchanged, in words.
        count: how many a step.
        ranks: that take part.
        bytes: of the array, a device and time: what is reduced, all that is gathered, all that is scattered,
            or what a device has for all ranks together.
    """

    operation: str
    what: str
    count: int
    ranks: int
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that a device has to send, at least, all times together.

        All but its own n-th part, of a sum twice: what a ring does, and no algorithm improves on unless the
        network itself adds (Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
        """
        times = 2 if self.operation == "all-reduce" else 1
        return self.count * times * self.bytes * (self.ranks - 1) / self.ranks

    def seconds(self, device: Device) -> float:
        """At the full bandwidth of its links to the others of the group."""
        links = min(1, (self.ranks - 1) / _LINKS) if device.arch.startswith("gfx") else 1
        return self.sent / (links * device.link_bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """How fast a step can be at best: an upper bound that programs come near to, never a prediction.

    Attributes:
        memory_seconds: to read and write the bytes at the memory's full bandwidth.
        flop_seconds: to compute the products at the peak of dense matrix units; softer limits, as of the
            float32 products of the delta rule, are not in it.
        exchange_seconds: to send what collectives have to, at the links' full bandwidth.
        tokens: new tokens a step, of the whole mesh.
    """

    memory_seconds: float
    flop_seconds: float
    exchange_seconds: float
    tokens: int

    @property
    def seconds(self) -> float:
        """Of a step. Reading and computing overlap; exchanges are added, because here a sum over ranks waits
        for the products before it, and all that follows for the sum (but for a shared expert that is not in
        that sum: "outside", and in all_to_all)."""
        return max(self.memory_seconds, self.flop_seconds) + self.exchange_seconds

    @property
    def bound(self) -> str:
        """What takes the most of it: "memory", "FLOPs" or "links"."""
        shares = self.memory_seconds, self.flop_seconds, self.exchange_seconds
        return max(zip(shares, ("memory", "FLOPs", "links"), strict=True))[1]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of the whole mesh, at most."""
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class _Share:
    """What one device meets of a step's new tokens.

    Attributes:
        rows: of the batch whose attention is computed here.
        own: tokens of these rows.
        group: tokens that may be routed to the experts here.
        mixed: tokens whose routing is computed here.
        shared: tokens that the shared expert is applied to here.
        slots: of `group`, how many experts held here are chosen, on average, a token counted once an expert.
        held: routed experts here.
    """

    rows: int
    own: int
    group: int
    mixed: int
    shared: int
    slots: float
    held: int

    @classmethod
    def of(cls, layout: Layout, batch: int, tokens: int) -> "_Share":
        config, experts = layout.config, layout.mesh.shape[EXPERT]
        divided, rows = layout.tokens_divided, layout.local_rows(batch)
        own, group = rows * tokens, layout.group_rows(batch) * tokens
        exchanged = layout.expert_dispatch == "all_to_all" and experts > 1
        mixed = (own if divided else -(-own // experts)) if exchanged else group
        if layout.shared_expert == "fused" and not exchanged:
            shared = -(-mixed // experts)
        elif layout.shared_expert == "outside" and not exchanged:
            # of a scattered residual stream each rank has its own tokens
            scattered = is_scattered(layout.scatter_ranks, rows, tokens)
            shared = own // layout.scatter_ranks if scattered else own
        else:
            shared = mixed
        held = min(layout.splits["expert"].sections[0].held, config.num_experts)
        slots = group * config.num_experts_per_tok * held / max(1, config.num_experts)
        return cls(rows, own, group, mixed, shared, slots, held)


def expected_experts(held: int, experts: int, top_k: int, tokens: int) -> float:
    """How many of the held experts any of the tokens chooses, on average.

    Each token chooses top_k different ones of all experts evenly, and so passes over a given one with
    probability 1 - top_k / experts, independently of the others.
    """
    return held * (1 - (1 - top_k / experts) ** tokens) if experts else 0


def least_work(layout: Layout, policy: DtypePolicy, *, batch: int, tokens: int, context: int) -> Work:
    """The least work of a step that gives every row of the batch some tokens more.

    Args:
        layout: on a mesh, also one without devices or of one.
        policy: dtypes of matrices, activations and caches; matrices that the configuration has in few bits
            are that, with their scales.
        batch: rows in the whole mesh.
        tokens: new ones a row; 1 is decode.
        context: tokens a row in the caches before them.

    Raises:
        InputError: a size that is none.
    """
    _check_sizes(batch=(batch, 1), tokens=(tokens, 1), context=(context, 0))
    share = _Share.of(layout, batch, tokens)
    return Work(
        bytes=_bytes(layout, policy, share, tokens, context),
        flops=_flops(layout, policy, share, tokens, context),
        tokens=batch * tokens,
    )


def roofline(
    work: Work, device: Device, *, dtype: str = "bfloat16", collectives: Iterable[Collective] = ()
) -> Roofline:
    """The least time that work takes on a device.

    Args:
        work: from `least_work`.
        device: of `devices.py`.
        dtype: of the matrix products, a key of `device.peak_flops`. This library multiplies matrices of codes
            out, so its products are bfloat16.
        collectives: from `collective_bytes`.

    Raises:
        InputError: the device has no peak for that dtype.
    """
    if dtype not in device.peak_flops:
        raise InputError(
            f"dtype is {dtype!r}; expected what {device.name} has a peak for: {', '.join(device.peak_flops)}."
        )
    return Roofline(
        memory_seconds=work.total_bytes / device.bandwidth,
        flop_seconds=work.total_flops / device.peak_flops[dtype],
        exchange_seconds=sum(collective.seconds(device) for collective in collectives),
        tokens=work.tokens,
    )


def collective_bytes(
    layout: Layout, policy: DtypePolicy, *, batch: int, tokens: int
) -> tuple[Collective, ...]:
    """The exchanges of a step that ends with the logits of one position a row; () on one device.

    Arguments and errors as of `least_work`. Where all-to-all is ragged, only the rows that are expected to be
    sent count, and otherwise all of the room for them.
    """
    _check_sizes(batch=(batch, 1), tokens=(tokens, 1))
    share = _Share.of(layout, batch, tokens)
    heads, kinds = layout.ranks_along(layout.head_axes), layout.config.mlp_types
    stream = share.own * layout.config.hidden_size * layout.sum_dtype(policy.compute).itemsize
    logits = share.rows * layout.splits["vocab"].size * policy.compute.itemsize
    gather = Collective("all-gather", "logits", 1, heads, logits)
    if is_scattered(layout.scatter_ranks, share.rows, tokens):
        blocks = 2 * len(kinds)  # token mixers and MLPs
        normed = share.own * layout.config.hidden_size * policy.compute.itemsize
        return (
            Collective("all-gather", "residual stream", blocks, heads, normed),
            Collective("reduce-scatter", "residual stream", 1 + blocks, heads, stream),
            gather,
        )
    found = [
        Collective("all-reduce", "embedding", 1, heads, stream),
        Collective("all-reduce", "heads", len(kinds), heads, stream),
        *(
            dataclasses.replace(each, count=kinds.count(SPARSE))
            for each in (_mixture(layout, policy, share) if SPARSE in kinds else ())
        ),
        Collective("all-reduce", "dense MLP", kinds.count(DENSE), heads, stream),
        gather,
    ]
    return tuple(each for each in found if each.ranks > 1 and each.count)


def _mixture(layout: Layout, policy: DtypePolicy, share: _Share) -> list[Collective]:
    """Of one mixture of experts, in order (`parallel/expert_dispatch.py`); those among one rank are none."""
    sizes, config = layout.mesh.shape, layout.config
    experts, tensor, width = (
        sizes[EXPERT],
        sizes[TENSOR],
        config.hidden_size * layout.sum_dtype(policy.compute).itemsize,
    )
    divided = layout.tokens_divided
    own_sum = [Collective("all-reduce", "shared expert", 1, tensor, share.shared * width)]
    own_sum *= layout.shared_expert == "outside"
    if layout.exact:
        return [
            Collective("all-reduce", "slots", 1, experts, share.own * config.num_experts_per_tok * width),
            Collective("all-reduce", "experts", 1, tensor, share.own * width),
        ]
    if layout.expert_dispatch == "all_to_all":
        return [
            *_exchanges(layout, policy, share),
            Collective("all-reduce", "experts", 1, tensor, share.mixed * width),
            *own_sum,
            Collective("all-gather", "tokens", 1, 1 if divided else experts, share.mixed * experts * width),
        ]
    if divided:
        # with the mark of a pad
        row = (config.hidden_size + 1) * policy.compute.itemsize
        return [
            Collective("all-gather", "tokens", 1, experts, share.group * row),
            Collective("reduce-scatter", "experts", 1, experts, share.group * width),
            Collective("all-reduce", "experts", 1, tensor, share.own * width),
            *own_sum,
        ]
    return [Collective("all-reduce", "experts", 1, experts * tensor, share.group * width), *own_sum]


def _exchanges(layout: Layout, policy: DtypePolicy, share: _Share) -> list[Collective]:
    """Of `parallel/token_exchange.py`: ids with weights, tokens, outputs."""
    config, ranks = layout.config, layout.mesh.shape[EXPERT]
    top_k, hidden = config.num_experts_per_tok, config.hidden_size
    rows = float(ranks * share.mixed)
    if layout.ragged:
        # a token goes to a rank unless all its experts are among those of the others
        elsewhere = comb(config.num_experts - share.held, top_k) / comb(config.num_experts, top_k)
        rows *= 1 - elsewhere
    return [
        Collective("all-to-all", "ids", 1, ranks, ranks * (share.mixed + 1) * 2 * top_k * _WIDE),
        Collective("all-to-all", "tokens", 1, ranks, rows * hidden * policy.compute.itemsize),
        Collective(
            "all-to-all", "outputs", 1, ranks, rows * hidden * layout.sum_dtype(policy.compute).itemsize
        ),
    ]


def _bytes(layout: Layout, policy: DtypePolicy, share: _Share, tokens: int, context: int) -> dict[str, float]:
    config = layout.config
    found: defaultdict[str, float] = defaultdict(float)
    chosen = expected_experts(share.held, config.num_experts, config.num_experts_per_tok, share.group)
    for name, shape, size in _held(layout, policy):
        if ".mlp.experts." in name:
            found["routed experts"] += size / shape[0] * chosen
            if layout.shared_expert == "fused":
                found["shared expert"] += size / shape[0]
        elif name == _EMBEDDING:
            # rows of the tokens, as many of which lie here as of the vocabulary
            found["embedding"] += share.own * size / max(shape[0], config.vocab_size)
            found["lm_head"] += size if config.tie_word_embeddings else 0
        else:
            found[_component(name)] += size
    held = holding(_one_of_each_mixer(layout), policy)
    full, linear = map(config.layer_types.count, (FULL_ATTENTION, LINEAR_ATTENTION))
    found["keys and values"] += full * share.rows * (context + tokens) * held.kv_per_token
    found["recurrent state"] += linear * share.rows * 2 * held.state  # read and written
    return _used(found)


def _flops(layout: Layout, policy: DtypePolicy, share: _Share, tokens: int, context: int) -> dict[str, float]:
    config, splits = layout.config, layout.splits
    found: defaultdict[str, float] = defaultdict(float)
    forms = _one_of_each_kind(layout).forms
    for name, held, _ in _held(layout, policy):
        shape = whole_shape(name, held, forms)
        if name == _EMBEDDING:
            found["lm_head"] += 2 * share.rows * prod(shape) if config.tie_word_embeddings else 0
        elif ".mlp.experts." in name and not is_side(name):
            found["routed experts"] += 2 * share.slots * prod(shape[1:])
            if layout.shared_expert == "fused":
                found["shared expert"] += 2 * share.shared * prod(shape[1:])
        elif is_matrix(name) or name.endswith("conv1d.weight"):
            part = _component(name)
            met = {"lm_head": share.rows, "router": share.mixed, "shared expert": share.shared}
            if name.endswith("shared_expert_gate.weight") and layout.shared_expert == "fused":
                met["shared expert"] = share.mixed  # before it is known whose turn a token is
            found[part] += 2 * met.get(part, share.own) * prod(shape)
    # a new token sees those before it and itself
    pairs = share.rows * (tokens * context + tokens * (tokens + 1) // 2)
    full, linear = map(config.layer_types.count, (FULL_ATTENTION, LINEAR_ATTENTION))
    found["attention over keys"] += full * 4 * pairs * splits["query"].local_size
    # S e^g, then S^T k, k d^T and S^T q
    state = splits["value_head"].local_size * config.linear_key_head_dim * config.linear_value_head_dim
    found["delta rule"] += linear * 7 * share.own * state
    return _used(found)


@functools.lru_cache(maxsize=64)  # a curve asks for as many batches of a layout
def _held(layout: Layout, policy: DtypePolicy) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """(name, shape, bytes) of every array that a device holds; layers of a kind are alike, names included."""
    return tuple(_each_held(layout, policy))


def _each_held(layout: Layout, policy: DtypePolicy) -> Iterator[tuple[str, tuple[int, ...], int]]:
    kinds = list(dict.fromkeys(layout.config.layers))
    for name, target in _one_of_each_kind(layout).targets(policy).items():
        struct = target.struct
        shape = struct.sharding.shard_shape(struct.shape)
        layer = re.match(r"layers\.(\d+)\.", name)
        times = layout.config.layers.count(kinds[int(layer[1])]) if layer else 1
        yield from [(name, shape, prod(shape) * struct.dtype.itemsize)] * times


def _one_of_each_kind(layout: Layout) -> Layout:
    """With one layer of each kind, so that what follows of it costs little."""
    kinds = tuple(dict.fromkeys(layout.config.layers))
    return dataclasses.replace(layout, config=layout.config.with_layers(kinds))


def _one_of_each_mixer(layout: Layout) -> Layout:
    """With one layer of each token mixer, which is what caches are of."""
    kinds = {kind.mixer: kind for kind in layout.config.layers}
    return dataclasses.replace(layout, config=layout.config.with_layers(tuple(kinds.values())))


@functools.lru_cache(maxsize=1024)
def _component(name: str) -> str:
    return next(iter(by_component({name: 1})))


def _used(parts: Mapping[str, float]) -> dict[str, float]:
    return {part: float(number) for part, number in parts.items() if number}


def _check_sizes(**sizes: tuple[Any, int]) -> None:
    for name, (given, least) in sizes.items():
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise InputError(f"{name} is {given!r}; expected a whole number, {least} or more.")

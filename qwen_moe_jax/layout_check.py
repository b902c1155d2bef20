"""Compares a mesh with one device, layer by layer, before it serves anyone.

Both sides are given the same residual stream, so that a disagreement is found in the layer and branch where
it arises: attention or Gated DeltaNet, and of the mixture of experts the routed and shared part, each with
the other one's weights at zero. One layer's weights are held at a time, beside a model that is loaded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from tqdm import tqdm

from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.config import DENSE, FULL_ATTENTION, LayerKind, ModelConfig
from qwen_moe_jax.formats.cache import Placement, empty_cache, own_rows
from qwen_moe_jax.generation.loading import read_weights, whole_decoder
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import Decoder, DecoderLayer, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.caches import cache_specs
from qwen_moe_jax.parallel.forward import MeshForward, layout_decoder
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.ranks import can_scatter

# Largest |mesh - one device| over the largest |one device| of a branch. float32: sums in another order, which
# are at 1e-6; a branch counted twice is at 1. bfloat16: an inner value that is rounded the other way.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Router logits closer than this may choose either expert; such tokens are left out.
ROUTER_TIE = 1e-3

PROMPT = 24  # tokens read at once; one more follows by itself, through the caches
_CAPACITY = 32

Parameters = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One branch on the mesh against one device.

    Attributes:
        place: "embedding", "layer 3" or "logits".
        branch: "attention", "Gated DeltaNet", "routed experts", "shared expert", or that of the place.
        difference: largest absolute, over the largest absolute value of one device's.
    """

    place: str
    branch: str
    difference: float


@dataclasses.dataclass(frozen=True)
class LayoutReport:
    """What the comparison found; `str()` is the printed report.

    Attributes:
        layout: described in words.
        comparisons: in the order of a token's way.
        tolerance: for every difference.
        tokens: compared in each layer.
        ties: tokens, over all layers, left out of the routed experts' comparison.
    """

    layout: str
    comparisons: tuple[Comparison, ...]
    tolerance: float
    tokens: int
    ties: int

    @property
    def disagreements(self) -> tuple[Comparison, ...]:
        """Comparisons beyond the tolerance; a NaN is one."""
        return tuple(c for c in self.comparisons if not c.difference <= self.tolerance)

    @property
    def ok(self) -> bool:
        """Whether the mesh computes what one device does."""
        return not self.disagreements

    def __str__(self) -> str:
        lines = [f"{self.layout}, against one device on {self.tokens} random tokens"]
        for branch in dict.fromkeys(c.branch for c in self.comparisons):
            found = [c for c in self.comparisons if c.branch == branch]
            # a NaN is worse than anything
            worst = max(found, key=lambda c: np.nan_to_num(c.difference, nan=np.inf))
            lines.append(f"  {branch:<16} largest difference {worst.difference:.1e} ({worst.place})")
        if self.ties:
            lines.append(
                f"  {self.ties} tokens with tied experts were left out of the routed experts' comparison"
            )
        for c in self.disagreements:
            lines.append(
                f"DISAGREES  {c.place}, {c.branch}: {c.difference:.2e}, tolerance {self.tolerance:.0e}"
            )
        if self.ok:
            lines.append(f"agrees in every layer and branch (tolerance {self.tolerance:.0e})")
        return "\n".join(lines)


def check_layout(
    folder: Path,
    layout: Layout,
    compute: jnp.dtype,
    kernels: Kernels,
    *,
    parameters: Parameters | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LayoutReport:
    """Compares a layout with one device on random tokens.

    Args:
        folder: the checkpoint.
        layout: of it on a mesh.
        compute: the compute dtype.
        kernels: what it is compiled for.
        parameters: a loaded model's, on that mesh; None reads them, a layer at a time.
        seed: of the tokens.
        progress: show a bar on standard error.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit its configuration.
    """
    config = layout.config
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    reader = _Reader(folder, config, policy, parameters)
    rng = np.random.default_rng(seed)
    batch = 2 * layout.batch_multiple
    tokens = rng.integers(0, config.vocab_size, (batch, PROMPT + 1), np.int32)
    lengths = np.where(np.arange(batch) % 2, PROMPT, PROMPT // 3)  # every other row is padded
    valid = np.arange(PROMPT) < lengths[:, None]
    mask = np.concatenate([valid, np.ones((batch, 1), bool)], axis=1)
    comparisons: list[Comparison] = []
    ties = 0

    def compare(place: str, branch: str, found: np.ndarray, wanted: np.ndarray, where: np.ndarray) -> None:
        if where.any():
            found, wanted = found[where], wanted[where]
            largest = max(float(np.abs(wanted).max()), 1e-30)
            comparisons.append(Comparison(place, branch, float(np.abs(found - wanted).max()) / largest))

    sides = (_Side(layout, config, policy, kernels), _Side(None, config, policy, kernels))
    ends = [side.ends(reader) for side in sides]
    found, wanted = (side.embed(p, tokens, mask) for side, p in zip(sides, ends, strict=True))
    compare("embedding", "embedding", found, wanted, mask)
    x = wanted
    for i, kind in enumerate(tqdm(config.layers, desc="Checking layers", disable=not progress)):
        layers = [side.layer(kind, reader, i) for side in sides]
        found, wanted = (layer.mixed(x, valid) for layer in layers)
        mixer = "attention" if kind.mixer == FULL_ATTENTION else "Gated DeltaNet"
        compare(f"layer {i}", mixer, found, wanted, mask)
        x = x + wanted
        if kind.mlp == DENSE:
            found, wanted = (layer.fed(x, mask, None) for layer in layers)
            compare(f"layer {i}", "dense MLP", found, wanted, mask)
            x = x + wanted
            continue
        clear = mask & (layers[1].router_margin(x) >= ROUTER_TIE)
        ties += int((mask & ~clear).sum())
        branches = [("routed experts", "shared", clear), ("shared expert", "routed", mask)]
        for branch, silent, where in branches if config.shared_expert_intermediate_size else branches[:1]:
            found, wanted = (layer.fed(x, mask, silent) for layer in layers)
            compare(f"layer {i}", branch, found, wanted, where)
        x = x + layers[1].fed(x, mask, None)
    found, wanted = (side.logits(p, x) for side, p in zip(sides, ends, strict=True))
    compare("logits", "logits", found, wanted, mask)
    return LayoutReport(
        layout=str(layout),
        comparisons=tuple(comparisons),
        tolerance=TOLERANCES[compute.name],
        tokens=int(mask.sum()),
        ties=ties,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Where weights come from: the checkpoint, or for the mesh a loaded model."""

    folder: Path
    config: ModelConfig
    policy: DtypePolicy
    parameters: Parameters | None

    def read(self, names: list[str], layout: Layout | None) -> dict[str, jax.Array]:
        """The parameters of these names that there are, as a layout or one device holds them."""
        if layout is not None and self.parameters is not None:
            return {name: self.parameters[name] for name in names if name in self.parameters}
        if layout is not None:
            targets = layout.targets(self.policy)
        else:
            targets = whole_decoder(self.config, self.policy, Kernels("cpu"))[1]
        wanted = {name: targets[name] for name in names if name in targets}
        return read_weights(self.folder, self.config, self.policy, wanted)[0]


class _Side:
    """The mesh, or one device: compiled functions of one layer's parameters, shared by layers of a kind."""

    def __init__(self, layout: Layout | None, config: ModelConfig, policy: DtypePolicy, kernels: Kernels):
        self.layout = layout
        self.config = config
        self.policy = policy
        self.kernels = kernels
        self.kv_dtype = held_dtype(policy.compute, kernels)
        decoder = self.decoder(())
        self._embed = self.compiled(decoder, "", lambda d, tokens, valid: d.embed(tokens, valid))
        self._logits = self.compiled(decoder, "", lambda d, x: d.logits(d.finish(x)))
        self._kinds: dict[LayerKind, dict[str, Callable[..., Any]]] = {}

    def decoder(self, kinds: tuple[LayerKind, ...]) -> Decoder:
        """The abstract decoder with other layers."""
        config = self.config.with_layers(kinds)
        if self.layout is None:
            return whole_decoder(config, self.policy, self.kernels)[0]
        return layout_decoder(dataclasses.replace(self.layout, config=config), self.policy, self.kernels)

    def compiled(
        self, module: Any, prefix: str, function: Callable[..., Any], cache: Any = None
    ) -> Callable[..., Any]:
        """function(module with the parameters, *arrays) compiled.

        Args:
            module: abstract.
            prefix: of its parameters' names in a model.
            function: gives an array, with a cache (array, cache).
            cache: mesh axes of the last argument and the last result; None if there is none.
        """

        def on_a_rank(parameters: Parameters, *arrays: Any) -> Any:
            return function(with_parameters(module, parameters), *arrays)

        layout = self.layout
        if layout is None:
            return jax.jit(on_a_rank)
        batch = PartitionSpec(layout.batch_axes or None)
        whole = layout.sharding(PartitionSpec())

        def on_the_mesh(parameters: dict[str, jax.Array], *arrays: Any) -> Any:
            specs = {name: layout.spec(prefix + name, value.ndim) for name, value in parameters.items()}
            inputs = [batch] * len(arrays)
            if cache is not None:
                inputs[-1] = cache
            out = jax.shard_map(
                on_a_rank,
                mesh=layout.mesh,
                in_specs=(specs, *inputs),
                out_specs=batch if cache is None else (batch, cache),
            )(parameters, *arrays)
            # the array whole on every device, so that any process can read it
            if cache is None:
                return jax.lax.with_sharding_constraint(out, whole)
            return jax.lax.with_sharding_constraint(out[0], whole), out[1]

        return jax.jit(on_the_mesh)

    def ends(self, reader: _Reader) -> dict[str, jax.Array]:
        """The parameters before and behind the layers."""
        return reader.read(
            [n for n in parameter_shapes(reader.config) if not n.startswith("layers.")], self.layout
        )

    def embed(self, ends: Parameters, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The residual stream before the first layer."""
        return np.asarray(self._embed(ends, tokens, valid))

    def logits(self, ends: Parameters, x: np.ndarray) -> np.ndarray:
        """From the residual stream behind the last layer."""
        return np.asarray(self._logits(ends, x))

    def functions(self, kind: LayerKind) -> dict[str, Callable[..., Any]]:
        """The compiled functions of a kind of layer."""
        if kind not in self._kinds:
            decoder = self.decoder((kind,))
            layer, prefix = decoder.layers[0], "layers.0."
            cache = None
            if self.layout is not None:
                one = dataclasses.replace(self.layout, config=decoder.config)
                cache = cache_specs(one).layers[0]
            self._kinds[kind] = {
                "mix": self.compiled(layer, prefix, partial(self._mix, decoder), cache),
                "feed": self.compiled(layer, prefix, self._feed),
                "router": self.compiled(layer, prefix, lambda m, x: m.router_logits(x)),
            }
        return self._kinds[kind]

    def _scatters(self, x: jax.Array) -> bool:
        """Whether the residual stream is scattered here: wherever a longer one would be."""
        return self.layout is not None and can_scatter(self.layout.scatter_ranks, x.shape[1])

    def _mix(
        self,
        decoder: Decoder,
        layer: DecoderLayer,
        x: jax.Array,
        valid: jax.Array,
        rows: Placement,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """What the token mixer adds to a residual stream, and the cache after it."""
        step = dataclasses.replace(decoder.step(valid, rows), scattered=self._scatters(x))
        if not step.scattered:
            return layer.mix(x, step, cache)
        mixed, cache = layer.mix(layer.ranks.own_tokens(x), step, cache)
        return layer.ranks.all_tokens(mixed), cache

    def _feed(self, layer: DecoderLayer, x: jax.Array, valid: jax.Array) -> jax.Array:
        """What the MLP adds to a residual stream."""
        if not self._scatters(x):
            return layer.feed(x, valid)
        return layer.ranks.all_tokens(layer.feed(layer.ranks.own_tokens(x), valid, scattered=True))

    def layer(self, kind: LayerKind, reader: _Reader, index: int) -> "_Layer":
        """A layer with its weights."""
        prefix = f"layers.{index}."
        names = [name for name in parameter_shapes(reader.config) if name.startswith(prefix)]
        held = reader.read(names, self.layout)
        parameters = {name.removeprefix(prefix): value for name, value in held.items()}
        return _Layer(self, kind, parameters)


@dataclasses.dataclass(frozen=True)
class _Layer:
    side: _Side
    kind: LayerKind
    parameters: dict[str, jax.Array]

    def mixed(self, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """What the token mixer adds: a padded prompt read at once, then one token through the cache."""
        mix = self.side.functions(self.kind)["mix"]
        batch = len(x)
        ranks = 1 if self.side.layout is None else self.side.layout.batch_multiple
        # what the host gives is a NumPy array, equal in all processes
        rows = jax.tree.map(np.asarray, own_rows(batch, _CAPACITY, ranks))
        prompt, cache = mix(self.parameters, x[:, :PROMPT], valid, rows, self._empty_cache(batch))
        one, length = np.ones((batch, 1), bool), valid.sum(axis=1, dtype=np.int32)
        rows = dataclasses.replace(rows, length=length)
        last, _ = mix(self.parameters, x[:, PROMPT:], one, rows, cache)
        return np.concatenate([np.asarray(prompt), np.asarray(last)], axis=1)

    def _empty_cache(self, batch: int) -> Any:
        side = self.side
        config = side.config.with_layers((self.kind,))
        if side.layout is None:
            return empty_cache(config, batch, _CAPACITY, side.kv_dtype, side.policy.compute).layers[0]
        one = dataclasses.replace(side.layout, config=config)
        return MeshForward(one, side.policy, side.kernels, {}).new_cache(batch, _CAPACITY).layers[0]

    def fed(self, x: np.ndarray, valid: np.ndarray, silent: str | None) -> np.ndarray:
        """What the MLP adds, the last token by itself, with a silent branch."""
        parameters = self.parameters if silent is None else self._silenced(silent)
        feed = self.side.functions(self.kind)["feed"]
        parts = [(x[:, :PROMPT], valid[:, :PROMPT]), (x[:, PROMPT:], valid[:, PROMPT:])]
        return np.concatenate([np.asarray(feed(parameters, *part)) for part in parts], axis=1)

    def _silenced(self, branch: str) -> dict[str, jax.Array]:
        """The parameters with the last matrix of a branch, "routed" or "shared", at zero."""
        stack, shared = "mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"
        has_shared = self.side.config.shared_expert_intermediate_size > 0
        fused = has_shared and shared not in self.parameters
        if branch == "shared" and not has_shared:
            return self.parameters
        if fused or branch == "routed":
            value = self.parameters[stack]
            slots = 1 if self.side.layout is None else self.side.layout.splits["expert"].local_size
            # fused, the last slot of every rank is the shared expert
            is_shared = (np.arange(value.shape[0]) % slots == slots - 1) & fused
            keep = is_shared if branch == "routed" else ~is_shared
            return self.parameters | {stack: jnp.where(keep[:, None, None], value, jnp.zeros_like(value))}
        return self.parameters | {shared: jnp.zeros_like(self.parameters[shared])}

    def router_margin(self, x: np.ndarray) -> np.ndarray:
        """[batch, seq]: by how much the last expert chosen is ahead of the first one left out."""
        logits = np.sort(np.asarray(self.side.functions(self.kind)["router"](self.parameters, x)), axis=-1)
        top_k = self.side.config.num_experts_per_tok
        if top_k == logits.shape[-1]:
            return np.full(logits.shape[:-1], np.inf)
        return logits[..., -top_k] - logits[..., -top_k - 1]

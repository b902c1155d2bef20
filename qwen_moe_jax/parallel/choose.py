"""From what a user asks for to a layout; "auto" is decided by a measurement on the mesh itself."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from qwen_moe_jax.config import SPARSE, ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.forward import layout_decoder
from qwen_moe_jax.parallel.layout import NO_SHARED_EXPERT, SHARED_EXPERT_MODES, Layout, check_fusable
from qwen_moe_jax.parallel.mesh import EXPERT, check_mesh, make_mesh

# Tokens a row of the batch in the two measured calls: decode, and a chunk of a prompt.
_MEASURED_TOKENS = (1, 64)
_REPEATS = 5


def choose_layout(
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    compute: jnp.dtype,
    kernels: Kernels,
    shared_expert: str = "auto",
    expert_dispatch: str = "psum",
    exact: bool = False,
    attention: str = "tensor",
    sums: str = "auto",
) -> Layout | None:
    """The layout asked for; None where one device computes without one.

    Args:
        config: of the model.
        mesh: None means one device.
        compute: the compute dtype.
        kernels: what it is compiled for.
        shared_expert, expert_dispatch, exact, attention, sums: as of `QwenMoe.from_pretrained`.

    Raises:
        InputError: a mesh that is none, an unknown or contradictory choice.
    """
    auto = shared_expert == "auto"
    if mesh is None and not exact and shared_expert != "fused":
        # checks the choices, which one device has no use for
        one = make_mesh(devices=jax.local_devices()[:1])
        Layout(config, one, attention, shared_expert, expert_dispatch, sums=sums)
        return None
    if mesh is None:
        mesh = make_mesh(devices=jax.local_devices()[:1])
    layout = Layout(
        config,
        check_mesh(mesh),
        attention=attention,
        shared_expert=shared_expert,
        expert_dispatch=expert_dispatch,
        exact=exact,
        # XLA:CPU has no such operation
        ragged=kernels.target != "cpu",
        sums=sums,
    )
    has_choice = layout.shared_expert != NO_SHARED_EXPERT and SPARSE in config.mlp_types
    if not auto or exact or not has_choice:
        return layout
    seconds = measure_shared_expert(layout, compute, kernels)
    return dataclasses.replace(layout, shared_expert=min(seconds, key=seconds.__getitem__))


def measure_shared_expert(layout: Layout, compute: jnp.dtype, kernels: Kernels) -> dict[str, float]:
    """Seconds of one mixture of experts (decode and a prompt's chunk together) in each mode that is possible.

    The weights are random, of the layer's size; the fastest of a few calls counts. With several processes,
    all are given the first one's figures, so that they agree.
    """
    modes = list(SHARED_EXPERT_MODES)
    try:
        check_fusable(layout.config)
    except InputError:
        modes.remove("fused")
    if layout.mesh.shape[EXPERT] == 1:
        modes.remove("sharded")  # the same as prescaled
    found = {
        mode: _seconds(dataclasses.replace(layout, shared_expert=mode), compute, kernels) for mode in modes
    }
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        first = multihost_utils.broadcast_one_to_all(np.array(list(found.values()), np.float32))
        found = dict(zip(found, first.tolist(), strict=True))
    return found


def _seconds(layout: Layout, compute: jnp.dtype, kernels: Kernels) -> float:
    one_layer = layout.config.with_layers([kind for kind in layout.config.layers if kind.mlp == SPARSE][:1])
    layout = dataclasses.replace(layout, config=one_layer)
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    decoder = layout_decoder(layout, policy, kernels)
    targets = {name: t for name, t in layout.targets(policy).items() if ".mlp." in name}
    drawn = jax.jit(
        lambda key: {
            name: (0.02 * jax.random.normal(key, t.struct.shape)).astype(t.struct.dtype)
            for name, t in targets.items()
        },
        out_shardings={name: t.struct.sharding for name, t in targets.items()},
    )(jax.random.key(0))
    batch = PartitionSpec(layout.batch_axes or None)

    def feed(parameters, x):
        def on_a_rank(parameters, x):
            moe = with_parameters(decoder.layers[0].mlp, parameters)
            return moe(x, jnp.ones(x.shape[:2], bool))

        specs = {name: layout.spec(f"layers.0.mlp.{name}", p.ndim) for name, p in parameters.items()}
        return jax.shard_map(on_a_rank, mesh=layout.mesh, in_specs=(specs, batch), out_specs=batch)(
            parameters, x
        )

    run = jax.jit(feed)
    weights = {name.removeprefix("layers.0.mlp."): value for name, value in drawn.items()}
    total = 0.0
    for tokens in _MEASURED_TOKENS:
        shape = (layout.batch_multiple, tokens, one_layer.hidden_size)
        x = np.random.default_rng(tokens).normal(size=shape).astype(compute)
        jax.block_until_ready(run(weights, x))
        best = float("inf")
        for _ in range(_REPEATS):
            started = time.perf_counter()
            jax.block_until_ready(run(weights, x))
            best = min(best, time.perf_counter() - started)
        total += best
    return total

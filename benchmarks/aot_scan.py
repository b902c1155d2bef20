"""Layers unrolled or scanned, for MI355X: the 397B's decode step both ways, compiled and counted, not run.

Scanned, the weights of the 15 groups of four layers (three Gated DeltaNet, one attention) lie in stacks, and
so do the caches; a step of the scan takes a slice of each. `python benchmarks/aot_scan.py`, after
`qwen-moe-jax toolchain`.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qwen_moe_jax.aot.compile import compile_lowered, make_deployment
from qwen_moe_jax.aot.hlo import Module
from qwen_moe_jax.aot.traffic import traffic
from qwen_moe_jax.configs import released_config
from qwen_moe_jax.devices import DEVICES
from qwen_moe_jax.model.decoder import with_parameters
from qwen_moe_jax.parallel.caches import cache_specs, empty_cache
from qwen_moe_jax.parallel.forward import layout_decoder

GROUPS = 15


def stacked_spec(spec: PartitionSpec) -> PartitionSpec:
    """Of a stack over groups."""
    return PartitionSpec(None, *spec)


def lowered(unroll: bool) -> tuple[jax.stages.Lowered, Any]:
    """The step over stacks: one scan over groups, or the same unrolled; with its deployment."""
    whole = released_config("397b")
    group = whole.with_layers(whole.layers[:4])
    deployment = make_deployment(
        group, DEVICES["mi355x"], expert=8, batch=64, context=32768, shared_expert="sharded"
    )
    layout, policy = deployment.layout, deployment.policy
    decoder = layout_decoder(layout, policy, deployment.kernels)
    structs = {name: target.struct for name, target in layout.targets(policy).items()}
    specs = {name: layout.spec(name, struct.ndim) for name, struct in structs.items()}

    def stack(struct: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding(stacked_spec(spec))
        return jax.ShapeDtypeStruct((GROUPS, *struct.shape), struct.dtype, sharding=sharding)

    layers = {name for name in structs if name.startswith("layers.")}
    parameters = {n: stack(s, specs[n]) if n in layers else s for n, s in structs.items()}
    parameter_specs = {n: stacked_spec(s) if n in layers else s for n, s in specs.items()}
    laid = cache_specs(layout)
    rows = PartitionSpec(layout.batch_axes or None)
    cache = jax.eval_shape(
        lambda: empty_cache(layout, 64, deployment.capacity, policy.matrix, policy.compute)
    )
    caches = jax.tree.map(stack, cache.layers, laid.layers)
    stacked_caches = jax.tree.map(
        stacked_spec, laid.layers, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )

    def step(parameters, tokens, valid, placed, caches):
        rest = {name: value for name, value in parameters.items() if name not in layers}
        stacks = {name: value for name, value in parameters.items() if name in layers}
        first = with_parameters(decoder, rest | {name: value[0] for name, value in stacks.items()})
        about = first.step(valid, placed)

        def one_group(x, given):
            values, before = given
            after = []
            for layer, cache in zip(with_parameters(decoder, rest | values).layers, before, strict=True):
                x, cache = layer(x, about, cache)
                after.append(cache)
            return x, tuple(after)

        x = first.embed(tokens, valid)
        x, caches = lax.scan(one_group, x, (stacks, caches), unroll=GROUPS if unroll else 1)
        return first.logits(first.finish(x)), caches

    program = jax.jit(
        jax.shard_map(
            step,
            mesh=layout.mesh,
            in_specs=(parameter_specs, rows, rows, rows, stacked_caches),
            out_specs=(rows, stacked_caches),
        ),
        donate_argnums=4,
    )
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(rows)),
        (jax.ShapeDtypeStruct((64, 1), jnp.int32), jax.ShapeDtypeStruct((64, 1), jnp.bool_), cache.rows),
    )
    return program.lower(parameters, *given, caches), deployment


def main() -> None:
    """Prints what each costs; unrolled over layers of their own is in `aot.py`."""
    for unroll in (False, True):
        program, deployment = lowered(unroll)
        started = time.perf_counter()
        compiled = compile_lowered(program, deployment.kernels)
        seconds = time.perf_counter() - started
        moved = traffic(Module(compiled.as_text() or ""))
        memory: Any = compiled.memory_analysis()
        print(
            f"{'stacks, unrolled' if unroll else 'stacks, scanned'}: compiled in {seconds:.0f} s, "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries, {moved.bytes / 1e9:.0f} GB moved"
        )
        for (place, opcode), count in sorted(moved.by_operation.items(), key=lambda item: -item[1])[:4]:
            print(f"  {count / 1e9:6.1f} GB  {opcode} {place}")


if __name__ == "__main__":
    main()

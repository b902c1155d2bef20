"""How fast this device is at what decode and prefill are made of, and at decode itself.

Nothing here fails because it is slow.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.configs import released_config
from qwen_moe_jax.engine.forward import Parameters
from qwen_moe_jax.generation.results import Usage
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.model.decoder import abstract_decoder, named_parameters, with_parameters
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.moe import SparseMoe
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.selftest.machine import free_memory, known_device
from qwen_moe_jax.selftest.models import TABLE, Models
from qwen_moe_jax.selftest.report import Outcome, Skip

# Large beside the caches of a device: 256 MB in that of MI300X.
_GPU_BYTES, _CPU_BYTES = 4 << 30, 512 << 20
_GPU_SIDE, _CPU_SIDE = 8192, 768
_DECODE_TOKENS = 65  # one chosen by the prompt, and 64 steps
_MOE = "qwen3.5-35b-a3b"
_MOE_TOKENS = (1, 8, 64, 512)
# A CPU gets a layer with fewer experts, and no prompt.
_CPU_EXPERTS, _CPU_MOE_TOKENS = 16, (1, 8)
_MEASURE_SECONDS = 0.5


def seconds_a_call(call: Callable[[], Any], *, batches: int = 5) -> float:
    """The least of a few batches of calls, each waited for at its end, so that starting them costs nothing.

    Args:
        call: gives arrays; the first one, which compiles, is not measured.
        batches: how many, about half a second together.
    """
    jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    once = max(time.perf_counter() - started, 1e-6)
    calls = int(min(50, max(1, _MEASURE_SECONDS / batches / once)))
    least = float("inf")
    for _ in range(batches):
        started = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()  # the one before lets go of its memory
        jax.block_until_ready(result)
        least = min(least, (time.perf_counter() - started) / calls)
    return least


def bandwidth() -> Outcome:
    """Bytes a second of the device's memory: read by a sum, and read and written by x + 1."""
    device = jax.local_devices()[0]
    size = _CPU_BYTES if device.platform == "cpu" else _GPU_BYTES
    free = free_memory(device)
    while free is not None and size > free // 4:
        size //= 2
    data = jax.jit(lambda: jnp.ones((size // 4 // 4096, 4096), jnp.float32))()
    total = jax.jit(lambda x: x.sum())
    read = size / seconds_a_call(lambda: total(data))
    # in place: on a CPU, new memory costs more than what is measured
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def again() -> jax.Array:
        nonlocal data
        data = add(data)
        return data

    copied = 2 * size / seconds_a_call(again)
    known = known_device(device)
    share = "" if known is None else f" ({max(copied, read) / known.bandwidth:.0%} of {known.name}'s)"
    return Outcome(
        summary=f"{read / 1e9:,.0f} GB/s read, {copied / 1e9:,.0f} GB/s read and written{share}",
        details={
            "bytes": size,
            "read_bytes_per_second": read,
            "copy_bytes_per_second": copied,
            "known_bytes_per_second": known and known.bandwidth,
        },
    )


def matmul() -> Outcome:
    """FLOP/s of one large product of bfloat16 matrices, accumulated in float32."""
    device = jax.local_devices()[0]
    side = _CPU_SIDE if device.platform == "cpu" else _GPU_SIDE
    # random: hardware is faster with zeros
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    rate = 2 * side**3 / seconds_a_call(lambda: product(a, b))
    known = known_device(device)
    share = "" if known is None else f" ({rate / known.peak_flops['bfloat16']:.0%} of {known.name}'s)"
    return Outcome(
        summary=f"{rate / 1e12:.3g} TFLOP/s, {side} x {side} x {side} in bfloat16{share}",
        details={
            "side": side,
            "flops_per_second": rate,
            "known_flops_per_second": known and known.peak_flops["bfloat16"],
        },
    )


def decode(models: Models, batch: int) -> Outcome:
    """Tokens a second of `generate` in bfloat16, from the first token on.

    Tokens come out in blocks of several steps, so that the time of the first one says nothing: a long reply
    is compared with one of a single token.

    Args:
        models: of the checkpoint.
        batch: rows, copies of the prompts.
    """
    model = models.load("bfloat16", TABLE)
    rows = [models.prompts[i % len(models.prompts)] for i in range(batch)]

    def fastest(tokens: int) -> tuple[float, Usage]:
        """Seconds of the whole call, the least of three, and what it says of itself."""
        options = {"max_new_tokens": tokens, "eos_token_id": []}
        model.generate(rows, **options)  # compiles
        usages = [model.generate(rows, **options).usage for _ in range(3)]
        seconds = [usage.prefill_seconds + usage.decode_seconds for usage in usages]
        return min(seconds), usages[seconds.index(min(seconds))]

    (short, usage), (long, _) = fastest(1), fastest(_DECODE_TOKENS)
    steps = _DECODE_TOKENS - 1
    taken = max(long - short, 1e-9)  # a machine that is busy with something else may say anything
    rate = batch * steps / taken
    return Outcome(
        summary=f"{rate:,.0f} tokens/s, {1e3 * taken / steps:.3g} ms a step; prefill of "
        f"{usage.prompt_tokens} tokens {1e3 * usage.prefill_seconds:.3g} ms",
        details={
            "batch": batch,
            "steps": steps,
            "tokens_per_second": rate,
            "seconds_a_step": taken / steps,
            "prompt_tokens": usage.prompt_tokens,
            "prefill_seconds": usage.prefill_seconds,
        },
    )


def mixture(target: str) -> Outcome:
    """One mixture of experts with the sizes of the 35B model and random weights, in bfloat16."""
    config, tokens_of = released_config(_MOE), _MOE_TOKENS
    experts = config.num_experts
    if target == "cpu":
        config, tokens_of = dataclasses.replace(config, num_experts=_CPU_EXPERTS), _CPU_MOE_TOKENS
    module, structs = _layer(config, target)
    size = sum(prod(struct.shape) * struct.dtype.itemsize for struct in structs.values())
    free = free_memory(jax.local_devices()[0])
    if free is not None and size > free // 2:
        raise Skip(
            f"a layer of {size / 1e9:.1f} GB does not fit beside what is in use of the device's memory"
        )
    parameters = _random(structs)
    kernels = make_kernels(target)
    # a function of the parameters, as the engine has them; closed over, they would be constants
    run = jax.jit(
        lambda parameters, x: with_parameters(module, parameters)(x, jnp.ones(x.shape[:2], bool)),
        compiler_options=kernels.compiler_options,
    )
    chosen = jax.jit(
        lambda parameters, x: with_parameters(module, parameters).choose(x[0], jnp.ones(x.shape[1], bool))[0]
    )
    found = []
    for tokens in tokens_of:
        x = jax.random.normal(jax.random.key(tokens), (1, tokens, config.hidden_size), jnp.bfloat16)
        different = len(np.unique(np.asarray(chosen(parameters, x))))
        read = sum(
            prod(struct.shape)
            * struct.dtype.itemsize
            * (different / config.num_experts if "experts." in name else 1)
            for name, struct in structs.items()
        )
        seconds = seconds_a_call(lambda x=x: run(parameters, x))
        amount = tokens * config.num_experts_per_tok / config.num_experts
        found.append(
            {
                "tokens": tokens,
                "implementation": kernels.pick("experts", "bfloat16", amount),
                "experts_chosen": different,
                "seconds": seconds,
                "bytes_per_second": read / seconds,
            }
        )
    said = ", ".join(f"{each['tokens']} tokens {1e3 * each['seconds']:.3g} ms" for each in found)
    of = "" if config.num_experts == experts else f" with {config.num_experts} of its {experts} experts"
    return Outcome(
        summary=f"{said} ({_MOE}{of})",
        details={"model": _MOE, "experts": config.num_experts, "bytes": size, "measured": found},
    )


def _layer(config: ModelConfig, target: str) -> tuple[SparseMoe, dict[str, jax.ShapeDtypeStruct]]:
    """An abstract mixture of experts, and what its parameters are."""
    one = config.with_layers(config.layers[:1])
    compute = jnp.dtype(jnp.bfloat16)
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, make_kernels(target)))
    module = abstract_decoder(one, policy, make_kernels(target)).layers[0].mlp
    assert isinstance(module, SparseMoe)
    return module, named_parameters(module)


def _random(structs: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Small normal values, drawn on the device one parameter at a time."""
    keys = jax.random.split(jax.random.key(0), len(structs))
    draw = jax.jit(
        lambda key, struct: (0.02 * jax.random.normal(key, struct.shape, jnp.bfloat16)).astype(struct.dtype),
        static_argnums=1,
    )
    return {name: draw(key, struct) for key, (name, struct) in zip(keys, structs.items(), strict=True)}

"""Compiling generation's programs for AMD GPUs that are only described."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

from qwen_moe_jax.aot import private_jax, toolchain
from qwen_moe_jax.aot.drafting import verify_collectives, verify_work
from qwen_moe_jax.aot.hlo import Module, collectives, custom_calls
from qwen_moe_jax.aot.launches import kernel_launches
from qwen_moe_jax.aot.minimum import collective_bytes, least_work, roofline
from qwen_moe_jax.aot.programs import PROGRAMS, VERIFY, Deployment
from qwen_moe_jax.aot.report import CompileReport, ProgramReport, largest_operations
from qwen_moe_jax.aot.traffic import traffic
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.devices import Device
from qwen_moe_jax.engine.drafting import check_drafts
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels, make_kernels
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout, frugal_mode
from qwen_moe_jax.parallel.memory import holding
from qwen_moe_jax.parallel.mesh import make_mesh
from qwen_moe_jax.schemes.presets import dtype_of

_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def make_deployment(
    config: ModelConfig,
    device: Device,
    *,
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    batch: int,
    context: int,
    mean_context: int | None = None,
    draft_tokens: int = 0,
    kernels: Any = "auto",
    hosts: int = 1,
    **choices: Any,
) -> Deployment:
    """A model on described devices, computing in bfloat16.

    Args:
        config: of the model; float8 matrices if it says so.
        device: of `devices.py`, an AMD one.
        data, expert, tensor: sizes of the mesh.
        batch: rows of the whole mesh.
        context: tokens that a row may hold.
        mean_context: tokens that rows hold on average, where their lengths differ; None means all they may.
        draft_tokens: that multi-token prediction drafts for each row and step; 0 leaves it out.
        kernels: as of `make_kernels`.
        hosts: that the devices are divided among.
        **choices: attention, shared_expert, expert_dispatch and exact, as of `Layout`; a shared expert that
            is "auto" is "sharded", which reads the least, and "outside" if exact.

    Raises:
        InputError: a number or choice that is none, or a device that is not AMD's.
        ToolchainError: the compiler is not there.
    """
    for name, number in (("batch", batch), ("context", context)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is {number!r}; expected a positive integer.")
    if context > config.max_position_embeddings:
        raise InputError(
            f"context is {context}; expected at most the model's {config.max_position_embeddings} tokens."
        )
    if mean_context is not None and not 1 <= mean_context <= context:
        raise InputError(f"mean_context is {mean_context}; expected 1 to the context's {context} tokens.")
    check_drafts(draft_tokens)
    if choices.get("shared_expert") == "auto":
        choices["shared_expert"] = frugal_mode(config, exact=bool(choices.get("exact")))
    count = data * expert * tensor
    if count % hosts:
        raise InputError(f"{count} devices cannot be divided among {hosts} hosts.")
    devices = toolchain.topology(device, (1, hosts, count // hosts))
    mesh = make_mesh(data, expert, tensor, devices=devices)
    layout = Layout(config, mesh, ragged=True, **choices)
    policy = DtypePolicy(compute=_BFLOAT16, matrix=_BFLOAT16)
    table = make_kernels(device.arch, kernels)
    return Deployment(layout, policy, table, batch, context, mean_context, draft_tokens)


def compile_deployment(
    deployment: Deployment,
    device: Device,
    *,
    model: str,
    programs: Sequence[str] | None = None,
    save: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompileReport:
    """Compiles programs and reports on them.

    Args:
        deployment: from `make_deployment`.
        device: it is for.
        model: its name, for the report.
        programs: of `PROGRAMS` or `VERIFY`; None for all that the deployment runs.
        save: folder for each program's optimised HLO (`<program>.hlo.txt`) and serialised executable
            (`<program>.executable`).
        progress: is told what is being done.

    Raises:
        jax.errors.JaxRuntimeError: XLA cannot compile a program, such as one with a kernel that asks for more
            LDS than there is.
    """
    layout = deployment.layout
    held = holding(layout, deployment.policy, drafter=bool(deployment.draft_tokens))
    if programs is None:
        programs = (*PROGRAMS, VERIFY) if deployment.draft_tokens else PROGRAMS
    rows = deployment.rows // layout.batch_multiple
    say = progress or (lambda text: None)
    reports = []
    for program in programs:
        say(f"tracing {program}")
        started = time.perf_counter()
        lowered = deployment.lower(program)
        traced = time.perf_counter()
        say(f"compiling {program}")
        compiled = compile_lowered(lowered, deployment.kernels)
        done = time.perf_counter()
        say(f"reading {program}")
        report = _program_report(deployment, device, program, compiled)
        reports.append(
            dataclasses.replace(report, lower_seconds=traced - started, compile_seconds=done - traced)
        )
        if save is not None:
            _save(Path(save), program, compiled)
    return CompileReport(
        model=model,
        device=device,
        count=layout.mesh.size,
        layout=str(layout),
        dtype=dtype_of(layout.config.quantization),
        batch=deployment.batch,
        context=deployment.context,
        capacity=deployment.capacity,
        weights=held.weights,
        kv=rows * deployment.capacity * held.kv_per_token,
        state=rows * held.state,
        row=held.sequence(deployment.capacity),
        batch_multiple=layout.batch_multiple,
        kernels=tuple(deployment.kernels.lines(deployment.policy.compute.name)),
        programs=tuple(reports),
        versions={"jax": jax.__version__, "jaxlib": jaxlib.version.__version__},
    )


def compile_lowered(lowered: jax.stages.Lowered, kernels: Kernels) -> jax.stages.Compiled:
    """Compiles without the persistent cache, whose entries for devices that are not there cannot be read."""
    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile(compiler_options=kernels.compiler_options)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def _program_report(
    deployment: Deployment, device: Device, program: str, compiled: jax.stages.Compiled
) -> ProgramReport:
    layout, policy = deployment.layout, deployment.policy
    tokens, rows = deployment.step_tokens(program), deployment.step_rows(program)
    context = deployment.step_context(program)
    if program == VERIFY:
        drafts = deployment.draft_tokens
        least = verify_work(layout, policy, batch=rows, drafts=drafts, context=context)
        exchanged = verify_collectives(layout, policy, batch=rows, drafts=drafts)
    else:
        least = least_work(layout, policy, batch=rows, tokens=tokens, context=context)
        exchanged = collective_bytes(layout, policy, batch=rows, tokens=tokens)
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text()
    assert text is not None
    module = Module(text)
    moved = traffic(module)
    calls = custom_calls(module)
    # XLA counts -1 for what it does not see into
    flops = private_jax.cost_analysis(compiled)["flops"] + sum(calls.values()) + moved.kernel_flops
    return ProgramReport(
        program=program,
        tokens=tokens,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=tuple(collectives(module)),
        custom_calls=calls,
        kernels=kernel_launches(module),
        flops=flops,
        traffic=moved.bytes,
        traffic_by_part=moved.by_part(),
        operations=largest_operations(moved.by_operation),
        least=least,
        roofline=roofline(least, device, collectives=exchanged),
        lower_seconds=0,
        compile_seconds=0,
    )


def _save(folder: Path, program: str, compiled: jax.stages.Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{program}.hlo.txt").write_text(compiled.as_text() or "", encoding="utf-8")
    executable: Any = compiled.runtime_executable()
    (folder / f"{program}.executable").write_bytes(executable.serialize())

"""The commands about AMD GPUs that are not here: toolchain, compile, plan."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.schemes.presets import DTYPES, dtype_of, of_dtype

_SHORT = {"bf16": "bfloat16", "fp8": "float8"}


def add_commands(commands: Any, common: argparse.ArgumentParser, sizes: argparse.ArgumentParser) -> None:
    """Declares them.

    Args:
        commands: the subparsers of the command line.
        common: options of every command.
        sizes: options of a mesh and its layout.
    """
    command = commands.add_parser(
        "toolchain", parents=[common], help="fetch XLA's compiler for AMD GPUs into the user's cache"
    )
    command.set_defaults(run=_toolchain)

    planning = argparse.ArgumentParser(add_help=False)
    planning.add_argument(
        "model", help="checkpoint folder, config.json, or a released size: 35b, 397b, 80b ..."
    )
    planning.add_argument("--device", default="mi355x", help="mi300x, mi325x or mi355x (default mi355x)")
    planning.add_argument("--count", type=int, help="devices")
    planning.add_argument("--batch", type=int, default=64, help="rows of the whole mesh (default 64)")
    planning.add_argument("--context", type=int, default=32768, help="tokens a row (default 32768)")
    planning.add_argument("--dtype", help="bf16 or fp8 (default: as the configuration says)")
    planning.add_argument(
        "--draft-tokens",
        type=int,
        default=0,
        metavar="N",
        help="multi-token prediction with N drafts a step",
    )
    planning.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")

    command = commands.add_parser(
        "compile",
        parents=[common, planning, sizes],
        help="compile prefill and decode for AMD GPUs that are not here, and report what they take",
    )
    command.add_argument(
        "--hosts", type=int, default=1, help="that the devices are divided among (default 1)"
    )
    command.add_argument("--mean-context", type=int, metavar="N", help="tokens that rows hold on average")
    command.add_argument("--program", choices=("prefill", "decode", "verify"), help="only this one")
    command.add_argument("--layers", type=int, metavar="N", help="only the first N layers, for a quick look")
    command.add_argument(
        "--kernels",
        default="auto",
        help="auto, xla, or OPERATION=IMPLEMENTATION, several separated by commas",
    )
    command.add_argument(
        "--save", type=Path, metavar="DIR", help="write optimised HLO and serialised executables there"
    )
    command.set_defaults(run=_compile)

    command = commands.add_parser(
        "plan", parents=[common, planning], help="the layouts that are best for a batch and context"
    )
    command.add_argument("--top", type=int, default=5, help="how many layouts (default 5)")
    command.add_argument(
        "--curve",
        action="store_true",
        help="model times with latencies: tokens/s a GPU against tokens/s a user, over batches and layouts",
    )
    command.add_argument(
        "--prompt",
        type=int,
        metavar="N",
        help="with the curve: N tokens of the context are read, the rest decoded",
    )
    command.add_argument(
        "--acceptance", type=float, metavar="A", help="with the curve: how often a draft holds (default 0.8)"
    )
    command.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="with the curve: another assumption, such as launch=0 or memory=0.9; may be repeated",
    )
    command.set_defaults(run=_plan)


def kernels_asked(text: str) -> str | dict[str, str]:
    """ "experts=grouped,attention=blockwise" as a mapping; a plain word as it is."""
    if "=" not in text:
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {operation.strip(): implementation.strip() for operation, _, implementation in pairs}


def assumptions_asked(given: list[str]) -> dict[str, float]:
    """["memory=0.9", "launch=0"] as a mapping."""
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"--assume is {text!r}; expected NAME=NUMBER, such as memory=0.9.") from None
    return found


def _toolchain(options: argparse.Namespace) -> None:
    from qwen_moe_jax.aot import toolchain

    folder = toolchain.prepare(progress=True)
    toolchain.load()
    print(f"the compiler for AMD GPUs is in {folder}")


def _config(options: argparse.Namespace) -> Any:
    from qwen_moe_jax.configs import find_config

    if options.dtype is None:
        return find_config(options.model)
    dtype = _SHORT.get(options.dtype, options.dtype)
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {options.dtype!r}; expected {', '.join(('bf16', 'fp8', *DTYPES))}.")
    config = find_config(options.model)
    if config.quantization is None:
        return dataclasses.replace(config, quantization=of_dtype(dtype, experts=config.num_experts))
    stored = dtype_of(config.quantization)
    if dtype != stored:
        raise InputError(
            f"--dtype is {options.dtype}, and {options.model} is a checkpoint in {stored}, "
            "which is held so; leave --dtype out, or give a bfloat16 checkpoint."
        )
    return config


def _compile(options: argparse.Namespace) -> int:
    from qwen_moe_jax.aot.compile import compile_deployment, make_deployment
    from qwen_moe_jax.devices import find_device

    config, device = _config(options), find_device(options.device)
    sizes = {name: getattr(options, name) for name in ("data", "expert", "tensor")}
    product = sizes["data"] * sizes["expert"] * sizes["tensor"]
    if options.count is not None and product == 1:
        sizes["expert"] = options.count
    elif options.count not in (None, product):
        raise InputError(
            f"--count is {options.count}, and the mesh {' x '.join(f'{n} {s}' for n, s in sizes.items())} "
            f"has {product} devices; give --data, --expert and --tensor whose product is {options.count}."
        )
    if options.layers is not None:
        if not 1 <= options.layers <= config.num_hidden_layers:
            raise InputError(
                f"--layers is {options.layers}; expected 1 to the model's {config.num_hidden_layers}."
            )
        config = config.with_layers(config.layers[: options.layers])
    if options.program == "verify" and not options.draft_tokens:
        raise InputError("--program verify verifies drafts; say how many with --draft-tokens.")
    choices = ("shared_expert", "expert_dispatch", "exact", "attention", "sums")
    deployment = make_deployment(
        config,
        device,
        **sizes,
        batch=options.batch,
        context=options.context,
        mean_context=options.mean_context,
        draft_tokens=options.draft_tokens,
        kernels=kernels_asked(options.kernels),
        hosts=options.hosts,
        **{name: getattr(options, name) for name in choices},
    )
    name = options.model if options.layers is None else f"{options.layers} layers of {options.model}"
    report = compile_deployment(
        deployment,
        device,
        model=name,
        programs=(options.program,) if options.program else None,
        save=options.save,
        progress=lambda text: print(f"{text} ...", file=sys.stderr),
    )
    _give(report, options)
    return 0 if report.fits else 1


def _plan(options: argparse.Namespace) -> int:
    from qwen_moe_jax.aot.plan import plan
    from qwen_moe_jax.devices import find_device

    if options.count is None:
        raise InputError("plan needs --count, how many devices there are.")
    asked: dict[str, Any] = {"prompt": options.prompt, "acceptance": options.acceptance}
    asked = {name: value for name, value in asked.items() if value is not None}
    if options.assume:
        asked["assume"] = assumptions_asked(options.assume)
    report = plan(
        _config(options),
        find_device(options.device),
        options.count,
        batch=options.batch,
        context=options.context,
        draft_tokens=options.draft_tokens,
        top=options.top,
        curve=options.curve or bool(asked),
        **asked,
    )
    _give(report, options)
    return 0 if report.fitting else 1


def _give(report: Any, options: argparse.Namespace) -> None:
    print(report)
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")

"""The `qwen-moe-jax` command, and what looks at checkpoints; see `text_commands`, `aot`, `selftest` for more.

An error a user can cause is one line on stderr and exit status 2; `--debug` shows where it came from. A
layout that disagrees with one device is exit status 1.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_moe_jax.aot.commands import add_commands, kernels_asked
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.command_line import Parser, layout_options, load_model, mesh_of, say
from qwen_moe_jax.errors import InputError, QwenMoeError
from qwen_moe_jax.selftest import add_command as add_selftest
from qwen_moe_jax.text_commands import add_commands as add_text_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    if arguments is None:  # the process is this command's: what is imported stays, and is no garbage
        gc.freeze()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # all that stands behind it is the harness's own, its --help included
    harness = given[1:] if given[:1] == ["lm-eval"] else None
    options = _parser().parse_args(given if harness is None else given[:1])
    try:
        if harness is not None:
            from qwen_moe_jax.evaluation.harness_command import run_harness

            return run_harness(harness)
        return options.run(options) or 0
    except (QwenMoeError, OSError) as error:
        if options.debug:
            raise
        print(f"qwen-moe-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qwen-moe-jax", description="Qwen3.5 MoE inference in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    loading = Parser(add_help=False)
    loading.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (the checkpoint's own)")
    loading.add_argument(
        "--kernels",
        default="auto",
        help="auto, xla, or OPERATION=IMPLEMENTATION, several separated by commas",
    )
    loading.add_argument(
        "--no-compilation-cache", action="store_true", help="keep no compiled programs for the next run"
    )

    sizes = Parser(add_help=False)
    mesh = sizes.add_argument_group("mesh", "on a CPU, as many devices are pretended as the mesh needs")
    for axis, meaning in (
        ("data", "groups of devices with other rows of the batch"),
        ("expert", "ranks that the experts are divided among"),
        ("tensor", "ranks that heads, experts and vocabulary are divided among"),
    ):
        mesh.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"{meaning} (default 1)")
    mesh.add_argument("--attention", default="tensor", help="what --expert is to attention: tensor or data")
    mesh.add_argument("--shared-expert", default="auto", help="auto, prescaled, outside, sharded or fused")
    mesh.add_argument("--expert-dispatch", default="psum", help="psum or all_to_all")
    mesh.add_argument("--exact", action="store_true", help="the same bits for every --expert")
    mesh.add_argument(
        "--sums", default="auto", help="what sums over ranks travel in: compute, float32 or auto (default)"
    )
    several = Parser(add_help=False)
    group = several.add_argument_group(
        "several processes", "or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="N", help="this one's, from 0; 0 prints")
    running = [common, loading, sizes, several]
    drafting = Parser(add_help=False)
    drafting.add_argument(
        "--draft-tokens",
        type=lambda text: text if text == "auto" else int(text),
        default="auto",
        metavar="N",
        help="most tokens that multi-token prediction drafts a step, if the checkpoint holds it; 0 for none",
    )

    add_text_commands(commands, [*running, drafting])

    command = commands.add_parser(
        "eval", parents=[*running, drafting], help="accuracy on held-out word problems"
    )
    command.add_argument("--model", required=True, help="checkpoint folder or hub id")
    command.add_argument("--problems", type=int, default=500, help="how many (default 500)")
    command.add_argument("--batch-size", type=int, default=50)
    command.add_argument("--seed", type=int, default=1, help="which problems")
    command.add_argument(
        "--unseen-templates", action="store_true", help="sentence structures never trained on"
    )
    command.add_argument("--show-mistakes", type=int, default=0, metavar="N", help="print the first N")
    command.set_defaults(run=_evaluate)

    commands.add_parser(
        "lm-eval",
        parents=[common],
        help="EleutherAI's harness, with --model qwen_moe_jax --model_args path=PATH (extra `eval`)",
    )

    command = commands.add_parser(
        "check", parents=running, help="compare a mesh with one device, layer by layer"
    )
    command.add_argument("path", help="checkpoint folder or hub id")
    command.add_argument("--seed", type=int, default=0, help="of the random tokens")
    command.set_defaults(run=_check)

    command = commands.add_parser(
        "inspect", parents=[common, sizes], help="architecture, parameters and memory, also under a mesh"
    )
    command.add_argument("path", help="checkpoint folder")
    command.add_argument("--context", type=int, help="tokens a sequence, for the cache sizes")
    command.add_argument("--device", help="what fits on one: mi300x, mi325x, mi355x or h100")
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "convert",
        parents=[common],
        help="write a checkpoint in Orbax layout, in the dtypes it has; started again, it goes on",
    )
    command.add_argument("source", help="checkpoint folder or hub id")
    command.add_argument("destination", help="folder to write, or to finish")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "quantize",
        parents=[common],
        help="write a checkpoint in few bits: fp8, int8, int4 or mxfp4",
    )
    command.add_argument("source", help="checkpoint folder or hub id, float32 or bfloat16")
    command.add_argument("destination", help="folder to write")
    command.add_argument(
        "--format", default="fp8", help="fp8 (blocks of 128 x 128, the default), int8, int4 or mxfp4"
    )
    command.add_argument(
        "--experts-only", action="store_true", help="of the layers' matrices the routed experts' alone"
    )
    command.add_argument(
        "--group-size", type=int, help="columns that share a scale, of int8 and int4 (default 128)"
    )
    command.add_argument("--scales", default="bfloat16", help="dtype of the scales: bfloat16 or float32")
    command.add_argument(
        "--problems", type=int, default=0, help="so many word problems, answered before and after"
    )
    command.add_argument("--text", help="a text file, whose perplexity is given before and after")
    command.set_defaults(run=_quantize)
    add_selftest(commands, common)
    add_commands(commands, common, sizes)
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    from qwen_moe_jax.evaluation.evaluate import evaluate
    from qwen_moe_jax.evaluation.word_problems import held_out

    if options.problems < 1 or options.batch_size < 1:
        raise InputError(
            f"--problems is {options.problems} and --batch-size {options.batch_size}; both must be 1 or more."
        )
    try:
        problems = held_out(options.problems, options.seed, unseen_templates=options.unseen_templates)
    except ValueError as error:
        raise InputError(f"--problems is {options.problems}: {error}.") from None
    model = load_model(options.model, options)
    result = evaluate(model, problems, batch_size=options.batch_size, progress=True)
    kind = "templates never trained on" if options.unseen_templates else "seen templates with new numbers"
    say(f"accuracy on {kind}: {result}")
    wrong = [
        (problem, text)
        for problem, text, answer in zip(problems, result.texts, result.answers, strict=True)
        if answer != problem.answer
    ]
    for problem, text in wrong[: options.show_mistakes]:
        say(f"\n{problem.question}\n  expected: {problem.solution}\n  answered: {text}")


def _inspect(options: argparse.Namespace) -> None:
    from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
    from qwen_moe_jax.devices import find_device
    from qwen_moe_jax.generation.loading import resolve_folder

    device = None if options.device is None else find_device(options.device)
    folder = resolve_folder(options.path)
    summary = inspect_checkpoint(folder, context=options.context)
    print(summary)
    sizes = (options.data, options.expert, options.tensor)
    if device is not None or sizes != (1, 1, 1):
        from qwen_moe_jax.parallel.memory import device_memory

        choices = layout_options(options)
        print(device_memory(summary.config, sizes, summary.context, device=device, **choices))


def _check(options: argparse.Namespace) -> int:

    from qwen_moe_jax.generation.compile_cache import enable_compilation_cache
    from qwen_moe_jax.generation.loading import compute_dtype, resolve_folder
    from qwen_moe_jax.kernels.table import make_kernels
    from qwen_moe_jax.kernels.target import current_target
    from qwen_moe_jax.layout_check import check_layout
    from qwen_moe_jax.parallel.choose import choose_layout

    folder = resolve_folder(options.path)
    config = read_config(folder)
    compute = compute_dtype(options.dtype, folder, config)
    enable_compilation_cache(None if options.no_compilation_cache else "auto")
    mesh = mesh_of(options)
    if mesh is None:
        raise InputError(
            "a mesh of one device has nothing to disagree with; give --data, --expert or --tensor."
        )
    kernels = make_kernels(current_target(), kernels_asked(options.kernels))
    layout = choose_layout(config, mesh, compute=compute, kernels=kernels, **layout_options(options))
    assert layout is not None  # there is a mesh
    report = check_layout(folder, layout, compute, kernels, seed=options.seed, progress=sys.stderr.isatty())
    say(report)
    return 0 if report.ok else 1


def _convert(options: argparse.Namespace) -> None:
    from qwen_moe_jax.checkpoint.convert import convert_checkpoint
    from qwen_moe_jax.checkpoint.inspect import size_in_words
    from qwen_moe_jax.generation.loading import resolve_folder

    source = resolve_folder(options.source)
    report = convert_checkpoint(source, options.destination, progress=sys.stderr.isatty())
    _print_left_out(report.skipped)
    kept = f", {size_in_words(report.kept_bytes)} of them earlier" if report.kept_bytes else ""
    size = size_in_words(report.written_bytes)
    print(f"wrote {options.destination} ({report.config.num_hidden_layers} layers, {size}{kept})")


def _print_left_out(skipped: dict[str, int]) -> None:
    for family, count in skipped.items():
        print(
            f"{count} tensors of {family} are not part of text generation and were left out.", file=sys.stderr
        )


def _quantize(options: argparse.Namespace) -> None:
    from qwen_moe_jax.checkpoint.inspect import size_in_words
    from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
    from qwen_moe_jax.generation.loading import resolve_folder
    from qwen_moe_jax.schemes.presets import preset

    quantization = preset(options.format, experts_only=options.experts_only, group=options.group_size)
    text = None if options.text is None else _text_of(options.text)
    if options.problems < 0:
        raise InputError(f"--problems is {options.problems}; expected 0 or more.")
    source = resolve_folder(options.source)
    report = quantize_checkpoint(
        source,
        options.destination,
        quantization=quantization,
        scale_dtype=options.scales,
        progress=sys.stderr.isatty(),
    )
    _print_left_out(report.skipped)
    before, after = size_in_words(report.source_bytes), size_in_words(report.written_bytes)
    print(f"wrote {options.destination}: {before} became {after}")
    if options.problems or text is not None:
        for name, folder in (("before", source), ("after", Path(options.destination))):
            for line in _quality(folder, options.problems, text):
                print(f"{name}: {line}")


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text is {file!r}, which cannot be read as UTF-8 text ({error}).") from None


def _quality(folder: Path, count: int, text: str | None) -> Iterator[str]:
    """What can be said of a checkpoint's replies, line by line."""
    from qwen_moe_jax.evaluation.evaluate import evaluate
    from qwen_moe_jax.evaluation.word_problems import held_out
    from qwen_moe_jax.generation.api import QwenMoe

    model = QwenMoe.from_pretrained(folder)
    if count:
        yield f"accuracy on word problems {evaluate(model, held_out(count, seed=0))}"
    if text is not None:
        yield f"perplexity {model.perplexity(text):.4f}"


if __name__ == "__main__":
    sys.exit(main())

"""One run on a real host that checks what is computed there, measures it, and writes down both.

Parts, in order: the machine; what its memory and matrix units do; the checkpoint in float32 and bfloat16, the
table's implementations against plain XLA and against stored results of a CPU; decode; one large mixture of
experts; every kernel; several devices against one. Each is caught by itself. `docs/guides/amd.md` says what
for.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.selftest.report import Outcome, Part, PartReport, SelftestReport, run_parts

__all__ = ["Outcome", "PartReport", "SelftestReport", "add_command", "selftest", "selftest_parts"]

# In a clone of the repository.
_CHECKPOINT = Path("checkpoints") / "abacus"


def selftest(
    checkpoint: str | Path,
    *,
    output: str | Path | None = None,
    progress: bool = False,
    skip: Sequence[str] = (),
) -> SelftestReport:
    """Checks and measures this library on the devices that JAX has in this process.

    Args:
        checkpoint: a folder in Hugging Face or Orbax layout, or a hub id. With the repository's
            checkpoints/abacus, results are compared with stored ones, too.
        output: a file for the report as JSON, written after every part, so that it says which one was
            running if the process dies.
        progress: show a bar on standard error.
        skip: names of parts that are not to run, as the report has them.

    Returns:
        The report; `ok` says whether all is as it has to be.

    Raises:
        CheckpointNotFoundError, CheckpointError, ConfigError: there is no checkpoint that can be read.
        InputError: `skip` names no part, or there are several processes.
        OSError: `output` cannot be written.
    """
    import jax

    from qwen_moe_jax.generation.compile_cache import enable_compilation_cache
    from qwen_moe_jax.generation.loading import resolve_folder

    if jax.process_count() > 1:
        raise InputError(
            f"selftest is for the devices of one process, and this is one of {jax.process_count()}; "
            "`qwen-moe-jax check` compares a mesh over several with one device."
        )
    folder = resolve_folder(checkpoint)
    enable_compilation_cache("auto")
    parts = selftest_parts(folder)
    names = [name for name, _ in parts]
    for name in skip:
        if name not in names:
            raise InputError(f"skip names {name!r}; parts are {', '.join(names)}.")
    return run_parts(
        parts,
        checkpoint=folder.resolve().name,
        skip=skip,
        output=None if output is None else Path(output),
        progress=progress,
    )


def selftest_parts(folder: Path) -> list[Part]:
    """All of them, with those next to each other that need the same model."""
    from qwen_moe_jax.kernels.table import make_kernels
    from qwen_moe_jax.kernels.target import current_target
    from qwen_moe_jax.selftest import kernel_checks, layouts, machine, measure, parity
    from qwen_moe_jax.selftest.models import Models

    target = current_target()
    models = Models(folder, target)
    parts: list[Part] = [
        ("versions", machine.versions),
        ("devices", machine.devices),
        ("table", partial(machine.table, make_kernels(target))),
        ("bandwidth", measure.bandwidth),
        ("matmul", measure.matmul),
    ]
    for dtype in parity.DTYPES:
        parts.append((f"{dtype} against plain XLA", partial(parity.against_plain, models, dtype)))
        parts.append((f"{dtype} against stored", partial(parity.against_stored, models, dtype)))
    for batch in (1, 8):
        parts.append((f"decode, batch {batch}", partial(measure.decode, models, batch)))
    parts.append(("mixture of experts", partial(_alone, models, partial(measure.mixture, target))))
    for form in ("gathered", "grouped"):
        parts.append((f"kernel {form} experts", partial(kernel_checks.experts, form, target)))
    parts.append(("kernel flash attention", partial(kernel_checks.attention, target)))
    parts.append(("kernel delta step", partial(kernel_checks.delta_step, target)))
    parts.append(("kernel delta chunks", partial(kernel_checks.delta_chunks, target)))
    parts.append(("kernel scaled products", partial(kernel_checks.scaled, target)))
    parts.append(("all-reduce", layouts.all_reduce))
    return [*parts, *layouts.layout_parts(models)]


def _alone(models: Any, function: Any) -> Outcome:
    """Runs a part without a model in the device's memory."""
    models.free()
    return function()


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Declares `selftest`.

    Args:
        commands: the subparsers of the command line.
        common: options of every command.
    """
    command = commands.add_parser(
        "selftest", parents=[common], help="check and measure this library on this machine's devices"
    )
    command.add_argument(
        "path",
        nargs="?",
        default=_CHECKPOINT,
        help=f"checkpoint folder or hub id (default {_CHECKPOINT}, in a clone of the repository)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PART",
        help="leave a part out, by its name in the report; may be repeated",
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report = selftest(options.path, output=options.json, progress=sys.stderr.isatty(), skip=options.skip)
    print(report)
    return 0 if report.ok else 1

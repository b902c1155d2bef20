"""What commands share: options of a model, and the model that they ask for."""

import argparse
import contextlib
import os
import sys
from math import prod
from typing import Any, NoReturn

from qwen_moe_jax.aot.commands import kernels_asked


class Parser(argparse.ArgumentParser):
    """Takes no shortened options, and reports a wrong command line in one line, exit status 2."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"qwen-moe-jax: {message} (see {self.prog} --help)\n")


def mesh_of(options: argparse.Namespace) -> Any:
    """The mesh that the options ask for, or None; joins the other processes first."""
    import jax

    from qwen_moe_jax.parallel.mesh import make_mesh
    from qwen_moe_jax.parallel.processes import start_processes

    sizes = (options.data, options.expert, options.tensor)
    processes = start_processes(options.coordinator, options.num_processes, options.process_id)
    if processes > 1:
        # Standard output is for results: gloo would write its greetings to it.
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    pretended = -(-prod(sizes) // processes)
    if pretended > max(1, jax.config.jax_num_cpu_devices):  # type: ignore[attr-defined]
        # Refused once devices are in use, as in a notebook: then those that there are have to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", pretended)
    return make_mesh(*sizes) if processes > 1 or sizes != (1, 1, 1) else None


def layout_options(options: argparse.Namespace) -> dict[str, Any]:
    """How a model is to lie on a mesh, as of `QwenMoe.from_pretrained`."""
    names = ("shared_expert", "expert_dispatch", "exact", "attention", "sums")
    return {name: getattr(options, name) for name in names}


def say(*text: Any, **how: Any) -> None:
    """Prints, in the first of several processes."""
    import jax

    if jax.process_index() == 0:
        print(*text, **how)


def load_model(path: str, options: argparse.Namespace) -> Any:
    """The model that the options ask for, on its mesh."""
    from qwen_moe_jax.generation.api import QwenMoe

    model = QwenMoe.from_pretrained(
        path,
        dtype=options.dtype,
        mesh=mesh_of(options),
        kernels=kernels_asked(options.kernels),
        progress=sys.stderr.isatty(),
        compilation_cache=None if options.no_compilation_cache else "auto",
        draft_tokens=getattr(options, "draft_tokens", 0),
        **layout_options(options),
    )
    for family, count in model.skipped.items():
        use = "; --draft-tokens N drafts with them" if family == "mtp" else ""
        say(
            f"{count} tensors of {family} are not part of text generation and were not read{use}.",
            file=sys.stderr,
        )
    return model

"""`qwen-moe-jax serve`."""

import argparse
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.extras import extra_module

if TYPE_CHECKING:
    from qwen_moe_jax.generation.api import QwenMoe

_KEY = "QWEN_MOE_JAX_API_KEY"


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the server beside those of a model and its engine."""
    command.add_argument("--host", default="127.0.0.1", help="to listen at (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="to listen at (default 8000); 0 for any")
    command.add_argument("--name", help="of the model for clients (default: its folder's)")
    command.add_argument("--max-queue", type=int, default=256, help="sequences that wait at most")
    command.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="of a request")
    command.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request")
    command.add_argument("--api-key", help=f"that clients have to give; or the variable {_KEY}")
    command.add_argument("--warmup", action="store_true", help="compile every step before the first request")


def check(options: argparse.Namespace) -> None:
    """What can be told before a model is loaded.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
        InputError: a limit that is none, or an address that cannot be listened at.
    """
    for name in ("starlette", "uvicorn", "prometheus_client"):
        extra_module(name, "serve")
    for name in ("max_queue", "max_body", "timeout"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected more than 0.")
    if not 0 <= options.port < 1 << 16:
        raise InputError(f"--port is {options.port}; expected 0 to 65535.")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((options.host, options.port))
    except OSError as error:
        raise InputError(
            f"{options.host}:{options.port} cannot be listened at ({error.strerror}); give another --host or "
            "--port."
        ) from None


def serve(model: "QwenMoe", options: argparse.Namespace) -> None:
    """Serves a model until SIGTERM or Ctrl-C; then what runs is finished first.

    Raises:
        InputError: a mesh of several processes.
    """
    import jax
    import uvicorn

    from qwen_moe_jax.serving.app import Server
    from qwen_moe_jax.serving.limits import Limits

    if jax.process_count() > 1:
        raise InputError(
            f"serve runs in one process, and there are {jax.process_count()}; give a mesh of one host."
        )
    with model.engine(options.max_rows, options.memory, prefix_cache=not options.no_prefix_cache) as engine:
        if options.warmup:
            engine.warmup()
        limits = Limits(
            sequences=options.max_rows + options.max_queue,
            body_bytes=options.max_body,
            seconds=options.timeout,
            api_key=options.api_key or os.environ.get(_KEY) or None,
        )
        name = options.name or Path(options.model).resolve().name
        app = Server(model, engine, name, limits).app()
        config = uvicorn.Config(
            app, host=options.host, port=options.port, log_level="warning", access_log=False
        )
        server: Any = _announcing(config, name)
        # the server itself ends gracefully, and then lets the signal do what it did before
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        server.run()


def _announcing(config: Any, name: str) -> Any:
    """A server that says where it listens."""
    import uvicorn  # it may be missing, so that the class is made here

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                print(f"{name} at http://{host}:{port}/v1 (Ctrl-C ends it)", file=sys.stderr, flush=True)

    return Announcing(config)

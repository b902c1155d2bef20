"""A server in a thread, for tests that talk to it as its clients do."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from qwen_moe_jax.serving.app import Server
from qwen_moe_jax.serving.limits import Limits


@contextlib.contextmanager
def serving(
    model: Any, *, max_rows: int = 8, name: str = "abacus", **limits: Any
) -> Iterator[tuple[str, Any]]:
    """Serves a model: (address, engine)."""
    with model.engine(max_rows=max_rows) as engine:
        limits = {"sequences": 64, **limits}
        app = Server(model, engine, "abacus", Limits(**limits)).app()
        config = uvicorn.Config(app, port=0, log_level="error", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        try:
            yield f"http://{host}:{port}", engine
        finally:
            server.should_exit = True
            thread.join(30)


def comes_to(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether a condition holds within so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def idle(engine: Any) -> bool:
    """Whether an engine comes to have nothing to do, with all its pages and slots."""

    def done() -> bool:
        stats = engine.stats()
        return stats.running == stats.waiting == 0 and stats.free_pages == stats.pages

    return comes_to(done)

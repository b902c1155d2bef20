"""What /metrics says, in Prometheus' form."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from qwen_moe_jax.generation.engine import Engine

_PREFIX = "qwen_moe_jax"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)
# Of `EngineStats`: what only grows, and what stands at a moment.
_COUNTS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Tokens of prompts that were found in the prefix cache",
    "generated_tokens": "Tokens that were generated",
    "drafted_tokens": "Drafts that were verified",
    "accepted_tokens": "Drafts that hold",
    "preemptions": "Sequences that gave their pages back to be computed again",
}
_GAUGES = {
    "running": "Sequences that have a slot",
    "waiting": "Sequences that wait for one",
    "pages": "Pages of keys and values",
    "free_pages": "Pages that a request may take",
    "cached_pages": "Pages that only the prefix cache holds",
    "compiled_programs": "Steps of different shapes that were run",
}


class Metrics:
    """Counts and times of one server."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]  # a collector, by its `collect`
        more: Any = {"registry": self._registry, "namespace": _PREFIX}
        self._requests = Counter("requests", "Requests by path and status", ["path", "status"], **more)
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **more
        )
        self._whole = Histogram("request_seconds", "From a request to its end", buckets=_SECONDS, **more)

    def collect(self) -> Iterator[Any]:
        """What the engine says of itself; called by Prometheus' client."""
        stats = self._engine.stats()
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=getattr(stats, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=getattr(stats, name))

    def count(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()

    def time(self, first: float | None, whole: float) -> None:
        """A request's seconds to its first token, None if it got none, and to its end."""
        if first is not None:
            self._first.observe(first)
        self._whole.observe(whole)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

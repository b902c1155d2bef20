"""How the benchmarks in this folder measure."""

import statistics
import time
from collections.abc import Callable

import jax


def median_ms(
    calls: dict[str, Callable[[], jax.Array]], rounds: int, least: bool = False
) -> dict[str, float]:
    """Median milliseconds of each call, after one to compile.

    The calls take turns, so that a machine that slows down slows all of them.

    Args:
        calls: what to run, by name.
        rounds: how often each is run.
        least: the least instead of the median, for a machine that others use meanwhile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    statistic = min if least else statistics.median
    return {name: 1e3 * statistic(taken) for name, taken in seconds.items()}

"""Makes tests/support importable as `support`, whichever test folder pytest starts from."""

import sys
from pathlib import Path

import jax
import pytest

_TESTS = str(Path(__file__).resolve().parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--plain-xla`: everything runs as on a machine where the C++ kernels cannot be built. `--every N`: of
    slow sweeps of many cases, every N-th."""
    parser.addoption("--plain-xla", action="store_true", help="without the C++ kernels for CPUs")
    parser.addoption("--every", type=int, default=1, metavar="N", help="of slow sweeps, every N-th case")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--plain-xla"):
        from qwen_moe_jax.kernels import table

        table.native_variant = lambda: None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thins sweeps out, for `--every`."""
    step = int(config.getoption("--every") or 1)
    if step == 1:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for sweep in cases.values() for i, item in enumerate(sweep) if i % step}
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
    items[:] = [item for item in items if item not in left_out]


# Layouts are tested on devices that the CPU pretends to have; a model without a mesh uses the first one.
jax.config.update("jax_num_cpu_devices", 8)

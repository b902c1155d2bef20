"""Makes tests/support importable as `support`, whichever test folder pytest starts from."""

import sys
from pathlib import Path

import jax
import pytest

_TESTS = str(Path(__file__).resolve().parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--plain-xla`: everything runs as on a machine where the C++ kernels cannot be built."""
    parser.addoption("--plain-xla", action="store_true", help="without the C++ kernels for CPUs")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--plain-xla"):
        from qwen_moe_jax.kernels import table

        table.native_variant = lambda: None


# Layouts are tested on devices that the CPU pretends to have; a model without a mesh uses the first one.
jax.config.update("jax_num_cpu_devices", 8)

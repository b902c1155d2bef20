"""Makes tests/support importable as `support`, whichever test folder pytest starts from."""

import sys
from pathlib import Path

import jax

_TESTS = str(Path(__file__).resolve().parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)

# Layouts are tested on devices that the CPU pretends to have; a model without a mesh uses the first one.
jax.config.update("jax_num_cpu_devices", 8)

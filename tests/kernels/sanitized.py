"""Runs the C++ kernels, built with sanitizers, over the random cases; `test_cpu_build.py` starts it.

It needs g++'s libasan.so and libstdc++.so.6 in LD_PRELOAD, and ASAN_OPTIONS=detect_leaks=0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.cpu_kernels import (
    CHUNK_SHAPES,
    CONV_SHAPES,
    DELTA_SHAPES,
    attention_cases,
    check_attention,
    check_conv,
    check_delta_chunks,
    check_delta_step,
    check_experts,
    check_linear,
    delta_case,
    expert_cases,
    linear_cases,
)
from support.state_moves import check_moves

from qwen_moe_jax.kernels.cpu import build
from qwen_moe_jax.kernels.table import Kernels

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1")


def main() -> None:
    """Every variant that this processor runs; a finding ends the process."""
    build._FLAGS = (*build._FLAGS, *SANITIZERS)
    for variant in build.runnable_variants():
        for case in linear_cases(seed=101, count=40):
            check_linear(*case, variant)
        for index, given in enumerate(expert_cases(seed=102, count=12)):
            check_experts(given, variant, by_slot=index % 2 == 1)
        for shape in CONV_SHAPES:
            for dtype in ("float32", "bfloat16"):
                check_conv(shape, dtype, variant)
        for shape in DELTA_SHAPES:
            check_delta_step(delta_case(103, *shape), variant)
        for shape in CHUNK_SHAPES:
            check_delta_chunks(shape, variant)
        for given in attention_cases(seed=104, count=5):
            check_attention(given, variant)
        for seed in range(8):
            check_moves(seed, Kernels("cpu", native=variant))
        print(f"{variant}: clean", flush=True)


if __name__ == "__main__":
    main()

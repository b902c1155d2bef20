"""The chunked delta rule's kernel compiled for AMD GPUs: what is in its code. Nothing is run."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.rocm import kernel_code, rocm  # noqa: F401

from qwen_moe_jax.aot import toolchain
from qwen_moe_jax.devices import DEVICES
from qwen_moe_jax.kernels.delta_chunks import delta_chunks
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.norms import L2_EPS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rocm")]

MFMA = re.compile(r"call [^\n]*@llvm\.amdgcn\.mfma\.f32\.(\w+)\(")
# rows, tokens, value heads, key heads, dim: of the 397B, what a rank of eight has; and the 35B on one
SHAPES = [(1, 4096, 8, 2, 128), (64, 128, 32, 16, 128)]
# Cycles of a SIMD (AMD's CDNA 3 ISA reference, "passes" times four).
CYCLES = {"16x16x4f32": 32, "32x32x2f32": 64}
# That a warp is busy with matrix instructions for each token of a row: 392 with 16 columns, 600 with 32. A
# chunk of 32 steps is at 992, and the tests' bound must tell them apart.
MOST_CYCLES = 640


def code_of(device: str, shape: tuple[int, ...], dtype: str, folder: Path, **options: Any) -> str:
    batch, seq, heads, key_heads, dim = shape
    sharding = jax.sharding.SingleDeviceSharding(toolchain.topology(DEVICES[device])[0])

    def array(size: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=sharding)

    given = (
        array((batch, heads, dim, dim), "float32"),
        array((batch,), "int32"),
        array((batch, seq, (2 * key_heads + heads) * dim), dtype),
        array((batch,), "int32"),
        array((batch, seq, heads), "float32"),
        array((batch, seq, heads), "float32"),
    )
    function = jax.jit(
        lambda *given: delta_chunks(*given, eps=L2_EPS, interpret=False, **options), donate_argnums=0
    )
    [code] = kernel_code(function.lower(*given), Kernels(DEVICES[device].arch), folder, "delta_chunks")
    return code


def cycles_a_token(code: str, chunk: int) -> float:
    return sum(CYCLES[name] for name in MFMA.findall(code)) / chunk


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", ["mi300x", "mi355x"])
def test_products_are_float32_by_matrix_units_and_few_for_each_token(device, shape, dtype, tmp_path):
    """That it compiles says that it is within the LDS."""
    code = code_of(device, shape, dtype, tmp_path)
    assert 0 < cycles_a_token(code, 16) <= MOST_CYCLES
    # a program is one warp, so nothing waits in the loop
    assert code.count("s.barrier") <= 1


def test_a_longer_chunk_is_above_the_bound(tmp_path):
    code = code_of("mi355x", SHAPES[0], "bfloat16", tmp_path, chunk=32, columns=32)
    assert cycles_a_token(code, 32) > MOST_CYCLES

"""Kernels of codes compiled for AMD GPUs: what is in the code of each. Nothing is run."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.rocm import kernel_code, rocm  # noqa: F401

from qwen_moe_jax.aot import toolchain
from qwen_moe_jax.devices import DEVICES
from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import MatrixFormat
from qwen_moe_jax.kernels.experts import gathered_kernels, grouped_kernels
from qwen_moe_jax.kernels.float8x8_matmul import float8x8_matmul
from qwen_moe_jax.kernels.scaled_matmul import scaled_matmul
from qwen_moe_jax.kernels.table import Kernels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rocm")]

TARGETS = ("mi300x", "mi355x")  # gfx942, gfx950
MFMA = re.compile(r"llvm\.amdgcn\.mfma\.[\w.]+")

FORMATS = {
    "int4": MatrixFormat("int4", (1, 128), "bfloat16"),
    "int4, narrow": MatrixFormat("int4", (1, 32), "float16", zeros=True),
    "mxfp4": MatrixFormat("e2m1", (1, 32), "float8_e8m0fnu"),
    "nvfp4": MatrixFormat("e2m1", (1, 16)),
    "int8": MatrixFormat("int8", (1, 1 << 20), "bfloat16"),
    "e4m3": MatrixFormat("e4m3", (128, 128)),
    "e4m3, granules": MatrixFormat("e4m3", (64, 64), "bfloat16"),
}
# a decode step of 64 rows and a chunk of prefill; of experts, 64 of the 397B's 512
TOKENS = (64, 2048)
TOP_K, EXPERTS, HIDDEN, INNER = 10, 64, 4096, 1024


class Shapes:
    """Arguments for a device that is only described."""

    def __init__(self, device: str):
        self.kernels = Kernels(DEVICES[device].arch)
        self.sharding = jax.sharding.SingleDeviceSharding(toolchain.topology(DEVICES[device])[0])

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self.sharding)

    def matrix(self, shape: tuple[int, ...], form: MatrixFormat) -> BlockScaled:
        scales = form.scales_shape(shape)
        return BlockScaled(
            self.array(form.values_shape(shape), form.of_codes.dtype),
            self.array(scales, form.scale_dtype),
            form.block,
            jnp.dtype("bfloat16"),
            self.kernels.widening,
            form.codes,
            self.array(scales, "uint8") if form.zeros else None,
        )

    def experts(self, tokens: int, form: MatrixFormat) -> dict[str, Any]:
        return {
            "x": self.array((tokens, HIDDEN), "bfloat16"),
            "expert_ids": self.array((tokens, TOP_K), "int32"),
            "weights": self.array((tokens, TOP_K), "float32"),
            "gate_up": self.matrix((EXPERTS, 2 * INNER, HIDDEN), form),
            "down": self.matrix((EXPERTS, HIDDEN, INNER), form),
        }


def code_of_experts(device: str, kernel: str, tokens: int, form: MatrixFormat, folder: Path) -> list[str]:
    shapes = Shapes(device)
    options = {"chance": TOP_K / 512, "widening": shapes.kernels.kernel_widening, "interpret": False}
    function = {"gathered": gathered_kernels, "grouped": grouped_kernels}[kernel]
    lowered = jax.jit(lambda given: function(**given, **options)).lower(shapes.experts(tokens, form))
    names = (f"{kernel}_gate_up", f"{kernel}_down")
    return [body for name in names for body in kernel_code(lowered, shapes.kernels, folder, name)]


@pytest.mark.parametrize("form", ["int4", "int8", "e4m3", "e4m3, granules"])
@pytest.mark.parametrize("kernel", ["gathered", "grouped"])
@pytest.mark.parametrize("device", TARGETS)
def test_a_thread_loads_many_codes_at_once(device, kernel, form, tmp_path):
    """In the sizes of released models, where no mask is needed. These forms have no bytes but codes."""
    for code in code_of_experts(device, kernel, 4 if kernel == "gathered" else 64, FORMATS[form], tmp_path):
        loaded = set(re.findall(r"= load (<\d+ x i\d+>|i8), ptr addrspace\(1\)", code))
        assert loaded & {"<8 x i8>", "<16 x i8>", "<4 x i32>"}
        assert not loaded & {"i8", "<1 x i8>", "<2 x i8>", "<4 x i8>"}


def assert_multiplies_bfloat16(code: str) -> None:
    found = set(MFMA.findall(code))
    assert found
    assert all("bf16" in name for name in found), found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("device", TARGETS)
def test_grouped_experts_of_codes_use_matrix_units(device, tokens, form, tmp_path):
    codes = code_of_experts(device, "grouped", tokens, FORMATS[form], tmp_path)
    assert len(codes) == 2
    for code in codes:
        assert_multiplies_bfloat16(code)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("device", TARGETS)
def test_gathered_experts_of_codes_compile(device, form, tmp_path):
    assert len(code_of_experts(device, "gathered", 4, FORMATS[form], tmp_path)) == 2


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("device", TARGETS)
def test_a_product_with_one_matrix_of_codes_uses_matrix_units(device, form, tmp_path):
    shapes = Shapes(device)
    lowered = jax.jit(
        lambda x, matrix: scaled_matmul(
            x, matrix, jnp.bfloat16, widening=shapes.kernels.kernel_widening, interpret=False
        )
    ).lower(shapes.array((64, HIDDEN), "bfloat16"), shapes.matrix((INNER, HIDDEN), FORMATS[form]))
    [code] = kernel_code(lowered, shapes.kernels, tmp_path, "scaled_matmul")
    assert_multiplies_bfloat16(code)


@pytest.mark.parametrize("form", ["e4m3", "e4m3, granules"])
@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize("device", TARGETS)
def test_float8_times_float8_uses_matrix_units_of_float8(device, tokens, form, tmp_path):
    shapes = Shapes(device)
    lowered = jax.jit(
        lambda x, matrix: float8x8_matmul(
            x, matrix, jnp.bfloat16, float8=shapes.kernels.float8, interpret=False
        )
    ).lower(shapes.array((tokens, HIDDEN), "bfloat16"), shapes.matrix((INNER, HIDDEN), FORMATS[form]))
    [code] = kernel_code(lowered, shapes.kernels, tmp_path, "float8x8_matmul")
    found = set(MFMA.findall(code))
    assert found
    assert all("fp8.fp8" in name or "f8f6f4" in name for name in found), found

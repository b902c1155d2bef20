"""Writes packed_by_libraries.safetensors: one matrix, packed and multiplied out by the libraries themselves.

They want other versions of torch and transformers than the tests do, so they are no requirement. This was run
with the sources of gptqmodel 7.7.0, autoawq 0.2.9, auto-round 0.16.1 and amd-quark 0.13 on the path, and with
what importing them needs (pypcre, logbar, device-smi, tokenicer, threadpoolctl, defuser, onnx, onnxslim,
py-cpuinfo):

    python tests/checkpoint/pack_by_libraries.py
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.codes import KINDS, Kind, integers, stored_tensors

FILE = Path(__file__).with_name("packed_by_libraries.safetensors")
ROWS, COLUMNS = 32, 128
NAMES = ("gptq", "gptq with zeros", "gptq int8", "gptq stored as version 2", "auto-round", "awq", "quark")


def by_gptqmodel(weight: torch.Tensor, linear: nn.Linear, kind: Kind) -> tuple[dict[str, Any], torch.Tensor]:
    """Packed in version 2, the library's own in memory, and turned to version 1 as its `save` does."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    _, scales, zeros = integers(weight, kind)
    packed = TorchLinear(kind.bits, kind.group, kind.symmetric, False, COLUMNS, ROWS, register_buffers=True)
    places = torch.arange(COLUMNS, dtype=torch.int32) // kind.group
    packed.pack_original(linear, scales.float(), zeros.float(), places)
    packed.post_init()
    product = packed.dequantize_weight().T
    if kind.form != "v2 zeros":
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=kind.bits))
    return {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, product


def by_auto_round(weight: torch.Tensor, linear: nn.Linear, kind: Kind) -> tuple[dict[str, Any], torch.Tensor]:
    """Its packing "auto_round:auto_gptq"."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    _, scales, zeros = integers(weight, kind)
    packed = QuantLinear(kind.bits, kind.group, COLUMNS, ROWS, False)
    packed.pack(linear, scales.float(), zeros.float(), None)
    # a product with the identity: a sum has one term, of the float16 in which it multiplies out
    found = packed.forward(torch.eye(COLUMNS)).T.half()
    return {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}, found


def by_autoawq(weight: torch.Tensor, linear: nn.Linear, kind: Kind) -> tuple[dict[str, Any], torch.Tensor]:
    """Its GEMM packing."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    _, scales, zeros = integers(weight, kind)
    packed = WQLinear_GEMM.from_linear(
        linear, kind.bits, kind.group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    return tensors, dequantize_gemm(*tensors.values(), kind.bits, kind.group).T


def by_quark(weight: torch.Tensor, linear: nn.Linear, kind: Kind) -> tuple[dict[str, Any], torch.Tensor]:
    """Its packing of e2m1; the scales are the exponents of the other MXFP4 packing, one byte a group."""
    from quark.torch.utils.pack import Pack_fp4

    scales = stored_tensors(weight, kind)[0]["weight_scale"]
    wide = (2.0 ** (scales.float() - 127)).repeat_interleave(kind.group, 1)
    pack = Pack_fp4(None, "fp4")
    packed = pack.pack(linear.weight / wide, reorder=False)
    return {"weight": packed, "weight_scale": scales}, pack.unpack(packed, reorder=False) * wide


LIBRARIES = {"gptq": by_gptqmodel, "auto-round": by_auto_round, "awq": by_autoawq, "quark": by_quark}


@torch.no_grad()
def main() -> None:
    """Packs the matrix in each way."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5))
    found = {"weight": weight}
    for name in NAMES:
        kind, linear = KINDS[name], nn.Linear(COLUMNS, ROWS, bias=False)
        # numbers that are on the grid already, so that no rounding is a matter of taste
        linear.weight.data = stored_tensors(weight, kind)[1].float()
        tensors, product = LIBRARIES[kind.method](weight, linear, kind)
        found |= {f"{name}.{key}": tensor.contiguous().clone() for key, tensor in tensors.items()}
        found[f"{name}.product"] = product.contiguous().clone()
    save_file(found, FILE)
    print(f"{FILE.name}: {', '.join(found)}")


if __name__ == "__main__":
    main()

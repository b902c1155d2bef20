"""Quantised checkpoints in each packing, and float32 ones with the same numbers multiplied out.

What compressed-tensors has, its own compressors write and multiply out. GPTQ, AutoRound, AWQ and Quark are
written here, byte by byte as their libraries do: `pack_by_libraries.py` beside the tests let those pack one
matrix.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForCausalLM

from support.configs import random_config
from support.reference import build_reference

# Whole groups of 32 in every direction that is quantised.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}

_NEVER = r"(mlp\.gate|shared_expert_gate|lm_head|embed_tokens|in_proj_a|in_proj_b)$"
_LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|linear_attn\.(in_proj|out_proj).*|mlp\..*)$"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A packing with its settings.

    Attributes:
        name: of the case.
        method: quant_method.
        bits: of a code.
        group: columns that share a scale, 0 for a whole row.
        symmetric: without zero points.
        form: of compressed-tensors, its format.
        scales: their dtype.
        experts_only: of the layers' matrices the routed experts' alone.
    """

    name: str
    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    form: str = ""
    scales: torch.dtype = torch.bfloat16
    experts_only: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("packed int4", "compressed-tensors", form="pack-quantized"),
        Kind("packed int4 with zeros", "compressed-tensors", symmetric=False, form="pack-quantized"),
        Kind("packed int8 a row", "compressed-tensors", 8, 0, form="pack-quantized", scales=torch.float32),
        Kind("int8", "compressed-tensors", 8, 0, form="int-quantized", scales=torch.float32),
        Kind("float8 a row", "compressed-tensors", 8, 0, form="float-quantized"),
        Kind("mxfp4", "compressed-tensors", form="mxfp4-pack-quantized", experts_only=True),
        Kind("nvfp4", "compressed-tensors", 4, 16, form="nvfp4-pack-quantized", experts_only=True),
        Kind("gptq", "gptq", scales=torch.float16),
        Kind("gptq in groups of 64", "gptq", group=64, scales=torch.float16, experts_only=True),
        Kind("gptq stored as version 2", "gptq", group=32, scales=torch.float16, form="v2 zeros"),
        Kind("gptq with zeros", "gptq", symmetric=False, scales=torch.float16),
        Kind("gptq int8", "gptq", 8, scales=torch.float16, experts_only=True),
        Kind("auto-round", "auto-round", symmetric=False, scales=torch.float16),
        Kind("awq", "awq", symmetric=False, scales=torch.float16, experts_only=True),
        Kind("quark", "quark", form="mxfp4-pack-quantized", experts_only=True),
    )
}


@dataclasses.dataclass(frozen=True)
class CodesPair:
    """The same numbers twice.

    Attributes:
        config: of both.
        codes: folder of the quantised checkpoint.
        plain: folder with the products, in float32.
    """

    config: dict[str, Any]
    codes: Path
    plain: Path

    def reference(self) -> Qwen3_5MoeForCausalLM:
        """transformers with the products."""
        return Qwen3_5MoeForCausalLM.from_pretrained(self.plain, dtype=torch.float32).eval()


def codes_pair(folder: Path, seed: int, kind: Kind, sizes: dict[str, Any] | None = None) -> CodesPair:
    """Makes both from a random model."""
    config = random_config(seed) | SIZES | (sizes or {})
    build_reference(config, seed).save_pretrained(folder / "source")
    from safetensors.torch import load_file

    stored = load_file(folder / "source" / "model.safetensors")
    quantised, plain, ignored = {}, {}, []
    for key, value in stored.items():
        module = key.removesuffix(".weight")
        if _is_codes(module, kind):
            tensors, product = stored_tensors(value.float(), kind)
            quantised |= {f"{module}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
            plain[key] = product.float()
        else:
            quantised[key] = plain[key] = value.float()
            ignored += [module] if key.endswith(".weight") else []
    raw = json.loads((folder / "source" / "config.json").read_text())
    for name, tensors, extra in (
        ("codes", quantised, {"quantization_config": _described(kind, ignored)}),
        ("plain", plain, {}),
    ):
        (folder / name).mkdir()
        copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(raw | extra))
    shutil.rmtree(folder / "source")
    return CodesPair(config, folder / "codes", folder / "plain")


def _is_codes(module: str, kind: Kind) -> bool:
    if kind.experts_only and ".mlp.experts." not in module:
        return False
    return bool(_LINEAR.match(module)) and not re.search(_NEVER, module)


def stored_tensors(weight: torch.Tensor, kind: Kind) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of a file by their endings, the matrix that they mean)."""
    if kind.method == "compressed-tensors" or kind.method == "quark":
        tensors, product = _compressed(weight, kind)
        if kind.method == "quark":
            tensors["weight"] = tensors.pop("weight_packed")
        return tensors, product
    codes, scales, zeros = integers(weight, kind)
    columns = kind.group or weight.shape[1]
    wide = [x.repeat_interleave(columns, 1)[:, : weight.shape[1]].float() for x in (scales, zeros)]
    product = (codes.float() - wide[1]) * wide[0]
    if kind.method == "awq":
        return {
            "qweight": _awq(codes.T),
            "qzeros": _awq(zeros.T),
            "scales": scales.T,
        }, product
    less = 0 if kind.form == "v2 zeros" else 1
    return {
        "qweight": _words(codes, kind.bits).T,
        "qzeros": _words((zeros.T - less), kind.bits),
        "scales": scales.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // columns,
    }, product


def integers(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [out, in], scales [out, groups], zero points [out, groups])."""
    columns, half = kind.group or weight.shape[1], 2 ** (kind.bits - 1)
    groups = weight.reshape(weight.shape[0], -1, columns)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if kind.symmetric:
        scales = (torch.maximum(-low, high) / (half - 1)).to(kind.scales)
        zeros = torch.full_like(low, half)
    else:
        scales = ((high - low) / (2 * half - 1)).to(kind.scales)
        zeros = (-low / scales.float()).round().clamp(1, 2 * half - 1)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 2 * half - 1).reshape(weight.shape).int(), scales, zeros.int()


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] -> int32 [n, m * bits / 32], the first of a row lowest; the last word may have room."""
    each = 32 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % each))
    parts = values.reshape(values.shape[0], -1, each) << (bits * torch.arange(each))
    return torch.from_numpy(parts.sum(2).numpy().astype(np.uint32).view(np.int32))


def _awq(values: torch.Tensor) -> torch.Tensor:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % 8))
    return _words(values.reshape(values.shape[0], -1, 8)[..., order].reshape(values.shape), 4)


def _compressed(weight: torch.Tensor, kind: Kind) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scheme = QuantizationScheme(targets=["Linear"], weights=_arguments(kind))
    compressor = BaseCompressor.get_value_from_registry(kind.form)
    state = {"weight": weight, **_observed(weight, kind)}
    tensors = dict(compressor.compress(state, scheme))
    wide = dict(tensors)
    if wide["weight_scale"].is_floating_point() and kind.form != "nvfp4-pack-quantized":
        # in float32, so that the products are not rounded to the scales' dtype
        wide["weight_scale"] = wide["weight_scale"].float()
    if kind.form == "nvfp4-pack-quantized":
        # divided in float32 as the library divides, on values that its unpacking gives in bfloat16, exactly
        scales = tensors["weight_scale"].float() / tensors["weight_global_scale"]
        product = _e2m1(tensors["weight_packed"]) * scales.repeat_interleave(16, 1)
    elif kind.form == "mxfp4-pack-quantized":
        powers = 2.0 ** (tensors["weight_scale"].float() - 127)
        product = _e2m1(tensors["weight_packed"]) * powers.repeat_interleave(32, 1)
    else:
        product = compressor.decompress(wide, scheme)["weight"]
    return tensors, product


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    rows, half = packed.shape
    return unpack_fp4_from_uint8(packed, rows, 2 * half).float()


def _observed(weight: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
    """Scales and zero points, as an observer of the whole range would choose them."""
    columns = kind.group or weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, columns)
    largest = groups.abs().amax(2)
    if kind.form == "nvfp4-pack-quantized":
        shared = torch.tensor([448 * 6 / weight.abs().max()])
        return {
            "weight_scale": (shared * largest / 6).to(torch.float8_e4m3fn).float(),
            "weight_global_scale": shared,
        }
    if kind.form == "mxfp4-pack-quantized":
        return {"weight_scale": 2.0 ** (torch.floor(torch.log2(largest)) - 2)}
    if kind.form == "float-quantized":
        return {"weight_scale": (largest / 448).to(kind.scales)}
    _, scales, zeros = integers(weight, kind)
    found = {"weight_scale": scales}
    if not kind.symmetric:
        found["weight_zero_point"] = (zeros - 2 ** (kind.bits - 1)).to(torch.int8)
    return found


def _arguments(kind: Kind) -> QuantizationArgs:
    floats = kind.form in ("float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
    strategy = "tensor_group" if kind.form == "nvfp4-pack-quantized" else "group" if kind.group else "channel"
    return QuantizationArgs(
        num_bits=kind.bits,
        type="float" if floats else "int",
        symmetric=kind.symmetric,
        strategy=strategy,
        group_size=kind.group or None,
    )


def _described(kind: Kind, ignored: list[str]) -> dict[str, Any]:
    if kind.method == "compressed-tensors":
        weights = json.loads(_arguments(kind).model_dump_json())
        return {
            "quant_method": "compressed-tensors",
            "format": kind.form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ignored,
        }
    if kind.method == "quark":
        weight = {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0", "qscheme": "per_group"}
        return {
            "quant_method": "quark",
            "global_quant_config": {"weight": weight, "input_tensors": weight | {"is_dynamic": True}},
            "exclude": [*dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in ignored)],
            "layer_quant_config": {},
            "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        }
    shared = {"bits": kind.bits, "group_size": kind.group or -1, "sym": kind.symmetric}
    if kind.method == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": kind.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }
    if kind.method == "auto-round":
        plain = {name: {"bits": 16, "data_type": "fp"} for name in ignored if name.startswith("model.layers")}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "block_name_to_quantize": "model.layers",
            "extra_config": plain,
            **shared,
        }
    excluded = {f"-:{re.escape(name)}$": {} for name in ignored}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "desc_act": False,
        "dynamic": excluded,
        **shared,
    }

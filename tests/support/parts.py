"""Multimodal checkpoints with multi-token prediction and a vision tower, of random numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeVisionModel,
)

from qwen_moe_jax.checkpoint.block_scales import quantize
from qwen_moe_jax.checkpoint.names import canonical_name
from support.configs import random_config
from support.float8 import is_block_scaled
from support.reference import build_reference

FLOAT8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def random_vision_config(seed: int, out_hidden_size: int) -> dict[str, Any]:
    """The vision_config of a config.json, tiny."""
    rng = np.random.default_rng([seed, 36])

    def pick(*values: int) -> int:
        return int(values[rng.integers(len(values))])

    heads = pick(1, 2, 3)
    return {
        "model_type": "qwen3_5_moe",
        "depth": pick(1, 2, 3),
        "hidden_size": heads * pick(4, 8, 12),
        "intermediate_size": pick(6, 10, 20),
        "num_heads": heads,
        "in_channels": pick(1, 3, 4),
        "patch_size": pick(2, 3, 4),
        "spatial_merge_size": pick(1, 2, 3),
        "temporal_patch_size": pick(1, 2, 3),
        "out_hidden_size": out_hidden_size,
        "num_position_embeddings": pick(4, 9, 16),
        "deepstack_visual_indexes": [],
    }


def full_attention_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same sizes with one layer, of full attention: what multi-token prediction is made of."""
    return config | {"layer_types": ["full_attention"], "num_hidden_layers": 1}


def reference_mtp(config: dict[str, Any], layers: int = 1) -> nn.Module:
    """Parameters of multi-token prediction as modules of the reference, named as in a checkpoint."""
    given = {k: v for k, v in full_attention_config(config).items() if k != "model_type"}
    own = Qwen3_5MoeTextConfig(**given, attn_implementation="eager")
    hidden, eps = own.hidden_size, own.rms_norm_eps
    mtp = nn.Module()
    mtp.fc = nn.Linear(2 * hidden, hidden, bias=False)
    mtp.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps=eps)
    mtp.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps=eps)
    mtp.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(own, 0) for _ in range(layers)])
    mtp.norm = Qwen3_5MoeRMSNorm(hidden, eps=eps)
    return mtp.eval()


def reference_visual(vision: dict[str, Any]) -> Qwen3_5MoeVisionModel:
    """The reference's vision tower."""
    given = {key: value for key, value in vision.items() if key != "model_type"}
    return Qwen3_5MoeVisionModel(Qwen3_5MoeVisionConfig(**given))


@torch.no_grad()
def perturb_mtp(mtp: nn.Module, seed: int) -> None:
    """Weights that leave no part idle, of the sizes of `build_reference`."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in mtp.named_parameters():
        if name.endswith("norm.weight") or name.startswith("pre_fc_norm"):
            scale = 0.3
        else:
            scale = (2.0 if name.endswith("mlp.gate.weight") else 1.2) * weight.shape[-1] ** -0.5
        weight.copy_(scale * torch.randn(weight.shape, generator=generator))


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused stacks of experts -> one matrix an expert, as the published Qwen3.5 holds them."""
    split = {}
    for key, tensor in tensors.items():
        stack, _, projection = key.rpartition(".")
        if projection not in ("gate_up_proj", "down_proj") or not stack.endswith(".experts"):
            split[key] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            split |= {f"{stack}.{expert}.{part}.weight": m.contiguous() for part, m in parts.items()}
    return split


def quantised(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the tensors of an FP8 checkpoint, where the matrices of decoder layers are float8 with block scales;
    those matrices multiplied out), of one with a matrix an expert."""
    stored, plain = dict(tensors), {}
    for key, tensor in tensors.items():
        name = key.removeprefix("mtp.") if key.startswith("mtp.") else canonical_name(key)
        if name is None or not is_block_scaled(name):
            continue
        values, scales = map(torch.from_numpy, quantize_bits(tensor.float().numpy()))
        stored[key], stored[f"{key}_scale_inv"] = values.view(torch.float8_e4m3fn), scales
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        plain[key] = stored[key].float() * whole[: tensor.shape[0], : tensor.shape[1]]
    return stored, plain


def quantize_bits(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float8 as bytes, which torch can take; float32 scales)."""
    values, scales = quantize(matrix, np.dtype(np.float32))
    return values.view(np.uint8), scales


@torch.no_grad()
def take(module: nn.Module, values: dict[str, torch.Tensor], prefix: str) -> None:
    """Replaces the parameters that there are values for, fused stacks from one matrix an expert."""
    for name, parameter in module.named_parameters():
        stack, _, projection = (prefix + name).rpartition(".")
        if stack.endswith(".experts"):
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
            for expert, matrix in enumerate(parameter):
                matrix.copy_(torch.cat([values[f"{stack}.{expert}.{part}.weight"] for part in parts]))
        elif prefix + name in values:
            parameter.copy_(values[prefix + name])


class PartsCheckpoint:
    """A multimodal checkpoint folder and the modules that its tensors come from.

    Attributes:
        folder: of the checkpoint.
        config: the text model's dictionary.
        text: the reference's text model.
        mtp: as of `reference_mtp`.
        visual: the reference's vision tower.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        fused: bool = False,
        layers: int = 1,
        float8: bool = False,
    ):
        self.folder = folder
        self.config = random_config(seed)
        self.text = build_reference(self.config, seed).to(dtype)
        self.mtp = reference_mtp(self.config, layers)
        perturb_mtp(self.mtp, seed)
        self.mtp.to(dtype)
        vision = random_vision_config(seed, self.config["hidden_size"])
        torch.manual_seed(seed)
        self.visual = reference_visual(vision).to(dtype)

        mtp = {f"mtp.{name}": value for name, value in self.mtp.state_dict().items()}
        tensors = mtp if fused else split_experts(mtp)
        tensors |= {f"model.visual.{name}": value for name, value in self.visual.state_dict().items()}
        for name, value in self.text.named_parameters():
            key = name if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model.")
            tensors[key] = value.detach()
        if float8:
            tensors, plain = quantised(split_experts(tensors))
            take(self.mtp, plain, "mtp.")
            take(self.text.model, plain, "model.language_model.")
        self.write(tensors)
        text = self.config | {"mtp_num_hidden_layers": layers, "mtp_use_dedicated_embeddings": False}
        self.write_config(
            {
                "model_type": "qwen3_5_moe",
                "architectures": ["Qwen3_5MoeForConditionalGeneration"],
                "text_config": text,
                "vision_config": vision,
                "tie_word_embeddings": self.config["tie_word_embeddings"],
            }
            | ({"quantization_config": FLOAT8} if float8 else {})
        )

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces all tensors."""
        copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, self.folder / "model.safetensors", {"format": "pt"})

    def write_config(self, config: dict[str, Any]) -> None:
        """Replaces config.json."""
        (self.folder / "config.json").write_text(json.dumps(config))

    def read_config(self) -> dict[str, Any]:
        """config.json, parsed."""
        return json.loads((self.folder / "config.json").read_text())

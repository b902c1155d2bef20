"""FP8 checkpoints, and float32 ones with the same numbers multiplied out by torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from support.configs import random_config
from support.reference import build_reference

# Ragged blocks in every direction, gate and up rows that end inside one, heads that begin inside one.
RAGGED: dict[str, Any] = {
    "hidden_size": 160,
    "moe_intermediate_size": 136,
    "shared_expert_intermediate_size": 136,
}


# Matrices of the layers that published FP8 checkpoints keep in their float dtype.
_KEPT = ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "in_proj_a.weight", "in_proj_b.weight")
_VECTORS = ("norm.weight", "conv1d.weight", "A_log", "dt_bias", "_scale_inv")


def is_block_scaled(name: str) -> bool:
    """Whether published FP8 checkpoints hold a parameter, by canonical name, in float8 with block scales."""
    return name.startswith("layers.") and not name.endswith((*_KEPT, *_VECTORS))


@dataclasses.dataclass(frozen=True)
class Float8Pair:
    """The same numbers twice.

    Attributes:
        config: of both.
        float8: folder with float8 matrices and their scales.
        plain: folder with the products, in float32.
        source: folder with what was quantised.
    """

    config: dict[str, Any]
    float8: Path
    plain: Path
    source: Path

    def reference(self) -> Qwen3_5MoeForCausalLM:
        """transformers with the products."""
        return Qwen3_5MoeForCausalLM.from_pretrained(self.plain, dtype=torch.float32).eval()


def float8_pair(
    folder: Path, seed: int, sizes: dict[str, Any], *, scales: str = "float32", dtype: Any = torch.float32
) -> Float8Pair:
    """Makes both from a random model.

    Args:
        folder: they are put into.
        seed: of the configuration and the weights.
        sizes: that the configuration has instead of its own.
        scales: dtype of the scales.
        dtype: of what is quantised, and of what is beside the float8 matrices.
    """
    config = random_config(seed) | sizes
    model = build_reference(config, seed).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # magnitudes that differ from block to block, so that a wrong scale shows
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter *= 2 ** torch.randint(-1, 2, parameter.shape[-1:], generator=generator)
    model.save_pretrained(folder / "source")
    quantize_checkpoint(folder / "source", folder / "float8", scale_dtype=scales)
    write_multiplied_out(folder / "float8", folder / "plain")
    return Float8Pair(config, folder / "float8", folder / "plain", folder / "source")


def write_multiplied_out(float8: Path, plain: Path) -> None:
    """Writes a float32 checkpoint with the numbers of a float8 one, multiplied out by torch."""
    stored = load_file(float8 / "model.safetensors")
    products = {}
    for name, values in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            # every tensor of a file begins a block of its own
            whole = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            products[name] = values.float() * whole[: values.shape[0], : values.shape[1]]
        elif not name.endswith("_scale_inv"):
            products[name] = values.float()
    plain.mkdir()
    save_file(products, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((float8 / "config.json").read_text())
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))

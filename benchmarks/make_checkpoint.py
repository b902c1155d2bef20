"""Writes a checkpoint with random weights, to measure speed and memory on.

    python benchmarks/make_checkpoint.py mid FOLDER [--dtype bfloat16] [--mtp] [--model-type qwen3_moe]

`mid` has 12 layers, 64 experts (top-8) and 768 million parameters, of which a token uses 206 million;
`large` four layers of the 35B's shapes with a small vocabulary, 3.5 billion parameters, of which a token uses
311 million;
`35b-slice` four layers of the 35B in their exact shapes (7.5 GB in bfloat16); `397b-narrow` the 60 layers
and 512 experts of the 397B at a sixteenth of its width. `tiny` only tries the benchmarks themselves. Other
model types than Qwen3.5 MoE have what they have of the same sizes. There is no tokenizer: the benchmarks feed
token ids.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sizes import MROPE_SECTION, SIZES, family_sizes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer

NORM_SPREAD = 0.02  # norms all scale by one at initialisation


_QUICKLY = ("large", "35b-slice", "397b-narrow")


def _quickly_filled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose matrices repeat a few random numbers, since drawing billions takes minutes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    drawn = (0.02 * torch.randn(1 << 22)).to(dtype)
    for weight in model.parameters():
        flat = weight.data.view(-1)
        for first in range(0, flat.numel(), drawn.numel()):
            part = flat[first : first + drawn.numel()]
            part.copy_(drawn[: part.numel()])
    return model


@torch.no_grad()
def make_checkpoint(
    size: str, folder: Path, dtype: str, seed: int = 0, model_type: str = "qwen3_5_moe_text"
) -> int:
    """Writes the checkpoint; returns its number of parameters."""
    torch.manual_seed(seed)
    sizes = family_sizes(size, model_type)
    rope = {"rope_type": "default", "rope_theta": 1e7}
    if "linear_num_key_heads" in sizes:
        rope["partial_rotary_factor"] = 0.25
    if model_type.startswith("qwen3_5"):
        rope |= {"mrope_section": MROPE_SECTION[sizes["head_dim"]], "mrope_interleaved": True}
    config = AutoConfig.for_model(
        model_type,
        **sizes,
        max_position_embeddings=32768,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype=dtype,
    )
    if size in _QUICKLY:
        model = _quickly_filled(config, getattr(torch, dtype))
    else:
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight") and "linear_attn" not in name:
            weight.normal_(1.0 if model_type in ("qwen2_moe", "qwen3_moe") else 0.0, NORM_SPREAD)
    model.save_pretrained(folder, max_shard_size="1GB")
    return sum(weight.numel() for weight in model.parameters())


@torch.no_grad()
def add_mtp(folder: Path) -> None:
    """Adds a layer of multi-token prediction, random as the rest, in a file of its own."""
    config = Qwen3_5MoeTextConfig.from_pretrained(folder)
    layer = Qwen3_5MoeDecoderLayer(config, config.layer_types.index("full_attention"))
    hidden = config.hidden_size
    tensors = {f"mtp.layers.0.{name}": value for name, value in layer.state_dict().items()}
    for stack in [name for name in tensors if ".experts." in name]:
        tensors[stack] = 0.02 * torch.randn(tensors[stack].shape)
    tensors |= {f"mtp.{name}.weight": torch.zeros(hidden) for name in ("pre_fc_norm_embedding", "norm")}
    tensors["mtp.pre_fc_norm_hidden.weight"] = torch.zeros(hidden)
    tensors["mtp.fc.weight"] = 0.02 * torch.randn(hidden, 2 * hidden)
    save_file(
        {name: value.to(config.dtype).contiguous() for name, value in tensors.items()},
        folder / "model-mtp.safetensors",
        {"format": "pt"},
    )
    index, config_file = folder / "model.safetensors.index.json", folder / "config.json"
    if index.is_file():
        told = json.loads(index.read_text())
    else:
        with safe_open(folder / "model.safetensors", "pt") as file:
            told = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
    told["weight_map"] |= dict.fromkeys(tensors, "model-mtp.safetensors")
    index.write_text(json.dumps(told))
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"mtp_num_hidden_layers": 1}))


def main() -> int:
    """Parses the command line and writes one checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-type", default="qwen3_5_moe_text")
    parser.add_argument("--mtp", action="store_true", help="with a layer of multi-token prediction")
    args = parser.parse_args()
    count = make_checkpoint(args.size, args.folder, args.dtype, args.seed, args.model_type)
    if args.mtp:
        add_mtp(args.folder)
    print(f"{args.folder}: {count / 1e6:.1f} million parameters in {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints whose drafts often hold, although the whole text decides what comes next.

The text model's layers add a little to what the last token's embedding says; the multi-token prediction layer
says only that. So most drafts hold, none for certain, and a wrong state or key shows in log-probabilities.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.configs import random_config
from support.parts import perturb_mtp, reference_mtp, split_experts
from support.reference import build_reference


@torch.no_grad()
def drafting_checkpoint(
    folder: Path, seed: int, *, share: float = 0.1, poisoned: bool = False
) -> dict[str, Any]:
    """Writes one, and returns its config.

    Args:
        folder: to write to.
        seed: of configuration and weights.
        share: of what the layers add; with less, more drafts hold.
        poisoned: the drafter says anything.
    """
    config = random_config(seed)
    text, mtp = build_reference(config, seed), reference_mtp(config)
    for name, weight in text.model.layers.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
            weight *= share
    hidden = config["hidden_size"]
    perturb_mtp(mtp, seed)
    if not poisoned:
        for name, weight in mtp.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.zero_()
        mtp.fc.weight.copy_(torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1))
        mtp.pre_fc_norm_embedding.weight.zero_()  # zero-centred: all that is left is the length
        mtp.norm.weight.copy_(text.model.norm.weight)
    tensors = split_experts({f"mtp.{name}": value for name, value in mtp.state_dict().items()})
    tensors |= {name: value.detach() for name, value in text.named_parameters()}
    save_file(
        {n: t.clone().contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    own = config | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "mtp_num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(own))
    return own

"""The reference model of `transformers`: built at random, run in float32, bfloat16 or true float64, saved."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    modeling_rope_utils,
)
from transformers.utils import logging

from support.oracle import norm_centre

# Tiny matrices: a second thread costs more than it brings.
torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()  # each fallback to plain PyTorch is announced otherwise


_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
}


def build_reference(config: dict[str, Any], seed: int, wild: bool = True) -> Qwen3_5MoeForCausalLM:
    """A float32 reference model with random weights, in eval mode.

    Args:
        config: as of `random_config`, or the dictionary of a config.json.
        seed: of the weights.
        wild: every weight perturbed to where no part of the model is idle: matrices that keep activations
            of order one, a router that has opinions, norms, convolution, A_log and dt_bias away from
            their initial values, largest logits of about 5. False: the reference's own initialisation.
    """
    torch.manual_seed(seed)
    given = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    config_class, model_class = _CLASSES[config.get("model_type", "qwen3_5_moe_text")]
    model = model_class(config_class(**given)).eval()
    if wild:
        _perturb(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _perturb(model: Qwen3_5MoeForCausalLM, generator: torch.Generator) -> None:
    def normal(like: torch.Tensor, scale: float, centre: float = 0.0) -> torch.Tensor:
        return centre + scale * torch.randn(like.shape, generator=generator)

    tied = model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        fan_in = weight.shape[-1]
        if name.endswith("A_log"):
            new = torch.log(0.02 + 16 * torch.rand(weight.shape, generator=generator) ** 3)
        elif name.endswith("dt_bias"):
            new = normal(weight, 1.5, -1.0)
        elif name.endswith("conv1d.weight"):
            new = normal(weight, fan_in**-0.5)
        elif name.endswith("linear_attn.norm.weight"):
            new = normal(weight, 0.3, 1.0)
        elif name.endswith("norm.weight"):  # q_norm and k_norm among them
            new = normal(weight, 0.3, 1.0 - norm_centre(model.config.to_dict()))
        elif name.endswith(".bias"):
            new = normal(weight, 0.5)
        elif name.endswith("embed_tokens.weight"):
            new = normal(weight, 1.5 * fan_in**-0.5 if tied else 1.0)
        elif name.endswith("lm_head.weight"):
            new = normal(weight, 1.5 * fan_in**-0.5)
        elif name.endswith("mlp.gate.weight"):
            new = normal(weight, 2.0 * fan_in**-0.5)
        else:
            new = normal(weight, 1.2 * fan_in**-0.5)
        weight.copy_(new)


def save_reference(model: Qwen3_5MoeForCausalLM, folder: str | Path) -> Path:
    """Writes a Hugging Face checkpoint with the reference's own writer."""
    model.save_pretrained(folder)
    return Path(folder)


def parameters_float64(model: Qwen3_5MoeForCausalLM) -> dict[str, np.ndarray]:
    """The exact weights, for the oracle: names without `model.`, a tied lm_head left out."""
    return {
        name.removeprefix("model."): weight.detach().double().numpy()
        for name, weight in model.named_parameters()
    }


@torch.no_grad()
def reference_logits(model: Qwen3_5MoeForCausalLM, ids: Any, attention_mask: Any = None) -> np.ndarray:
    """One forward without a cache: ids [seq] or [batch, seq] -> logits [batch, seq, vocab].

    In the model's own precision (bfloat16 logits are returned as float32, which holds them exactly).
    """
    ids = torch.as_tensor(np.atleast_2d(np.asarray(ids)), dtype=torch.long)
    mask = None if attention_mask is None else torch.as_tensor(np.asarray(attention_mask), dtype=torch.long)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


@torch.no_grad()
def reference_greedy(model: Qwen3_5MoeForCausalLM, ids: Any, new_tokens: int) -> list[int]:
    """Greedy continuation of one row by prefill and cached single-token steps, without stop tokens.

    A model without full attention gets a whole forward for each token: the reference's cache cannot say
    how many tokens it holds when none of its layers keeps keys.
    """
    seen = torch.as_tensor(np.atleast_2d(np.asarray(ids)), dtype=torch.long)
    cached = "full_attention" in getattr(model.config, "layer_types", ["full_attention"])
    cache, step, tokens = None, seen, []
    for _ in range(new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=cached, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        seen = torch.cat([seen, token], dim=1)
        cache, step = out.past_key_values, token if cached else seen
    return tokens


class _Float64Torch:
    """The torch module as seen by the reference's code when its float32 is to mean float64."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64_reference(
    config: dict[str, Any], model: Qwen3_5MoeForCausalLM
) -> Iterator[Qwen3_5MoeForCausalLM]:
    """The same weights in a reference whose every computation is in float64.

    `model.double()` is not enough: the norms, the delta rule, the router and the softmax cast to float32 by
    name. Within this context that name means float64 in the reference's modules.
    """
    config_class, model_class = _CLASSES[config.get("model_type", "qwen3_5_moe_text")]
    modules = (sys.modules[model_class.__module__], modeling_rope_utils)
    proxy = _Float64Torch()
    try:
        for module in modules:
            module.torch = proxy
        torch.Tensor.float = torch.Tensor.double
        given = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        twin_config = config_class(**given, attn_implementation="eager")
        twin_config._experts_implementation = "eager"
        twin = model_class(twin_config).double().eval()
        twin.load_state_dict(model.state_dict())
        if twin.model.rotary_emb.inv_freq.dtype != torch.float64:
            raise RuntimeError("the rotary frequencies of the float64 reference are not float64")
        yield twin
    finally:
        for module in modules:
            module.torch = torch
        del torch.Tensor.float  # uncovers the method of the base class again

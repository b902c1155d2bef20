"""Checkpoints written by the reference, and ways to change them."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.configs import random_config
from support.reference import build_reference
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.names import is_matrix
from qwen_moe_jax.checkpoint.reader import read_parameters
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIED_SEED = 3  # a random configuration with tie_word_embeddings
UNTIED_SEED = 1


@functools.cache
def reference(seed: int, dtype: str = "float32"):
    """A tiny reference model; never changed by a test."""
    return build_reference(random_config(seed), seed).to(TORCH_DTYPES[dtype])


@functools.cache
def multimodal_reference(dtype: str):
    """The same text model inside a tiny vision-language model."""
    text = {key: value for key, value in random_config(UNTIED_SEED).items() if key != "model_type"}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 16,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision)).to(
        TORCH_DTYPES[dtype]
    )


def config_of(seed: int) -> ModelConfig:
    return ModelConfig.from_dict(random_config(seed))


def expected_of(config: ModelConfig, matrix: str = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    """What a model asks the reader for: matrices in one dtype, the rest in float32."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(matrix) if is_matrix(name) else jnp.float32)
        for name, shape in parameter_shapes(config).items()
    }


def random_parameters(config: ModelConfig, seed: int = 0, matrix: str = "float32") -> dict[str, jax.Array]:
    """Parameters of which every matrix consists of bfloat16 values, held in `matrix`, and no vector does."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, struct in expected_of(config, matrix).items():
        value = rng.standard_normal(struct.shape).astype(np.float32)
        if is_matrix(name):
            value = value.astype(jnp.bfloat16)
        parameters[name] = jnp.asarray(value.astype(struct.dtype))
    return parameters


def assert_same_bits(read: dict[str, jax.Array], expected: dict[str, jax.ShapeDtypeStruct], truth) -> None:
    """`truth` is canonical name -> float64 values."""
    assert list(read) == list(expected)
    for name, struct in expected.items():
        assert (read[name].dtype, read[name].shape) == (struct.dtype, struct.shape), name
        np.testing.assert_array_equal(np.asarray(read[name]).astype(np.float64), truth[name], name)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of a one-file checkpoint in place."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def fuse_experts(tensors: dict[str, torch.Tensor]) -> None:
    """One matrix an expert -> the fused layout of released bfloat16 checkpoints."""
    stacks = {key.split(".experts.")[0] + ".experts." for key in tensors if ".experts." in key}
    for stack in stacks:
        count = sum(key.startswith(stack) for key in tensors) // 3

        def every(projection: str, stack=stack, count=count) -> torch.Tensor:
            return torch.stack([tensors.pop(f"{stack}{e}.{projection}.weight") for e in range(count)])

        tensors[stack + "gate_up_proj"] = torch.cat([every("gate_proj"), every("up_proj")], dim=1)
        tensors[stack + "down_proj"] = every("down_proj")


def shards_of(folder):
    """The shards in their order."""
    return sorted(folder.glob("model-*.safetensors"))


CONFIG = config_of(UNTIED_SEED)
EXPECTED = expected_of(CONFIG)


def error_of(folder, expected=None):
    """What reading says of a damaged checkpoint; it names the folder."""
    with pytest.raises(CheckpointError) as caught:
        read_parameters(folder, EXPECTED if expected is None else expected)
    message = str(caught.value)
    assert str(folder) in message
    return message

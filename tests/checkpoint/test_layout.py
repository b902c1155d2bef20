"""The key table against the reference's own parameters."""

from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import config_of
from support.configs import random_config
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.names import canonical_name, hf_key, is_matrix, skipped_family
from qwen_moe_jax.checkpoint.pieces import expert_pieces
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.decoder import abstract_decoder, named_parameters
from qwen_moe_jax.model.params import DtypePolicy


@pytest.mark.parametrize("seed", range(24))
def test_names_and_shapes_are_the_references_own(seed):
    raw = {key: value for key, value in random_config(seed).items() if key != "model_type"}
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**raw))
    reference = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    ours = {hf_key(name): shape for name, shape in parameter_shapes(config_of(seed)).items()}
    assert ours == reference


@pytest.mark.parametrize("seed", range(8))
def test_the_decoder_declares_the_same_parameters_and_the_same_matrices(seed):
    policy = DtypePolicy(compute=jnp.dtype(jnp.bfloat16), matrix=jnp.dtype(jnp.bfloat16))
    declared = named_parameters(abstract_decoder(config_of(seed), policy, Kernels("cpu")))
    assert {name: struct.shape for name, struct in declared.items()} == parameter_shapes(config_of(seed))
    assert {name for name, s in declared.items() if s.dtype == policy.matrix} == set(
        filter(is_matrix, declared)
    )


def test_both_prefixes_lead_to_the_same_name():
    for name in parameter_shapes(config_of(0)):
        assert canonical_name(hf_key(name)) == name
        if name != "lm_head.weight":
            assert canonical_name("model.language_model." + name) == name


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "model.visual"),
        ("mtp.fc.weight", "mtp"),
        ("mtp.layers.0.mlp.experts.0.gate_proj.weight", "mtp"),
        ("transformer.wte.weight", None),
        ("lm_head.bias", None),
    ],
)
def test_keys_outside_the_text_model_have_no_name(key, family):
    assert canonical_name(key) is None
    assert skipped_family(key) == family


def test_the_text_model_belongs_to_no_skipped_family():
    for name in parameter_shapes(config_of(0)):
        assert skipped_family(hf_key(name)) is None


@pytest.mark.parametrize("seed", range(6))
def test_expert_pieces_cover_every_element_of_a_stack_once_and_in_order(seed):
    for name, shape in parameter_shapes(config_of(seed)).items():
        pieces = expert_pieces(name, shape)
        assert bool(pieces) == (".mlp.experts." in name)
        if pieces:
            starts = np.cumsum([0] + [prod(piece.shape) for piece in pieces])
            flat = [np.ravel_multi_index(piece.origin, shape) for piece in pieces]
            assert flat == list(starts[:-1])
            assert starts[-1] == prod(shape)
            assert len({piece.name for piece in pieces}) == len(pieces)

"""Families beside Qwen3.5 MoE: as close to the float64 truth as their references, on meshes too."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import oracle, parity
from support.configs import family_config, random_ids
from support.reference import (
    build_reference,
    parameters_float64,
    reference_greedy,
    reference_logits,
    save_reference,
)
from support.slow import some

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.layout import matrix_scheme
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.layout_check import check_layout
from qwen_moe_jax.model.points import points_of
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.schemes.presets import FORMATS, preset

DENSE = "qwen3_5_text"
CASES = [(DENSE, seed) for seed in (0, 5, *range(6, 18))]
LENGTHS = (1, 65)
# Float32 through the layers, in another order of summation: largest difference over the largest logit.
MESH_TOLERANCE = 2e-5


@functools.cache
def saved(model_type: str, seed: int) -> Path:
    return save_reference(build_reference(family_config(model_type, seed), seed), Path(tempfile.mkdtemp()))


@functools.cache
def loaded(model_type: str, seed: int) -> QwenMoe:
    return QwenMoe.from_pretrained(saved(model_type, seed), dtype=jnp.float32)


@pytest.mark.parametrize(("model_type", "seed"), some(CASES, lambda i: i < 2))
def test_logits_and_tokens_are_the_truths_and_the_references(model_type: str, seed: int) -> None:
    config = family_config(model_type, seed)
    reference = build_reference(config, seed)
    for length in LENGTHS:
        ids = random_ids(config, length, seed)
        truth = oracle.forward(config, parameters_float64(reference), ids).logits
        ours = np.asarray(loaded(model_type, seed).logits(ids[None]))[0]
        case = parity.Case(seed, ids, truth, np.inf)
        error = parity.measure(case, ours, reference_logits(reference, ids)[0])
        assert error.ours_max <= parity.LARGEST_DIFFERENCE, error
        assert error.ratio <= parity.LARGEST_RATIO, error
    out = loaded(model_type, seed).generate(ids[None], max_new_tokens=16)
    assert out.sequences[0] == reference_greedy(reference, ids, 16)


@pytest.mark.parametrize(("attention", "sizes"), [("tensor", (1, 2, 2)), ("data", (1, 2, 2))])
def test_a_dense_model_on_a_mesh_equals_one_device(attention: str, sizes: tuple[int, int, int]) -> None:
    config = family_config(DENSE, 0)
    ids = np.stack([random_ids(config, 16, i) for i in range(4)])
    model = QwenMoe.from_pretrained(
        saved(DENSE, 0), dtype=jnp.float32, mesh=make_mesh(*sizes), attention=attention
    )
    one, found = (np.asarray(m.logits(ids)) for m in (loaded(DENSE, 0), model))
    assert np.abs(found - one).max() / np.abs(one).max() <= MESH_TOLERANCE


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"shared_expert": "fused"}, "no shared expert"),
        ({"shared_expert": "sharded"}, "no shared expert"),
        ({"expert_dispatch": "all_to_all"}, "no experts"),
    ],
)
def test_modes_that_mean_nothing_to_a_dense_model_are_refused(choice: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QwenMoe.from_pretrained(saved(DENSE, 0), dtype=jnp.float32, mesh=make_mesh(1, 2, 1), **choice)


@pytest.mark.parametrize("seed", range(6))
def test_config_json_goes_there_and_back(seed: int) -> None:
    config = ModelConfig.from_dict(family_config(DENSE, seed))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.num_experts == 0
    assert config.intermediate_size == family_config(DENSE, seed)["intermediate_size"]


def test_a_float8_dense_mlp_is_read_as_its_codes_mean(tmp_path: Path) -> None:
    """Against the reference with the codes multiplied out by torch; every matrix here is one block wide."""
    config = family_config(DENSE, 0)
    quantize_checkpoint(saved(DENSE, 0), tmp_path / "fp8", quantization=preset("fp8"))
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    reference = build_reference(config, 0)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            scales = tensors.get(f"{name}_scale_inv")
            if scales is not None:
                rows, columns = (x.repeat_interleave(128) for x in map(torch.arange, scales.shape))
                spread = scales.float()[rows[: len(weight)]][:, columns[: weight.shape[1]]]
                weight.copy_(tensors[name].float() * spread)
    ids = random_ids(config, 40, 0)
    model = QwenMoe.from_pretrained(tmp_path / "fp8", dtype=jnp.float32)
    ours, theirs = np.asarray(model.logits(ids[None])), reference_logits(reference, ids)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= parity.LARGEST_DIFFERENCE


def test_a_dense_model_passes_its_layout_check_and_converts(tmp_path: Path) -> None:
    folder, model = saved(DENSE, 0), loaded(DENSE, 0)
    report = check_layout(
        folder, Layout(model.config, make_mesh(1, 2, 2)), jnp.dtype(jnp.float32), make_kernels("cpu")
    )
    assert report.ok
    assert {c.branch for c in report.comparisons} >= {"dense MLP", "attention", "Gated DeltaNet"}
    convert_checkpoint(folder, tmp_path / "orbax")
    ids = random_ids(family_config(DENSE, 0), 20, 1)[None]
    converted = QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32)
    np.testing.assert_array_equal(converted.logits(ids), model.logits(ids))


def test_matrices_of_dense_mlps_have_a_scheme_in_every_format() -> None:
    config = ModelConfig.from_dict(family_config(DENSE, 0))
    for form in FORMATS:
        coded = dataclasses.replace(config, quantization=preset(form).with_scales_in("bfloat16"))
        assert matrix_scheme(coded, "layers.0.mlp.up_proj.weight") is not None, form


def test_a_dense_layer_has_one_point_for_its_mlp() -> None:
    points = points_of(ModelConfig.from_dict(family_config(DENSE, 0)))
    inside = {name.removeprefix("layers.0.") for name in points if name.startswith("layers.0.")}
    assert "mlp" in inside
    assert not inside & {"moe", "router", "router_logits", "experts", "shared_expert", "shared_gate"}

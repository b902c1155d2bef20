"""The parts beside the text model: their key tables against the reference's modules, and reading them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import TORCH_DTYPES, config_of, edit, expected_of
from support.configs import random_config
from support.float8 import is_block_scaled
from support.parts import (
    PartsCheckpoint,
    random_vision_config,
    reference_mtp,
    reference_visual,
    split_experts,
)

from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.names import PART_PREFIXES, canonical_name, hf_key, scale_name
from qwen_moe_jax.checkpoint.orbax import save_orbax, stored_arrays
from qwen_moe_jax.checkpoint.parts import mtp_shapes, part_keys, part_shapes, read_part, visual_shapes
from qwen_moe_jax.checkpoint.reader import read_parameters
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError, ConfigError, InputError
from qwen_moe_jax.part_configs import VisionConfig, mtp_layers

SEED = 1
PARTS = tuple(PART_PREFIXES)
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def checkpoint(tmp_path):
    """To be damaged; float32, one matrix an expert."""
    return PartsCheckpoint(tmp_path, SEED)


def module_of(checkpoint, part):
    return checkpoint.mtp if part == "mtp" else checkpoint.visual


def error_of(folder, part, kind=CheckpointError):
    """What reading says of a damaged part, in one line."""
    with pytest.raises(kind) as caught:
        read_part(folder, part)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The key tables


@pytest.mark.parametrize("seed", range(16))
def test_names_and_shapes_of_mtp_are_those_of_the_references_modules(seed):
    layers = 1 + seed % 2
    with torch.device("meta"):
        reference = reference_mtp(random_config(seed), layers).state_dict()
    assert mtp_shapes(config_of(seed), layers) == {k: tuple(v.shape) for k, v in reference.items()}


@pytest.mark.parametrize("seed", range(16))
def test_names_and_shapes_of_the_vision_tower_are_the_references_own(seed):
    raw = random_vision_config(seed, out_hidden_size=8 * (1 + seed % 5))
    with torch.device("meta"):
        reference = reference_visual(raw).state_dict()
    ours = visual_shapes(VisionConfig.from_dict({"vision_config": raw}))
    assert ours == {k: tuple(v.shape) for k, v in reference.items()}


def test_a_vision_config_that_says_nothing_is_the_references_default():
    with torch.device("meta"):
        reference = reference_visual({}).state_dict()
    ours = visual_shapes(VisionConfig.from_dict({"vision_config": {}}))
    assert ours == {k: tuple(v.shape) for k, v in reference.items()}


def test_keys_and_names_lead_to_each_other_and_each_key_belongs_to_one_table(checkpoint):
    tables = {part: part_shapes(checkpoint.folder, part, read_config(checkpoint.folder)) for part in PARTS}
    for part, shapes in tables.items():
        keys = part_keys(part)
        for name in shapes:
            key = keys.key(name)
            assert keys.name(key) == name
            assert keys.skipped(key) is None
            assert canonical_name(key) is None, "the text model does not claim it"
            for other in set(PARTS) - {part}:
                assert part_keys(other).name(key) is None
                assert part_keys(other).skipped(key) is not None
        for name in parameter_shapes(config_of(SEED)):
            for key in (hf_key(name), "model.language_model." + name):
                assert keys.name(key) is None
                assert keys.skipped(key) is not None


# What is read


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("seed", "fused"), [(1, False), (1, True), (4, False), (9, True)])
def test_a_part_is_read_bit_for_bit(seed, fused, stored, part, tmp_path):
    checkpoint = PartsCheckpoint(
        tmp_path, seed, dtype=TORCH_DTYPES[stored], fused=fused, layers=1 + seed // 9
    )
    truth = module_of(checkpoint, part).state_dict()
    for dtype in ("auto", jnp.float32):
        read, granules = read_part(tmp_path, part, dtype=dtype)
        assert not granules
        assert list(read) == list(part_shapes(tmp_path, part, read_config(tmp_path)))
        assert read.keys() == truth.keys()
        for name, value in read.items():
            matrix = stored if dtype == "auto" else "float32"
            assert value.dtype == (matrix if value.ndim > 1 else "float32"), name
            np.testing.assert_array_equal(
                np.asarray(value).astype(np.float64), truth[name].double().numpy(), name
            )


@pytest.mark.parametrize("part", PARTS)
def test_a_float32_part_asked_for_in_bfloat16_is_rounded_to_nearest_even_except_vectors(checkpoint, part):
    truth = module_of(checkpoint, part).state_dict()
    for name, value in read_part(checkpoint.folder, part, dtype=jnp.bfloat16)[0].items():
        expected = truth[name].bfloat16() if value.ndim > 1 else truth[name]
        np.testing.assert_array_equal(np.asarray(value).astype(np.float64), expected.double().numpy(), name)


def test_the_text_model_is_read_beside_the_parts_and_names_them_as_skipped(checkpoint):
    config = ModelConfig.from_file(checkpoint.folder)
    read, report = read_parameters(checkpoint.folder, expected_of(config))
    stored = {
        "mtp": len(split_experts(checkpoint.mtp.state_dict())),
        "model.visual": len(checkpoint.visual.state_dict()),
    }
    assert report.skipped == stored
    assert read.keys() == parameter_shapes(config).keys()
    skipped = inspect_checkpoint(checkpoint.folder).skipped_bytes
    assert skipped == {
        "mtp": 4 * sum(p.numel() for p in checkpoint.mtp.parameters()),
        "model.visual": 4 * sum(p.numel() for p in checkpoint.visual.parameters()),
    }


def test_a_damaged_text_model_does_not_keep_a_part_from_being_read(checkpoint):
    edit(checkpoint.folder, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    for part in PARTS:
        read_part(checkpoint.folder, part)


# What is refused

MISFIT = [
    ("mtp", "mtp.fc.weight", "mtp.layers.0.mlp.experts.2.up_proj.weight", "mtp.layers.1.mlp.gate.weight"),
    (
        "visual",
        "model.visual.pos_embed.weight",
        "model.visual.merger.norm.bias",
        "model.visual.deepstack_merger_list.0.norm.bias",
    ),
]


@pytest.mark.parametrize(("part", "short", "missing", "extra"), MISFIT, ids=PARTS[::-1])
def test_what_does_not_fit_is_named_at_once(part, short, missing, extra, checkpoint):
    shape = {}

    def damage(tensors):
        shape[short] = list(tensors[short].shape)
        tensors[short] = tensors[short][1:].clone()
        del tensors[missing]
        tensors[extra] = torch.zeros(3)

    edit(checkpoint.folder, damage)
    message = error_of(checkpoint.folder, part)
    assert str(checkpoint.folder) in message
    assert f"missing keys: {missing};" in message
    assert f"unexpected keys: {extra};" in message
    rows, columns = shape[short]
    assert f"wrong shapes: {short} is [{rows - 1}, {columns}] instead of [{rows}, {columns}]." in message
    other = "visual" if part == "mtp" else "mtp"
    read_part(checkpoint.folder, other)


@pytest.mark.parametrize(("part", "key"), [("mtp", "mtp.norm.weight"), ("visual", MISFIT[1][2])])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_refused(value, part, key, checkpoint):
    edit(checkpoint.folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    assert f"NaN or infinite values in {key};" in error_of(checkpoint.folder, part)


@pytest.mark.parametrize(("part", "words"), [("mtp", "multi-token prediction"), ("visual", "vision tower")])
def test_a_checkpoint_without_the_part_says_so(part, words, checkpoint):
    prefix = PART_PREFIXES[part]

    def drop(tensors):
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    edit(checkpoint.folder, drop)
    assert f"holds no {words} (no key begins with {prefix})" in error_of(checkpoint.folder, part)


def test_other_dtypes_are_refused(checkpoint):
    def halve(tensors):
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].half()

    edit(checkpoint.folder, halve)
    assert "wrong dtypes: mtp.fc.weight is F16 instead of F32 or BF16." in error_of(checkpoint.folder, "mtp")
    with pytest.raises(InputError, match=r"dtype is .*float16.*expected jnp.float32"):
        read_part(checkpoint.folder, "visual", dtype=jnp.float16)


def test_float8_that_config_json_does_not_speak_of_is_refused(checkpoint):
    q_proj = "mtp.layers.0.self_attn.q_proj.weight"

    def quantise(tensors):
        tensors[q_proj] = tensors[q_proj].to(torch.float8_e4m3fn)
        tensors[q_proj + "_scale_inv"] = torch.ones(1, 1)

    edit(checkpoint.folder, quantise)
    message = error_of(checkpoint.folder, "mtp")
    assert f"unexpected keys: {q_proj}_scale_inv;" in message
    assert f"wrong dtypes: {q_proj} is F8_E4M3 instead of F32 or BF16" in message
    read_part(checkpoint.folder, "visual")


@pytest.mark.parametrize("seed", [1, 4, 9])
def test_float8_mtp_stays_float8_with_its_scales_and_the_tower_beside_it_does_not(seed, tmp_path):
    checkpoint = PartsCheckpoint(tmp_path, seed, float8=True)
    read, granules = read_part(tmp_path, "mtp", dtype=jnp.bfloat16)
    assert set(read) == set(part_shapes(tmp_path, "mtp", read_config(tmp_path)))
    truth = checkpoint.mtp.state_dict()
    for name, wanted in truth.items():
        found = read[name].astype(jnp.float32)
        if is_block_scaled(name):
            assert read[name].dtype == jnp.float8_e4m3fn
            scales = read[scale_name(name)]
            for axis, size in zip((-2, -1), granules[name].block, strict=True):
                scales = jnp.repeat(scales, size, axis)
            found = found * scales[..., : wanted.shape[-2], : wanted.shape[-1]]
            np.testing.assert_array_equal(np.asarray(found), wanted.numpy(), name)
        elif wanted.ndim > 1:
            np.testing.assert_array_equal(np.asarray(found), wanted.bfloat16().float().numpy(), name)
    assert granules.keys() == {name for name in truth if is_block_scaled(name)}
    tower, granules = read_part(tmp_path, "visual")
    assert not granules
    assert tower.keys() == checkpoint.visual.state_dict().keys()


def test_a_missing_scale_of_float8_mtp_is_named(tmp_path):
    checkpoint = PartsCheckpoint(tmp_path, SEED, float8=True)
    key = "mtp.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    edit(checkpoint.folder, lambda tensors: tensors.pop(key))
    assert f"missing keys: {key}" in error_of(checkpoint.folder, "mtp")


def test_an_orbax_checkpoint_of_the_text_model_alone_holds_no_part(tmp_path):
    config = config_of(SEED)
    save_orbax(
        tmp_path,
        {name: jnp.zeros(shape) for name, shape in parameter_shapes(config).items()},
        config,
        dtype=jnp.float32,
    )
    for part, words in (("mtp", "multi-token prediction"), ("visual", "vision tower")):
        assert f"holds no {words}" in error_of(tmp_path, part)


def test_conversion_takes_multi_token_prediction_along_and_names_the_tower(checkpoint, tmp_path):
    report = convert_checkpoint(checkpoint.folder, tmp_path / "orbax")
    assert set(report.skipped) == {"model.visual"}
    read, _ = read_part(tmp_path / "orbax", "mtp")
    for name, value in checkpoint.mtp.state_dict().items():
        np.testing.assert_array_equal(np.asarray(read[name]), value.numpy(), name)
    names = set(stored_arrays(tmp_path / "orbax"))
    assert names == set(parameter_shapes(ModelConfig.from_file(checkpoint.folder)))


def test_an_unknown_part_and_an_absent_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="part is 'audio'; expected 'visual' or 'mtp'"):
        read_part(tmp_path, "audio")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        read_part(tmp_path / "none", "mtp")


# What config.json says of them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mtp_num_hidden_layers": None}, "mtp_num_hidden_layers is None; expected"),
        ({"mtp_num_hidden_layers": 0}, "mtp_num_hidden_layers is 0; expected"),
        ({"mtp_num_hidden_layers": True}, "mtp_num_hidden_layers is True; expected"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is true"),
    ],
)
def test_mtp_that_config_json_does_not_describe_is_refused(change, message, checkpoint):
    raw = checkpoint.read_config()
    raw["text_config"] |= change
    checkpoint.write_config(raw)
    assert message in error_of(checkpoint.folder, "mtp", ConfigError)


def test_mtp_layers_are_read_from_either_form():
    assert mtp_layers({"model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 2}) == 2
    assert mtp_layers({"model_type": "qwen3_5_moe", "text_config": {"mtp_num_hidden_layers": 3}}) == 3
    with pytest.raises(ConfigError):
        mtp_layers({"model_type": "qwen3_5_moe", "mtp_num_hidden_layers": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth 0; expected a positive integer"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"hidden_size": 12, "num_heads": 5}, "not a multiple of num_heads 5"),
        ({"model_type": "siglip"}, "model_type 'siglip'"),
        ({"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes"),
        ({"out_hidden_size": 7}, "out_hidden_size 7, but the text model"),
    ],
)
def test_a_vision_config_that_is_not_implemented_is_refused(change, message, checkpoint):
    raw = checkpoint.read_config()
    raw["vision_config"] |= change
    checkpoint.write_config(raw)
    assert message in error_of(checkpoint.folder, "visual", ConfigError)


def test_a_vision_tower_without_a_vision_config_is_refused(checkpoint):
    raw = checkpoint.read_config()
    del raw["vision_config"]
    checkpoint.write_config(raw)
    assert "no vision_config" in error_of(checkpoint.folder, "visual", ConfigError)

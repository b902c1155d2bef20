"""FP8 with block scales: the arithmetic against torch's, the checkpoint against what transformers reads."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import TIED_SEED, edit, multimodal_reference, reference
from safetensors import safe_open
from safetensors.torch import load_file
from support.configs import WHOLE_BLOCKS, random_config
from support.reference import build_reference
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax.checkpoint.block_scales import BLOCK, dequantize, quantize, scale_shape
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.cli import main
from qwen_moe_jax.errors import CheckpointError, InputError

SCALES = {"bfloat16": np.dtype(jnp.bfloat16), "float32": np.dtype(np.float32)}
SHAPES = [(1, 1), (128, 128), (129, 127), (300, 50), (7, 513), (256, 384)]
UNQUANTISED = ("in_proj_a", "in_proj_b", "mlp.gate.", "shared_expert_gate", "embed_tokens", "lm_head")


def matrix(shape, seed):
    """Magnitudes from 1e-12 to 1e12, block by block and within blocks."""
    rng = np.random.default_rng(seed)
    down, across = scale_shape(shape)
    size = np.repeat(np.repeat(10.0 ** rng.uniform(-8, 8, (down, across)), BLOCK, 0), BLOCK, 1)
    spread = 10.0 ** rng.uniform(-4, 4, shape)
    return (rng.normal(size=shape) * spread * size[: shape[0], : shape[1]]).astype(np.float32)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_is_the_nearest_under_its_blocks_scale(shape, scales):
    exact = matrix(shape, seed=sum(shape))
    values, scale = quantize(exact, SCALES[scales])
    assert values.shape == shape
    assert scale.shape == scale_shape(shape)
    assert scale.dtype == SCALES[scales]
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            where = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            largest, one = np.abs(exact[where]).max(), np.float32(scale[row, column])
            # as large as the largest magnitude needs, to a rounding of the scale's own dtype
            assert one == pytest.approx(largest / 448, rel=2**-8 if scales == "bfloat16" else 1e-6)
            wanted = torch.from_numpy(np.clip(exact[where] / one, -448, 448)).to(torch.float8_e4m3fn)
            np.testing.assert_array_equal(values[where].astype(np.float32), wanted.float().numpy())
    # three bits of mantissa, and below 2^-6 a fixed step of 2^-9, both halved by rounding to nearest
    whole = np.repeat(np.repeat(scale.astype(np.float32), BLOCK, 0), BLOCK, 1)[: shape[0], : shape[1]]
    bound = np.maximum(np.abs(exact) * 2**-4, whole * 2**-10)
    if scales == "bfloat16":  # the largest may be cut off at 448 of a scale rounded down
        bound = np.maximum(bound, np.abs(exact) * 2**-8)
    assert (np.abs(dequantize(values, scale) - exact) <= bound * (1 + 1e-6)).all()


def test_what_float8_can_hold_comes_back_bit_for_bit():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, (200, 260)).astype(np.uint8) | rng.integers(0, 2, (200, 260), np.uint8) << 7
    codes[::BLOCK, ::BLOCK] = 0x7E  # every block holds 448
    values = codes.view(jnp.float8_e4m3fn)
    scale = 2.0 ** rng.integers(-20, 20, scale_shape(values.shape))
    again, found = quantize(dequantize(values, scale.astype(np.float32)), SCALES["float32"])
    np.testing.assert_array_equal(found, scale)
    np.testing.assert_array_equal(again.view(np.uint8), codes)


def test_zeros_and_the_smallest_numbers_stay_finite():
    tiny = np.zeros((130, 130), np.float32)
    tiny[0, 0], tiny[129, 129] = 1e-45, -1e-39
    for scales in SCALES.values():
        values, scale = quantize(tiny, scales)
        assert np.isfinite(values.astype(np.float32)).all()
        assert (scale.astype(np.float32) > 0).all()
        assert scale[0, 1] == 1
        assert np.abs(dequantize(values, scale)).max() <= 1.1e-39
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        dequantize(values, scale[:1])


def saved(tmp_path, seed, dtype, **sizes):
    """A reference whose matrices are wider than a block, and the folder it is saved in."""
    model = build_reference(random_config(seed) | sizes, seed).to(dtype)
    model.save_pretrained(tmp_path / "float", max_shard_size="200KB")
    return model, tmp_path / "float"


def is_quantised(name):
    return not any(part in name for part in (*UNQUANTISED, "norm", "conv1d", "A_log", "dt_bias"))


def assert_quantised(read, exact, name, rounding):
    """A float8 step is 1/8 of a value, or 2^-9 of its block's scale; off by half of it, and by `rounding`."""
    bound = np.abs(exact) * (2**-4 + rounding) + np.abs(exact).max() / 448 * 2**-9
    assert (np.abs(read - exact) <= bound).all(), name
    assert np.abs(read - exact).max() > 0, name


@pytest.mark.parametrize(
    ("seed", "dtype", "scales", "sizes"),
    [
        (1, torch.bfloat16, "bfloat16", {}),
        (2, torch.float32, "float32", {}),
        (5, torch.bfloat16, "float32", {"moe_intermediate_size": 24, "hidden_size": 96}),
    ],
)
def test_transformers_reads_it_back(seed, dtype, scales, sizes, tmp_path):
    model, source = saved(tmp_path, seed, dtype, **(WHOLE_BLOCKS | sizes))
    quantize_checkpoint(source, tmp_path / "fp8", scale_dtype=scales, max_shard_bytes=100_000)
    assert len(list((tmp_path / "fp8").glob("model-*.safetensors"))) > 1
    found, info = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    original = dict(model.named_parameters())
    for name, weight in found.named_parameters():
        exact, read = original[name].detach().double().numpy(), weight.detach().double().numpy()
        if is_quantised(name):
            assert_quantised(
                read, exact, name, rounding=2**-7
            )  # of the scale and of what is read to bfloat16
        else:
            np.testing.assert_allclose(read, exact, rtol=2**-8, err_msg=name)


@pytest.mark.parametrize("seed", [1, 2])
def test_ragged_blocks_belong_to_their_scales(seed, tmp_path):
    """With block sizes spelled out in torch, which transformers does not do for ragged ones."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 136, "shared_expert_intermediate_size": 260}
    model, source = saved(tmp_path, seed, torch.float32, **sizes)
    report = quantize_checkpoint(source, tmp_path / "fp8", scale_dtype="float32")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert report.written_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    model.save_pretrained(tmp_path / "one")  # one matrix an expert, one file
    original = load_file(tmp_path / "one" / "model.safetensors")
    assert {key.removesuffix("_scale_inv") for key in stored} == original.keys()
    for name, exact in original.items():
        read = stored[name].float()
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            read = read * scale[: read.shape[0], : read.shape[1]]
            assert_quantised(read.double().numpy(), exact.double().numpy(), name, rounding=2**-20)
        else:
            torch.testing.assert_close(read, exact, rtol=0, atol=0)


def test_names_dtypes_and_bytes_are_those_of_published_checkpoints(tmp_path):
    _, source = saved(tmp_path, 1, torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "fp8")
    with safe_open(tmp_path / "fp8" / "model.safetensors", "np") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    scaled = {key for key, dtype in dtypes.items() if dtype == "F8_E4M3"}
    assert {f"{key}_scale_inv" for key in scaled} == {key for key in dtypes if key.endswith("_scale_inv")}
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in scaled
    for key in dtypes:
        matrix = key.endswith("proj.weight") or "in_proj" in key or "out_proj" in key
        if key.endswith("_scale_inv"):
            assert dtypes[key] == "BF16"
        else:
            assert (key in scaled) == (matrix and not any(part in key for part in UNQUANTISED)), key
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [128, 128]
    kept = {key.removesuffix(".weight") for key in dtypes if any(part in key for part in UNQUANTISED)}
    assert kept <= set(config["modules_to_not_convert"])


def test_the_command_says_what_became_of_the_bytes(tmp_path, capsys):
    multimodal_reference("bfloat16").save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), str(tmp_path / "fp8"), "--scales", "float32"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "tensors of model.visual are not part of text generation" in captured.err
    assert "became" in captured.out
    assert main(arguments) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_what_cannot_be_quantised_is_refused_and_nothing_is_left(tmp_path):
    _, source = saved(tmp_path, 1, torch.float32)
    with pytest.raises(InputError, match="scale_dtype is 'float16'; expected one of bfloat16, float32"):
        quantize_checkpoint(source, tmp_path / "fp8", scale_dtype="float16")
    shards = sorted(source.glob("model-*.safetensors"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        quantize_checkpoint(source, tmp_path / "fp8")
    build_reference(random_config(1), 1).save_pretrained(tmp_path / "one")
    edit(tmp_path / "one", lambda tensors: tensors["model.layers.0.mlp.gate.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in model\.layers\.0\.mlp\.gate"):
        quantize_checkpoint(tmp_path / "one", tmp_path / "fp8")
    assert not list((tmp_path / "fp8").glob("*"))
    # and an FP8 checkpoint is no float one
    _, good = saved(tmp_path / "good", 1, torch.float32)
    quantize_checkpoint(good, tmp_path / "fp8")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "again")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    reference(TIED_SEED).save_pretrained(tmp_path / "tied")
    embedding = load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight that differs from the embedding"):
        quantize_checkpoint(tmp_path / "tied", tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()

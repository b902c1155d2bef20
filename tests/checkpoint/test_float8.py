"""FP8 checkpoints loaded and computed with: the same numbers as their products, on any layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import edit
from safetensors.torch import load_file
from support import oracle, parity
from support.configs import WHOLE_BLOCKS, random_ids
from support.float8 import RAGGED, float8_pair, is_block_scaled
from support.reference import parameters_float64, reference_greedy, reference_logits
from support.slow import some
from transformers import Qwen3_5MoeForCausalLM

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.names import matrix_name, scale_name
from qwen_moe_jax.checkpoint.orbax import stored_arrays
from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.formats.block_scaled import BlockScaled
from qwen_moe_jax.formats.codes import widened
from qwen_moe_jax.kernels.table import Kernels

# (seed, sizes, dtype of the scales): whole blocks, ragged ones, matrices smaller than a block
CASES = [
    (1, RAGGED, "float32"),
    (2, {"hidden_size": 256, "moe_intermediate_size": 128}, "bfloat16"),
    (
        4,
        {"hidden_size": 320, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 200},
        "bfloat16",
    ),
    (5, {}, "float32"),
    (9, {"hidden_size": 136, "moe_intermediate_size": 260}, "float32"),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=pytest.mark.slow if case[0] > 1 else ()) for case in CASES],
    ids=lambda case: f"seed{case[0]}",
)
def pair(request, tmp_path_factory):
    seed, sizes, scales = request.param
    return float8_pair(tmp_path_factory.mktemp("float8"), seed, sizes, scales=scales)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    return float8_pair(tmp_path_factory.mktemp("ragged"), 1, RAGGED)


def case_of(pair, reference, length):
    """A prompt without a router tie, and the float64 truth about it."""
    parameters = parameters_float64(reference)
    for draw in range(20):
        ids = random_ids(pair.config, length, draw)
        truth = oracle.forward(pair.config, parameters, ids)
        if truth.router_margin.min() >= parity.ROUTER_TIE:
            return parity.Case(0, ids, truth.logits, float(truth.router_margin.min()))
    raise RuntimeError("twenty prompts all have router ties")


@pytest.mark.parametrize("length", [1, 70])
def test_logits_are_those_of_the_products(pair, length):
    """The float32 bar of the whole model (`support/parity.py`), with a reference that holds the products."""
    reference = pair.reference()
    case = case_of(pair, reference, length)
    model = QwenMoe.from_pretrained(pair.float8, dtype=jnp.float32)
    errors = parity.measure(
        case, np.asarray(model.logits(case.ids[None])[0]), reference_logits(reference, case.ids)[0]
    )
    assert errors.ratio <= parity.LARGEST_RATIO
    assert errors.ours_max <= parity.LARGEST_DIFFERENCE
    # and the measurement sees the quantisation
    unquantised = QwenMoe.from_pretrained(pair.source, dtype=jnp.float32)
    other = parity.measure(case, np.asarray(unquantised.logits(case.ids[None])[0]), case.truth)
    assert other.ours_max > 10 * parity.LARGEST_DIFFERENCE


def test_greedy_tokens_are_those_of_the_reference(ragged):
    reference = ragged.reference()
    prompt = random_ids(ragged.config, 9, 3)
    wanted = reference_greedy(reference, prompt, 24)
    model = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    assert model.generate([prompt.tolist()], max_new_tokens=24, eos_token_id=[]).sequences[0] == wanted


def test_logits_are_those_of_what_transformers_makes_of_the_same_folder(tmp_path):
    pair = float8_pair(tmp_path, 1, WHOLE_BLOCKS, scales="bfloat16")
    reference = Qwen3_5MoeForCausalLM.from_pretrained(pair.float8, dtype=torch.float32).eval()
    case = case_of(pair, reference, 40)
    model = QwenMoe.from_pretrained(pair.float8, dtype=jnp.float32)
    errors = parity.measure(
        case, np.asarray(model.logits(case.ids[None])[0]), reference_logits(reference, case.ids)[0]
    )
    assert errors.ratio <= parity.LARGEST_RATIO
    assert errors.ours_max <= parity.LARGEST_DIFFERENCE


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "block"), [((300, 140), (128, 128)), ((2, 96, 70), (32, 8)), ((5, 3), (1, 64))]
)
def test_a_matrix_multiplied_out_is_torchs(shape, block, held):
    rng = np.random.default_rng(sum(shape))
    codes = rng.integers(0, 0x7F, shape).astype(np.uint8) | rng.integers(0, 2, shape).astype(np.uint8) << 7
    blocks = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
    scales = rng.normal(size=(*shape[:-2], *blocks)).astype(np.float32)
    matrix = BlockScaled(
        jnp.asarray(codes.view(jnp.float8_e4m3fn)),
        jnp.asarray(scales),
        block,
        jnp.dtype("float32"),
        Kernels("cpu").widening,
    )
    found = jax.jit(lambda m: m.multiplied_out(held))(matrix)
    whole = torch.from_numpy(scales).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    wanted = values * whole[..., : shape[-2], : shape[-1]]
    wanted = wanted.to(torch.bfloat16).float() if held == "bfloat16" else wanted
    np.testing.assert_array_equal(np.asarray(found), wanted.numpy())


@pytest.mark.parametrize("widening", ["bits", "native", "fnuz"])
def test_every_finite_code_is_widened_to_its_number(widening):
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    found = np.asarray(
        jax.jit(widened, static_argnums=1)(jnp.asarray(codes.view(jnp.float8_e4m3fn)), widening)
    )
    np.testing.assert_array_equal(found, wanted)
    if widening != "fnuz":  # which has no -0
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


LAYOUTS = [
    ((1, 1, 8), "prescaled", {}),
    ((1, 2, 4), "sharded", {}),
    ((2, 1, 3), "fused", {}),
    ((1, 3, 2), "fused", {"expert_dispatch": "all_to_all"}),
    ((1, 4, 2), "outside", {"attention": "data"}),
    ((1, 8, 1), "prescaled", {"expert_dispatch": "all_to_all"}),
    ((1, 2, 2), "outside", {"exact": True}),
]


def on_mesh(folder, sizes, shared, options):
    data, expert, tensor = sizes
    mesh = make_mesh(data, expert, tensor, devices=jax.devices()[: data * expert * tensor])
    return QwenMoe.from_pretrained(folder, dtype=jnp.float32, mesh=mesh, shared_expert=shared, **options)


@pytest.mark.parametrize(("sizes", "shared", "options"), LAYOUTS)
def test_every_device_holds_the_numbers_of_its_slice(ragged, sizes, shared, options):
    """What a device holds, multiplied out, is its slice of the products bit by bit: no scale is misplaced."""
    model = on_mesh(ragged.float8, sizes, shared, options)
    plain = on_mesh(ragged.plain, sizes, shared, options)
    forms = model.layout.forms
    assert forms.keys() == {name for name in plain._parameters if is_block_scaled(name)}
    checked = 0
    for name, wanted in plain._parameters.items():
        found = model._parameters[name]
        if name not in forms:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted), name)
            continue
        assert found.dtype == jnp.float8_e4m3fn
        parts = zip(
            found.addressable_shards,
            model._parameters[scale_name(name)].addressable_shards,
            wanted.addressable_shards,
            strict=True,
        )
        for values, scales, product in parts:
            held = np.asarray(values.data).astype(np.float32)
            whole = np.asarray(scales.data).repeat(forms[name].block[0], -2).repeat(forms[name].block[1], -1)
            held *= whole[..., : held.shape[-2], : held.shape[-1]]
            np.testing.assert_array_equal(held, np.asarray(product.data), name)
            checked += 1
    assert checked >= len(forms) * model.layout.mesh.size


@pytest.mark.parametrize(("sizes", "shared", "options"), some(LAYOUTS[:5], lambda i: i in (0, 3)))
def test_a_layout_gives_the_logits_of_one_device(ragged, sizes, shared, options):
    reference = ragged.reference()
    case = case_of(ragged, reference, 20)
    one = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    mesh = on_mesh(ragged.float8, sizes, shared, options)
    alone, divided = (np.asarray(m.logits(case.ids[None])[0]) for m in (one, mesh))
    errors = parity.measure(case, divided, alone)
    assert errors.ratio <= parity.LARGEST_RATIO
    assert errors.ours_max <= parity.LARGEST_DIFFERENCE


def test_a_layout_is_checked_layer_by_layer(ragged):
    model = on_mesh(ragged.float8, (1, 2, 4), "fused", {})
    report = model.check_layout()
    assert report.ok, str(report)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("xla", marks=pytest.mark.slow)])
def test_in_bfloat16_it_is_as_near_the_truth_as_a_model_that_holds_rounded_products(kernels, tmp_path):
    """Products of few tokens do not round the matrix, those of many may: no worse than rounding all of it."""
    pair = float8_pair(tmp_path, 1, RAGGED, dtype=torch.bfloat16)
    ids = np.stack([random_ids(pair.config, 33, draw) for draw in range(6)])
    truth = np.asarray(QwenMoe.from_pretrained(pair.float8, dtype=jnp.float32).logits(ids))
    model = QwenMoe.from_pretrained(pair.float8, kernels=kernels)
    assert model.dtype == jnp.bfloat16
    rounded = QwenMoe.from_pretrained(pair.plain, dtype=jnp.bfloat16, kernels=kernels)
    ours, theirs = (np.abs(np.asarray(m.logits(ids)) - truth) for m in (model, rounded))
    # over six prompts a router that decides otherwise moves the mean by a few per cent
    assert ours.mean() <= 1.1 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def test_float8_stays_float8_in_memory(ragged):
    model = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    for name, value in model._parameters.items():
        assert (value.dtype == jnp.float8_e4m3fn) == is_block_scaled(name), name
        if is_block_scaled(name):
            # a scale for each granule: a block, or what gate rows that end inside one leave of it
            assert model._parameters[scale_name(name)].nbytes <= value.nbytes / 8, name
    described = str(model.describe())
    assert "float8" in described


@pytest.mark.parametrize("layout", [None, ((1, 2, 4), "sharded", {}), ((2, 1, 3), "fused", {})])
def test_saving_gives_the_same_file_again(ragged, layout, tmp_path):
    if layout is None:
        model = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    else:
        model = on_mesh(ragged.float8, *layout)
    model.save_pretrained(tmp_path / "again")
    wanted = load_file(ragged.float8 / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
        == (json.loads((ragged.float8 / "config.json").read_text())["quantization_config"])
    )


def test_orbax_keeps_float8(ragged, tmp_path):
    model = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    model.save_orbax(tmp_path / "orbax")
    dtypes = {name: array.dtype for name, array in stored_arrays(tmp_path / "orbax").items()}
    assert all((dtype == jnp.float8_e4m3fn) == is_block_scaled(name) for name, dtype in dtypes.items())
    again = QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32)
    for name, value in model._parameters.items():
        np.testing.assert_array_equal(
            np.asarray(again._parameters[name]).view(np.uint8), np.asarray(value).view(np.uint8), name
        )


@pytest.fixture
def copy(tmp_path):
    return float8_pair(tmp_path, 5, {}).float8


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}_scale_inv"), rf"missing keys: {EXPERT}_scale_inv"),
        (lambda t: t.pop(EXPERT), rf"missing keys: {EXPERT}"),
        (lambda t: t.update({EXPERT: t[EXPERT].float()}), rf"{EXPERT} is F32 instead of F8_E4M3"),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(2, 1)}),
            r"scale_inv is \[2, 1\] instead of \[1, 1\]",
        ),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": t[f"{EXPERT}_scale_inv"].to(torch.float8_e4m3fn)}),
            r"scale_inv is F8_E4M3 instead of F32 or BF16",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}),
            r"unexpected keys: lm_head\.weight_scale_inv",
        ),
        (lambda t: t[EXPERT].view(torch.uint8).fill_(0xFF), rf"NaN or infinite values in {EXPERT}"),
        (lambda t: t[f"{EXPERT}_scale_inv"].fill_(float("inf")), rf"infinite values in {EXPERT}_scale_inv"),
    ],
)
def test_what_does_not_fit_is_named(copy, change, message):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        QwenMoe.from_pretrained(copy)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'; implemented are fp8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ("fp8", "expected an object"),
    ],
)
def test_other_quantisation_is_refused(copy, entry, message):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": entry}))
    with pytest.raises(ConfigError, match=message):
        QwenMoe.from_pretrained(copy)


def test_a_float_configuration_of_a_float8_checkpoint_is_refused(copy):
    file = copy / "config.json"
    raw = json.loads(file.read_text())
    del raw["quantization_config"]
    file.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="is F8_E4M3 instead of F32 or BF16"):
        QwenMoe.from_pretrained(copy)


def test_scales_are_named_after_their_matrix():
    name = "layers.3.mlp.experts.down_proj"
    assert matrix_name(scale_name(name)) == matrix_name(name) == name


def test_a_conversion_keeps_float8(ragged, tmp_path):
    convert_checkpoint(ragged.float8, tmp_path / "orbax")
    restored = QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32)
    model = QwenMoe.from_pretrained(ragged.float8, dtype=jnp.float32)
    assert restored.config == model.config
    for name, value in model._parameters.items():
        other = restored._parameters[name]
        assert other.dtype == value.dtype, name
        np.testing.assert_array_equal(
            np.asarray(other).view(np.uint8), np.asarray(value).view(np.uint8), name
        )
    mesh = on_mesh(tmp_path / "orbax", (1, 2, 4), "sharded", {})
    direct = on_mesh(ragged.float8, (1, 2, 4), "sharded", {})
    for name, value in direct._parameters.items():
        np.testing.assert_array_equal(
            np.asarray(mesh._parameters[name]).view(np.uint8), np.asarray(value).view(np.uint8), name
        )


def test_float8_arrays_without_their_configuration_are_refused(ragged, tmp_path):
    convert_checkpoint(ragged.plain, tmp_path / "orbax")
    file = tmp_path / "orbax" / "config.json"
    file.write_text((ragged.float8 / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"wrong dtypes: layers\.0\.[\w.]+ is float32"):
        QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32)

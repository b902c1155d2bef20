"""Quantised checkpoints of every packing: the numbers of the library that writes them, on any layout."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_cases import edit
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from support import oracle, parity
from support.codes import KINDS, codes_pair
from support.configs import random_config, random_ids
from support.reference import parameters_float64, reference_logits
from support.slow import some

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
from qwen_moe_jax.checkpoint.layout import parameter_forms
from qwen_moe_jax.checkpoint.names import is_side, scale_name, zero_name
from qwen_moe_jax.checkpoint.parts import mtp_shapes
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError, InputError
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import abstract_mesh
from qwen_moe_jax.schemes.presets import preset

# Over three ranks slices differ in length; they are alike with and without codes, of which two share a byte.
LAYOUTS = [
    ((1, 1, 3), "prescaled", {}),
    ((1, 2, 2), "sharded", {}),
    ((1, 3, 2), "outside", {"expert_dispatch": "all_to_all"}),
    ((2, 2, 2), "outside", {"attention": "data"}),
]


# Packings that are looked at by default.
SOME = ("packed int4 with zeros", "float8 a row", "gptq", "awq", "quark")


@pytest.fixture(scope="module", params=some(KINDS, lambda i: list(KINDS)[i] in SOME))
def pair(request, tmp_path_factory):
    kind = KINDS[request.param]
    return codes_pair(tmp_path_factory.mktemp("codes"), list(KINDS).index(request.param), kind)


def meant(values, scales, zeros, form):
    """What codes mean, in NumPy: of 4 bits the even column in the lower half of a byte."""
    values = np.asarray(values)
    if form.codes in ("int4", "e2m1"):
        values = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    if form.codes == "e2m1":
        numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[values & 7]
        values = np.where(values & 8, -numbers, numbers)
    values = values.astype(np.float32)

    def whole(blocks):
        spread = np.asarray(blocks).astype(np.float32).repeat(form.block[0], -2).repeat(form.block[1], -1)
        return spread[..., : values.shape[-2], : values.shape[-1]]

    if form.codes.startswith("int"):
        values = values - (CODES[form.codes].zero if zeros is None else whole(zeros))
    return values * whole(scales)


def assert_same_numbers(model, plain, forms):
    """Every device's codes mean the numbers of its slice of the products, bit by bit."""
    held = model._parameters
    assert {n for n in held if not is_side(n)} == set(plain._parameters)
    assert forms
    for name, wanted in plain._parameters.items():
        if name not in forms:
            np.testing.assert_array_equal(np.asarray(held[name]), np.asarray(wanted), name)
            continue
        form = forms[name]
        zeros = held[zero_name(name)].addressable_shards if form.zeros else None
        for i, product in enumerate(wanted.addressable_shards):
            found = meant(
                held[name].addressable_shards[i].data,
                held[scale_name(name)].addressable_shards[i].data,
                None if zeros is None else zeros[i].data,
                form,
            )
            np.testing.assert_array_equal(found, np.asarray(product.data), name)


def forms_of(model):
    return model.layout.forms if model.layout else parameter_forms(model.config)


def loaded(folder, **options):
    return QwenMoe.from_pretrained(folder, dtype=jnp.float32, **options)


def test_one_device_holds_the_numbers_of_the_library_and_computes_with_them(pair):
    model = loaded(pair.codes)
    assert_same_numbers(model, loaded(pair.plain), forms_of(model))
    reference = pair.reference()
    parameters = parameters_float64(reference)
    for draw in range(20):
        ids = random_ids(pair.config, 30, draw)
        truth = oracle.forward(pair.config, parameters, ids)
        if truth.router_margin.min() >= parity.ROUTER_TIE:
            break
    case = parity.Case(0, ids, truth.logits, float(truth.router_margin.min()))
    theirs = reference_logits(reference, ids)[0]
    errors = parity.measure(case, np.asarray(model.logits(ids[None])[0]), theirs)
    assert errors.ratio <= parity.LARGEST_RATIO
    assert errors.ours_max <= parity.LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if i == 0 else pytest.mark.slow) for i, each in enumerate(LAYOUTS)]
)
def test_every_device_of_a_mesh_holds_the_numbers_of_its_slice(pair, layout):
    (data, expert, tensor), shared, options = layout
    mesh = make_mesh(data, expert, tensor, devices=jax.devices()[: data * expert * tensor])
    model = loaded(pair.codes, mesh=mesh, shared_expert=shared, **options)
    plain = loaded(pair.plain, mesh=mesh, shared_expert=shared, **options)
    assert_same_numbers(model, plain, forms_of(model))


def test_what_is_saved_again_means_the_same(pair, tmp_path):
    """Through save_pretrained, and through Orbax; other packings become compressed-tensors' own."""
    model = loaded(pair.codes)
    plain = loaded(pair.plain)
    if any(form.block[1] == 16 for form in forms_of(model).values()):
        with pytest.raises(CheckpointError, match="is in NVFP4, which is read, and not written"):
            model.save_pretrained(tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
        again = loaded(tmp_path / "saved")
        assert_same_numbers(again, plain, forms_of(again))
    convert_checkpoint(pair.codes, tmp_path / "orbax")
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    restored = loaded(tmp_path / "orbax", mesh=mesh, shared_expert="sharded")
    whole = loaded(pair.plain, mesh=mesh, shared_expert="sharded")
    assert_same_numbers(restored, whole, forms_of(restored))


def test_inspect_counts_parameters_not_bytes(pair):
    summary, plain = inspect_checkpoint(pair.codes), inspect_checkpoint(pair.plain)
    assert summary.parameters == plain.parameters
    assert sum(summary.loaded_bytes.values()) < sum(plain.loaded_bytes.values())
    words = {"e2m1": ("mxfp4", "nvfp4"), "e4m3": ("float8",)}
    model = loaded(pair.codes)
    codes = next(iter(forms_of(model).values())).codes
    assert any(f" in {word} and float32" in repr(model) for word in words.get(codes, (codes,)))
    assert any(f"held in {word} (layers) and" in str(model.describe()) for word in words.get(codes, (codes,)))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("int4", {"group": 32}),
        ("int4", {"experts_only": True, "group": 64}),
        ("int8", {"group": 32}),
        ("mxfp4", {}),
    ],
)
def test_the_library_reads_what_is_written_and_errors_are_those_of_rounding(form, options, tmp_path):
    kind = KINDS["packed int4"]
    source = codes_pair(tmp_path / "made", 5, kind).plain
    quantize_checkpoint(
        source, tmp_path / "small", quantization=preset(form, **options), scale_dtype="bfloat16"
    )
    stored, before = (load_file(f / "model.safetensors") for f in (tmp_path / "small", source))
    described = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(described)
    [group] = parsed.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(described["config_groups"]["group_0"]["format"])
    # half a step of the largest code, relative to a group's largest magnitude
    half_step = {"int4": 0.5 / 7, "int8": 0.5 / 127, "mxfp4": 1 / 6}[form]
    columns = group.weights.group_size
    checked = 0
    for key in [key for key in stored if key.endswith("weight_packed")]:
        module = key.removesuffix("weight_packed")
        state = {k.removeprefix(module): v for k, v in stored.items() if k.startswith(module)}
        if "weight_scale" in state and state["weight_scale"].is_floating_point():
            state["weight_scale"] = state["weight_scale"].float()
        product = compressor.decompress(state, group)["weight"].float()
        wanted = before[f"{module}weight"]
        groups = wanted.reshape(wanted.shape[0], -1, columns)
        errors = (product.reshape(groups.shape) - groups).abs()
        # a smaller scale, which clips, is chosen where the mean square is less for it
        bound = half_step * groups.abs().amax(2, keepdim=True) * 1.01
        assert (errors**2).mean() <= (bound**2).mean() / 2, key
        checked += 1
    assert checked >= 3 * 6
    model, wanted = loaded(tmp_path / "small"), loaded(source)
    forms = forms_of(model)
    assert {name.split(".")[-2] for name in forms} >= {"experts"}
    assert ("layers.0.mlp.shared_expert.up_proj.weight" in forms) != bool(options.get("experts_only"))
    for name in forms:
        held, sides = model._parameters, forms[name]
        found = meant(held[name], held[scale_name(name)], None, sides)
        np.testing.assert_allclose(
            found, np.asarray(wanted._parameters[name]), atol=float(np.abs(found).max()) / 3
        )


WRONG = [
    ({"bits": 3}, "bits 3; implemented are 4, 8"),
    ({"group_size": 0}, "group_size 0; expected a positive number or -1"),
    ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; implemented are fp8, .* absmax"),
    ({"quant_method": "modelopt"}, "'modelopt'; implemented are .* hf_quant_config"),
    ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
    ({"dynamic": {r".*experts\.3\.up_proj": {"bits": 8}}}, "experts of a layer are held in one stack"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_variants_that_are_not_implemented_are_refused_by_name(change, message, tmp_path):
    folder = codes_pair(tmp_path, 7, KINDS["gptq"]).codes
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= change
    file.write_text(json.dumps(raw))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        loaded(folder)


MODULE = "model.layers.0.mlp.experts.2.up_proj."
DAMAGES = [
    (lambda t: t.pop(MODULE + "scales"), "missing keys: .*2.up_proj.scales"),
    (lambda t: t.update({MODULE + "qweight": t[MODULE + "qweight"][:-1]}), "wrong shapes: .*qweight"),
    (lambda t: t.update({MODULE + "qweight": t[MODULE + "qweight"].float()}), "F32 instead of I32"),
    (lambda t: t.update({MODULE + "g_idx": t[MODULE + "g_idx"].flip(0)}), "out of their order"),
    (lambda t: t.update({MODULE + "qzeros": t[MODULE + "qzeros"] + 1}), "zero points .* of a symmetric"),
    (lambda t: t[MODULE + "scales"].fill_(float("nan")), "NaN or infinite values in .*scales"),
    (lambda t: t.update({MODULE + "bias": t[MODULE + "scales"][0].clone()}), "unexpected keys: .*bias"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_damaged_checkpoints_are_named(change, message, tmp_path):
    folder = codes_pair(tmp_path / "made", 7, KINDS["gptq"]).codes
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        loaded(folder)


def test_fp8_of_the_experts_alone_reads_as_it_was_written(tmp_path):
    source = codes_pair(tmp_path / "made", 7, KINDS["packed int4"]).plain
    quantize_checkpoint(source, tmp_path / "fp8", quantization=preset("fp8", experts_only=True))
    model, plain = loaded(tmp_path / "fp8"), loaded(source)
    forms = forms_of(model)
    assert {name.split(".mlp.")[1] for name in forms} == {"experts.gate_up_proj", "experts.down_proj"}
    for name in model._parameters.keys() & plain._parameters.keys() - forms.keys():
        np.testing.assert_array_equal(
            np.asarray(model._parameters[name]), np.asarray(plain._parameters[name])
        )


def test_a_shared_expert_in_another_format_is_not_fused(tmp_path):
    sizes = {"shared_expert_intermediate_size": 64}
    folder = codes_pair(tmp_path, 7, KINDS["quark"], sizes).codes
    with pytest.raises(InputError, match=r"in the format of the others, .* not quantised and e2m1"):
        loaded(folder, mesh=make_mesh(expert=2), shared_expert="fused")


def test_a_slice_between_two_codes_of_a_byte_is_refused():
    odd = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_value_head_dim": 33}
    config = ModelConfig.from_dict(random_config(7) | odd)
    config = dataclasses.replace(config, quantization=preset("int4").with_scales_in("bfloat16"))
    layout = Layout(config, abstract_mesh(1, 1, 2), shared_expert="outside")
    with pytest.raises(InputError, match="share a byte in int4; choose a mesh that divides it evenly"):
        _ = layout.forms


@pytest.mark.slow
def test_multi_token_prediction_that_nobody_quantised_is_read_as_it_is(tmp_path):
    """transformers does not load it, so those who quantise with it leave it; config.json does not say so."""
    folder = codes_pair(tmp_path, 7, KINDS["packed int4"]).codes
    plain = dataclasses.replace(ModelConfig.from_file(folder), quantization=None)
    rng = np.random.default_rng(0)
    mtp = {
        f"mtp.{name}": torch.from_numpy(rng.normal(0, 0.05, shape).astype(np.float32))
        for name, shape in mtp_shapes(plain, 1).items()
    }
    edit(folder, lambda tensors: tensors.update(mtp))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mtp_num_hidden_layers": 1}))
    drafting = loaded(folder, draft_tokens=2)
    assert drafting._parameters["mtp.layers.0.self_attn.q_proj.weight"].dtype == jnp.float32
    prompt, options = [[5, 9, 11]], {"max_new_tokens": 12, "eos_token_id": []}
    out = drafting.generate(prompt, **options)
    assert out.usage.drafted_tokens
    assert out.sequences == loaded(folder, draft_tokens=0).generate(prompt, **options).sequences
    drafting.save_pretrained(tmp_path / "saved")
    assert loaded(tmp_path / "saved", draft_tokens=2).generate(prompt, **options).sequences == out.sequences


@pytest.mark.parametrize(
    ("kind", "layout"),
    some(
        [
            ("packed int4 with zeros", ((1, 2, 2), "sharded", {})),
            ("gptq", ((1, 2, 3), "outside", {"expert_dispatch": "all_to_all"})),
            ("quark", ((1, 3, 2), "prescaled", {"attention": "data"})),
        ],
        lambda i: i == 0,
    ),
)
def test_a_mesh_gives_the_logits_of_one_device(kind, layout, tmp_path):
    pair = codes_pair(tmp_path, 7, KINDS[kind])
    (data, expert, tensor), shared, options = layout
    mesh = make_mesh(data, expert, tensor, devices=jax.devices()[: data * expert * tensor])
    ids = random_ids(pair.config, 30, 0)[None].repeat(6, 0)
    alone = np.asarray(loaded(pair.codes).logits(ids))
    divided = np.asarray(loaded(pair.codes, mesh=mesh, shared_expert=shared, **options).logits(ids))
    # sums in another order, in float32
    np.testing.assert_allclose(divided, alone, rtol=0, atol=parity.LARGEST_DIFFERENCE)


@pytest.mark.slow
def test_exact_logits_do_not_depend_on_the_number_of_expert_ranks(tmp_path):
    pair = codes_pair(tmp_path, 7, KINDS["packed int4"])
    ids = random_ids(pair.config, 30, 0)[None]
    found = [
        np.asarray(
            loaded(
                pair.codes,
                mesh=make_mesh(expert=ranks, devices=jax.devices()[:ranks]),
                shared_expert="outside",
                exact=True,
            ).logits(ids)
        )
        for ranks in (2, 3, 6)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])

"""What config.json's quantization_config says of each module, by method."""

import json

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils.match import is_match
from torch import nn

from qwen_moe_jax.errors import ConfigError, InputError
from qwen_moe_jax.schemes.presets import DTYPES, FORMATS, dtype_of, of_dtype, preset
from qwen_moe_jax.schemes.read import read_quantization

EXPERT = "layers.3.mlp.experts.17.up_proj"
SHARED = "layers.3.mlp.shared_expert.down_proj"
QUERY = "layers.3.self_attn.q_proj"
ROUTER = "layers.3.mlp.gate"
MODULES = (
    EXPERT,
    SHARED,
    QUERY,
    ROUTER,
    "layers.0.linear_attn.in_proj_a",
    "layers.11.mlp.experts.0.down_proj",
)


def weights(bits=4, group=32, **more):
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group} | more


def compressed(groups, ignore=(), form="pack-quantized"):
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": list(ignore),
    }


def codes_of(raw, module):
    scheme = read_quantization(raw).scheme(module)
    return scheme and (scheme.codes, scheme.group)


IGNORES = [
    ["lm_head"],
    [r"re:.*mlp\.gate$", r"re:.*self_attn.*"],
    ["model.layers.3.self_attn.q_proj", r"re:model\.language_model\.layers\.11\..*"],
    [r"re:.*shared_expert\..*", r"re:.*\.linear_attn\..*"],
]


@pytest.mark.parametrize("ignore", IGNORES)
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_ignore_and_targets_are_matched_as_the_library_matches_them(ignore, prefix):
    found = read_quantization(compressed({"g": {"targets": ["Linear"], "weights": weights()}}, ignore))
    for module in MODULES:
        layer = nn.Linear(2, 2) if not module.endswith("mlp.gate") else nn.Module()
        theirs = is_match(prefix + module, layer, "Linear") and not is_match(prefix + module, layer, ignore)
        other = "model." if prefix != "model." else "model.language_model."
        also = is_match(other + module, layer, ignore)  # a name under either prefix is the same module
        assert (found.scheme(module) is not None) == (theirs and not also), module


def test_a_name_counts_before_a_pattern_and_a_pattern_before_a_class():
    groups = {
        "all": {"targets": ["Linear"], "weights": weights(4, 128)},
        "some": {"targets": [r"re:.*\.layers\.3\..*"], "weights": weights(8, 64)},
        "one": {"targets": ["model.layers.3.self_attn.q_proj"], "weights": weights(8, 32)},
    }
    raw = compressed(groups, [r"re:.*down_proj$"])
    assert codes_of(raw, QUERY) == ("int8", (1, 32))
    assert codes_of(raw, EXPERT) == ("int8", (1, 64))
    assert codes_of(raw, SHARED) is None
    assert codes_of(raw, "layers.4.self_attn.q_proj") == ("int4", (1, 128))


def test_quarks_names_hold_stars_and_mean_what_lies_inside():
    weight = {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}
    raw = {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": weight},
        "exclude": ["lm_head", "*self_attn*", "model.language_model.layers.*.mlp.gate", "*.linear_attn"],
        "layer_quant_config": {},
    }
    assert codes_of(raw, EXPERT) == codes_of(raw, SHARED) == ("e2m1", (1, 32))
    assert codes_of(raw, QUERY) is codes_of(raw, ROUTER) is codes_of(raw, MODULES[4]) is None
    for change, message in (
        ({"dtype": "int4"}, "weights in int4; of Quark's formats MXFP4"),
        ({"group_size": 16}, "groups of 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_quantization(raw | {"global_quant_config": {"weight": weight | change}})


def test_gptqs_dynamic_rules_exclude_and_override_first_come_first():
    raw = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    raw["dynamic"] = {
        r"-:.*self_attn.*": {},
        r"+:.*layers\.3\.mlp\.experts.*": {"bits": 8, "group_size": 32},
        r".*experts.*": {"group_size": 64},
    }
    assert codes_of(raw, EXPERT) == ("int8", (1, 32))
    assert codes_of(raw, MODULES[5]) == ("int4", (1, 64))
    assert codes_of(raw, SHARED) == ("int4", (1, 128))
    assert codes_of(raw, QUERY) is codes_of(raw, ROUTER) is None
    assert read_quantization(raw | {"checkpoint_format": "gptq_v2"}).scheme(SHARED).packing == "gptq_v2"


def test_auto_rounds_extra_config_says_which_layers_keep_16_bits():
    raw = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    raw["block_name_to_quantize"] = "model.language_model.layers"
    raw["extra_config"] = {
        "model.language_model.layers.3.self_attn.q_proj": {"bits": 16},
        ".*shared_expert.*": {"bits": 8, "group_size": 64},
    }
    assert codes_of(raw, EXPERT) == ("int4", (1, 128))
    assert codes_of(raw, QUERY) is codes_of(raw, ROUTER) is None
    assert codes_of(raw, SHARED) == ("int8", (1, 64))
    with pytest.raises(ConfigError, match="packing_format is 'auto_round:exllama'"):
        read_quantization(raw | {"packing_format": "auto_round:exllama"})


def test_awqs_exceptions_are_parts_of_names():
    raw = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["self_attn", "mlp.gate"],
    }
    assert codes_of(raw, EXPERT) == ("int4", (1, 64))
    assert codes_of(raw, QUERY) is codes_of(raw, ROUTER) is None
    with pytest.raises(ConfigError, match="version 'gemv'; implemented"):
        read_quantization(raw | {"version": "gemv"})


WRONG = [
    (compressed({}), "no config_groups"),
    (compressed({"g": {"targets": ["Conv1d"], "weights": weights()}}), "class 'Conv1d'; expected 'Linear'"),
    (compressed({"g": {"targets": ["re:("], "weights": weights()}}), "no regular expression"),
    (compressed({"g": {"targets": ["Linear"], "weights": weights(3)}}), "num_bits 3; implemented are 4, 8"),
    (compressed({"g": {"targets": ["Linear"], "weights": weights(actorder="group")}}), "actorder 'group'"),
    (compressed({"g": {"targets": ["Linear"], "weights": weights(strategy="token")}}), "strategy 'token'"),
    (compressed({"g": {"targets": ["Linear"], "weights": weights(dynamic=True)}}), "dynamic weights"),
    (compressed({"g": {"targets": ["Linear"], "weights": None}}), "weights None; expected an object"),
    (compressed({"g": {"targets": ["Linear"], "weights": weights()}}, form="marlin-24"), "'marlin-24'"),
    (
        compressed({"g": {"targets": ["Linear"], "weights": weights()}}) | {"sparsity_config": {"a": 1}},
        "sparsity",
    ),
    ([4], "expected an object"),
    ({"quant_method": "hqq"}, "HQQ's packing"),
    ({"quant_method": "unheard"}, "'unheard'; implemented are fp8, compressed-tensors"),
]


@pytest.mark.parametrize(("raw", "message"), WRONG)
def test_what_is_not_implemented_is_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        read_quantization(raw)


@pytest.mark.parametrize("name", FORMATS)
def test_presets_quantise_the_layers_products_and_nothing_that_decides(name):
    found = preset(name)
    for module in (EXPERT, SHARED, QUERY, "layers.0.linear_attn.in_proj_qkv"):
        assert found.scheme(module) is not None, module
    for module in (ROUTER, "layers.3.mlp.shared_expert_gate", "layers.0.linear_attn.in_proj_b", "lm_head"):
        assert found.scheme(module) is None, module
    assert found.same_for_all_experts
    only = preset(name, experts_only=True)
    assert only.scheme(EXPERT) == found.scheme(EXPERT)
    assert only.scheme(SHARED) is only.scheme(QUERY) is None
    if name != "fp8":
        raw = json.loads(found.source)
        [group] = raw["config_groups"].values()
        # the library takes it, too
        QuantizationScheme(targets=group["targets"], weights=QuantizationArgs(**group["weights"]))


def test_fp8_leaves_what_it_names_and_what_lies_inside():
    kept = ["lm_head", "model.language_model.layers.3.mlp.shared_expert", "model.layers.3.self_attn.q_proj"]
    raw = json.loads(preset("fp8").source) | {"modules_to_not_convert": kept}
    assert codes_of(raw, EXPERT) == codes_of(raw, "layers.4.self_attn.q_proj") == ("e4m3", (128, 128))
    assert codes_of(raw, SHARED) is codes_of(raw, QUERY) is codes_of(raw, ROUTER) is None
    with pytest.raises(ConfigError, match="modules_to_not_convert 'lm_head'; expected a list"):
        read_quantization(raw | {"modules_to_not_convert": "lm_head"})


def test_every_dtype_is_the_name_of_what_it_means():
    for dtype in DTYPES:
        for experts in (8, 0):
            assert dtype_of(of_dtype(dtype, experts=experts)) == dtype
    for dtype in ("int4", "mxfp4"):  # of a dense model, all matrices
        found = of_dtype(dtype, experts=0)
        assert found is not None
        assert found.scheme("layers.0.mlp.up_proj", "model.") is not None
    with pytest.raises(InputError, match="dtype is 'int3'"):
        of_dtype("int3", experts=8)
    wrong = (("fp5", "format is 'fp5'"), ("int4", "group is 7"), ("fp8", "blocks of 128 x 128"))
    for given, message in wrong:
        with pytest.raises(InputError, match=message):
            preset(given, group=7)
    with pytest.raises(InputError, match="mxfp4 has groups of 32"):
        preset("mxfp4", group=64)


EXAMPLES = [
    compressed(
        {"g": {"targets": ["Linear", r"re:.*x"], "weights": weights(8, 64, symmetric=False)}}, ["lm_head"]
    ),
    compressed(
        {"g": {"targets": ["Linear"], "weights": weights(4, 32, type="float")}}, form="mxfp4-pack-quantized"
    ),
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "dynamic": {"-:.*attn": {}, "mlp": {"bits": 8}},
    },
    {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "extra_config": {"a.b": {"bits": 16}},
        "block_name_to_quantize": "model.layers",
        "packing_format": "auto_round:auto_gptq",
    },
    {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["gate"],
        "version": "gemm",
    },
    {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}},
        "exclude": ["lm_head"],
        "layer_quant_config": {"*up*": {"weight": {"dtype": "fp4", "group_size": 32}}},
        "export": {"weight_format": "real_quantized"},
    },
    {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
]
JUNK = (None, True, -1, 0, 3.5, 10**9, "", "x(", [], [None], [1, 2, 3], {}, {"a": None}, [["x"]], {"x": [1]})


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("raw", EXAMPLES, ids=lambda raw: raw["quant_method"])
def test_any_damage_of_a_description_is_read_or_refused_in_a_sentence(raw):
    assert read_quantization(raw).scheme(EXPERT) is not None or raw["quant_method"] == "gptq"
    refused = 0
    for path in places(raw):
        for junk in JUNK:
            changed = json.loads(json.dumps(raw))
            if path:
                inner = changed
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = junk
            else:
                changed = junk
            try:
                found = read_quantization(changed)
                for module in MODULES:
                    if found is not None:
                        found.scheme(module)
            except ConfigError as error:
                refused += str(error).endswith(".")
    assert refused > 30

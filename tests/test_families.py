"""Every family: as close to the float64 truth as its reference, on meshes too, and through files and back."""

import dataclasses
import functools
import json
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import oracle, parity
from support.configs import MODEL_TYPES, QWEN35_MOE, family_config, random_ids
from support.meshes import LARGEST_POOLED_RATIO, assert_on_average_as_one_device, mesh_case, on_mesh, run
from support.reference import (
    build_reference,
    float64_reference,
    reference_logits,
    save_reference,
)
from support.slow import some
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_moe_jax import QwenMoe, families, make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.layout import matrix_scheme
from qwen_moe_jax.checkpoint.parts import mtp_shapes, read_part
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError, InputError
from qwen_moe_jax.kernels.table import make_kernels
from qwen_moe_jax.layout_check import check_layout
from qwen_moe_jax.model.points import points_of
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.schemes.presets import FORMATS, preset

DENSE = "qwen3_5_text"
OTHERS = tuple(model_type for model_type in MODEL_TYPES if model_type != QWEN35_MOE)
SHARED = ("qwen3_next", "qwen2_moe")
MODES = ("sharded", "outside", "prescaled", "fused")
GREEDY_TOKENS = 32
LENGTHS = (1, 65)
# The oracle against the reference in float64: both round to 1e-16 of values up to 1e2, some thousand times.
FLOAT64_TOLERANCE = 1e-11


def cases(seeds: range, default: int) -> list[Any]:
    """(model type, seed), of each type the first `default` seeds by default."""
    return some(
        [(model_type, seed) for model_type in OTHERS for seed in seeds], lambda i: i % len(seeds) < default
    )


@functools.cache
def saved(model_type: str, seed: int) -> Path:
    folder = Path(tempfile.mkdtemp())
    return save_reference(parity.random_model(seed, model_type).reference, folder)


@functools.cache
def loaded(model_type: str, seed: int) -> QwenMoe:
    return QwenMoe.from_pretrained(saved(model_type, seed), dtype=jnp.float32)


@pytest.mark.parametrize(("model_type", "seed"), cases(range(6), 1))
def test_the_truth_is_the_reference_in_float64(model_type: str, seed: int) -> None:
    built = parity.random_model(seed, model_type)
    ids = random_ids(built.config, 40, seed)
    truth = oracle.forward(built.config, built.params, ids).logits
    with float64_reference(built.config, built.reference) as twin:
        theirs = reference_logits(twin, ids)[0]
    assert theirs.dtype == np.float64
    assert np.abs(theirs - truth).max() / np.abs(truth).max() <= FLOAT64_TOLERANCE


@pytest.mark.parametrize(("model_type", "seed"), cases(range(12), 2))
def test_logits_and_tokens_are_the_truths_and_the_references(model_type: str, seed: int) -> None:
    built = parity.random_model(seed, model_type)
    for length in LENGTHS:
        case = built.case(length)
        ours = np.asarray(loaded(model_type, seed).logits(case.ids[None]))[0]
        error = parity.measure(case, ours, parity.reference_on(case))
        assert error.ours_max <= parity.LARGEST_DIFFERENCE, error
        assert error.ratio <= parity.LARGEST_RATIO, error
    out = loaded(model_type, seed).generate(case.ids[None], max_new_tokens=parity.GREEDY_TOKENS)
    found = parity.compare_greedy(built, case.ids, out.sequences[0], parity.reference_tokens(case))
    assert found is None or found.excused, found


@pytest.mark.parametrize(("model_type", "seed"), cases(range(2, 6), 1))
def test_rows_of_a_batch_and_of_a_warm_cache_say_what_each_says_alone(model_type: str, seed: int) -> None:
    """Prompts of many lengths at once, then again with their prefixes known."""
    config, model = family_config(model_type, seed), loaded(model_type, seed)
    prompts = [random_ids(config, n, n).tolist() for n in (3, 70, 17, 40)]
    prompts.append(prompts[1][:64] + prompts[2])
    with model.engine(max_rows=1, prefix_cache=False) as engine:
        alone = [engine.submit(p, max_new_tokens=8).result().sequences[0] for p in prompts]
    for _ in range(2):
        assert model.generate(prompts, max_new_tokens=8).sequences == alone


@pytest.mark.parametrize("model_type", [DENSE, "qwen3_next"])
def test_drafts_change_nothing_and_go_with_the_files(model_type: str, tmp_path: Path) -> None:
    """Multi-token prediction of random weights: what it drafts seldom holds, and never changes a token."""
    folder = Path(shutil.copytree(saved(model_type, 0), tmp_path / "with"))
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig.from_file(folder)
    mtp = {
        f"mtp.{name}": 0.3 * torch.randn(shape, generator=generator)
        for name, shape in mtp_shapes(config, 1).items()
    }
    save_file(load_file(folder / "model.safetensors") | mtp, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    if model_type == DENSE:  # the other says nothing of it
        (folder / "config.json").write_text(json.dumps(raw | {"mtp_num_hidden_layers": 1}))
    drafting = QwenMoe.from_pretrained(folder, dtype=jnp.float32, draft_tokens=2)
    prompts = [random_ids(raw, n, n).tolist() for n in (5, 30)]
    out = drafting.generate(prompts, max_new_tokens=12)
    assert out.sequences == loaded(model_type, 0).generate(prompts, max_new_tokens=12).sequences
    assert out.usage.drafted_tokens > 0
    drafting.save_pretrained(tmp_path / "again")
    convert_checkpoint(tmp_path / "again", tmp_path / "orbax")
    for copy in ("again", "orbax"):
        found, _ = read_part(tmp_path / copy, "mtp")
        assert found.keys() == {name.removeprefix("mtp.") for name in mtp}
        assert all(np.array_equal(found[name.removeprefix("mtp.")], mtp[name]) for name in mtp)


LAYOUTS = (
    {"data": 1, "expert": 2, "tensor": 2, "attention": "tensor"},
    {"data": 2, "expert": 2, "tensor": 1, "attention": "data", "expert_dispatch": "all_to_all"},
    {"data": 1, "expert": 3, "tensor": 1, "attention": "tensor"},
)


@pytest.mark.parametrize(
    ("model_type", "which"),
    some([(t, i) for t in OTHERS for i in range(len(LAYOUTS))], lambda i: i % len(LAYOUTS) == i // 3 % 2),
)
def test_a_mesh_is_as_close_to_the_truth_as_one_device(model_type: str, which: int) -> None:
    layout = dict(LAYOUTS[which])
    if model_type == DENSE:
        layout.pop("expert_dispatch", None)
    case = mesh_case(6, model_type)
    found = run(on_mesh(6, model_type=model_type, **layout), case.rows)
    assert_on_average_as_one_device(case, found)


@pytest.mark.parametrize(
    ("model_type", "mode"),
    some([(t, m) for t in SHARED for m in MODES], lambda i: i in (0, 5)),
)
def test_a_shared_expert_counts_once_in_every_mode(model_type: str, mode: str) -> None:
    """The bug that this project was born of, where it lived: it would count four times here."""
    seed = next(s for s in range(40) if _fusable(family_config(model_type, s)))
    case = mesh_case(seed, model_type)
    found = run(on_mesh(seed, 1, 4, 1, model_type, shared_expert=mode), case.rows)
    assert found.tokens == case.one_device.tokens
    assert case.ratio(found) <= LARGEST_POOLED_RATIO


def _fusable(config: dict[str, Any]) -> bool:
    return config["moe_intermediate_size"] == config["shared_expert_intermediate_size"]


@pytest.mark.parametrize(
    ("model_type", "choice", "message"),
    [
        (DENSE, {"shared_expert": "fused"}, "no shared expert"),
        (DENSE, {"expert_dispatch": "all_to_all"}, "no experts"),
        ("qwen3_moe", {"shared_expert": "sharded"}, "no shared expert"),
    ],
)
def test_modes_that_mean_nothing_to_a_model_are_refused(model_type: str, choice: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QwenMoe.from_pretrained(saved(model_type, 0), dtype=jnp.float32, mesh=make_mesh(1, 2, 1), **choice)


@pytest.mark.parametrize("model_type", OTHERS)
def test_config_json_goes_there_and_back(model_type: str) -> None:
    for seed in range(12):
        raw = json.loads((saved(model_type, seed) / "config.json").read_text()) if seed < 2 else {}
        config = ModelConfig.from_dict(family_config(model_type, seed))
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        if raw:  # as the reference writes it
            assert dataclasses.replace(ModelConfig.from_dict(raw), dtype=None) == config


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is True; only False"),
        ("qwen2_moe", {"qkv_bias": 1}, "qkv_bias is 1; expected true or false"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"]}, "expected 'full_attention' for each"),
        ("qwen2_moe", {"layer_types": 5}, "layer_types is 5; expected 'full_attention' for each"),
        ("qwen3_moe", {"num_local_experts": 3}, "num_local_experts is 3 and num_experts"),
        ("qwen3_moe", {"mlp_only_layers": [7]}, r"mlp_only_layers is \[7\]; expected indices"),
        ("qwen3_next", {"decoder_sparse_step": 99}, "leave no layer with experts"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a positive"),
        ("qwen3_next", {"rope_parameters": {"mrope_section": [1, 1, 1]}}, "one position a token"),
        ("qwen2_moe", {"head_dim": None, "hidden_size": 41, "num_attention_heads": 2}, "not a multiple"),
        ("qwen2_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    ],
)
def test_what_a_family_does_not_have_is_refused(model_type: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(family_config(model_type, 0) | change)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"qkv_bias": False}, "qkv_bias", False),
        ({}, "qkv_bias", True),
        ({"norm_topk_prob": None}, "norm_topk_prob", False),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope.theta", 5e5),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, "mlp_types", ("dense",) * 3 + ("sparse",)),
        ({"head_dim": None, "hidden_size": 48, "num_attention_heads": 3}, "head_dim", 16),
    ],
)
def test_a_value_of_config_json_means_what_it_does_to_the_reference(
    change: dict, field: str, value: Any
) -> None:
    found: Any = ModelConfig.from_dict(family_config("qwen2_moe", 0) | change)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


def test_the_family_that_the_guide_adds_says_what_its_reference_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "families.md").read_text()
    code = textwrap.dedent(guide.split("```python\n")[1].split("```")[0])
    added: dict[str, Any] = {}
    exec(code, added)  # as a reader would write it to a file
    monkeypatch.setitem(families._BY_TYPE, "qwen3", added["FAMILY"])
    torch.manual_seed(0)
    given = family_config("qwen3_moe", 2)
    reference = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in given.items() if "expert" not in k})).eval()
    model = QwenMoe.from_pretrained(save_reference(reference, tmp_path), dtype=jnp.float32)
    ids = random_ids(given, 40, 0)
    ours, theirs = np.asarray(model.logits(ids[None])), reference_logits(reference, ids)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= parity.LARGEST_DIFFERENCE


@pytest.mark.parametrize("model_type", OTHERS)
def test_what_is_written_is_what_the_reference_wrote(model_type: str, tmp_path: Path) -> None:
    """`save_pretrained` and Orbax, each read again: every tensor equal, those that are fused among them."""
    theirs = parity.random_model(0, model_type).reference
    loaded(model_type, 0).save_pretrained(tmp_path / "again")
    found = type(theirs).from_pretrained(tmp_path / "again", dtype="auto").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(found[name], value), name
    ids = random_ids(family_config(model_type, 0), 20, 1)[None]
    convert_checkpoint(saved(model_type, 0), tmp_path / "orbax")
    converted = QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32)
    np.testing.assert_array_equal(converted.logits(ids), loaded(model_type, 0).logits(ids))


# Whole groups of 16 columns; blocks of 128 rows end with the rows of a head, which a fused projection needs.
WHOLE_GROUPS = {
    "hidden_size": 128,
    "head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
}


@pytest.mark.parametrize(
    ("model_type", "form"),
    some([(t, f) for t in OTHERS for f in ("fp8", "int4")], lambda i: i in (1, 2, 3, 5, 6)),
)
def test_a_quantised_model_is_read_as_its_codes_mean(model_type: str, form: str, tmp_path: Path) -> None:
    """Against the reference with the codes multiplied out by torch."""
    config = family_config(model_type, 0)
    config |= {key: value for key, value in WHOLE_GROUPS.items() if key in config}
    reference = build_reference(config, 0)
    source = save_reference(reference, tmp_path / "whole")
    group = None if form == "fp8" else 16
    quantize_checkpoint(source, tmp_path / "few", quantization=preset(form, group=group))
    tensors = load_file(tmp_path / "few" / "model.safetensors")
    model = QwenMoe.from_pretrained(tmp_path / "few", dtype=jnp.float32)
    with torch.no_grad():
        for name, weight in _by_module(reference).items():
            meaning = _meaning(tensors, name, weight.shape)
            if meaning is not None:
                weight.copy_(meaning)
    ids = random_ids(config, 40, 0)
    ours, theirs = np.asarray(model.logits(ids[None])), reference_logits(reference, ids)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= parity.LARGEST_DIFFERENCE


def _by_module(reference: Any) -> dict[str, torch.Tensor]:
    """Name of a module -> its matrix, of each expert a view."""
    found = {}
    for name, weight in reference.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(weight):
                for half, part in zip(("gate", "up"), matrix.chunk(2), strict=True):
                    found[f"{name.removesuffix('gate_up_proj')}{expert}.{half}_proj"] = part
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(weight):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj"] = matrix
        elif name.endswith(".weight"):
            found[name.removesuffix(".weight")] = weight
    return found


def _meaning(tensors: dict[str, torch.Tensor], name: str, shape: Any) -> torch.Tensor | None:
    """What the stored codes of a matrix mean; None if it is stored as it is."""
    scales = tensors.get(f"{name}.weight_scale_inv")
    if scales is not None:
        rows, columns = (torch.arange(n) // 128 for n in shape)
        return tensors[f"{name}.weight"].float() * scales.float()[rows][:, columns]
    scales = tensors.get(f"{name}.weight_scale")
    if scales is None:
        return None
    words = tensors[f"{name}.weight_packed"]
    codes = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1)[:, : shape[1]]
    return (codes - 8) * scales.float().repeat_interleave(16, dim=1)


def test_codes_whose_scales_cut_a_fused_head_are_refused(tmp_path: Path) -> None:
    config = family_config("qwen3_next", 0) | WHOLE_GROUPS | {"linear_value_head_dim": 32}
    source = save_reference(build_reference(config, 0), tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"in_proj_qkvz.* has one scale for 128 rows"):
        quantize_checkpoint(source, tmp_path / "fp8", quantization=preset("fp8"))
    assert not (tmp_path / "fp8" / "config.json").exists()


def test_a_fused_projection_that_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("qwen3_next", 0), tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("in_proj_qkvz.weight"))
    whole = tensors.pop(key)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing keys: {key}"):
        QwenMoe.from_pretrained(folder)
    save_file(tensors | {key: whole[:-1].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"wrong shapes: {key} is \[{len(whole) - 1}, "):
        QwenMoe.from_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "branches"),
    [
        (DENSE, {"dense MLP", "attention", "Gated DeltaNet"}),
        ("qwen2_moe", {"attention", "shared expert", "routed experts"}),
    ],
)
def test_a_layout_check_passes_and_names_the_branches_that_there_are(
    model_type: str, branches: set[str]
) -> None:
    model = loaded(model_type, 0)
    report = check_layout(
        saved(model_type, 0),
        Layout(model.config, make_mesh(1, 2, 2)),
        jnp.dtype(jnp.float32),
        make_kernels("cpu"),
    )
    assert report.ok
    assert {c.branch for c in report.comparisons} >= branches


@pytest.mark.parametrize("model_type", OTHERS)
def test_matrices_have_a_scheme_in_every_format(model_type: str) -> None:
    config = ModelConfig.from_dict(family_config(model_type, 0))
    mixer = "linear_attn.in_proj_qkv" if "linear_attention" in config.layer_types else "self_attn.q_proj"
    for form in FORMATS:
        coded = dataclasses.replace(config, quantization=preset(form).with_scales_in("bfloat16"))
        for module in (mixer, "mlp.experts.gate_up_proj" if config.num_experts else "mlp.up_proj"):
            name = f"layers.0.{module}" if "experts" in module else f"layers.0.{module}.weight"
            assert matrix_scheme(coded, name) is not None, (form, name)


@pytest.mark.parametrize(
    ("model_type", "there", "absent"),
    [
        (DENSE, {"mlp"}, {"moe", "router", "router_logits", "experts", "shared_expert", "shared_gate"}),
        ("qwen3_moe", {"router", "experts"}, {"shared_expert", "shared_gate"}),
        ("qwen2_moe", {"router", "shared_expert", "shared_gate"}, set()),
    ],
)
def test_a_layer_has_the_points_of_what_it_is_built_of(
    model_type: str, there: set[str], absent: set[str]
) -> None:
    points = points_of(ModelConfig.from_dict(family_config(model_type, 0)))
    inside = {name.removeprefix("layers.0.") for name in points if name.startswith("layers.0.")}
    assert inside >= there
    assert not inside & absent

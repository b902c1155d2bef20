"""check_layout finds a disagreement in the layer and branch where it is, and nothing where there is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.meshes import mesh_case, on_mesh
from support.slow import some

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.cli import main
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.layout_check import TOLERANCES, Comparison, LayoutReport

SEED = 22  # layer 0 is full attention, layer 1 Gated DeltaNet


@pytest.fixture(scope="module")
def model() -> QwenMoe:
    return on_mesh(SEED, 1, 2, 2, shared_expert="sharded")


@pytest.fixture(scope="module")
def fused() -> QwenMoe:
    return on_mesh(SEED, 1, 2, 1, shared_expert="fused", expert_dispatch="all_to_all")


def damaged(
    model: QwenMoe, name: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> LayoutReport:
    """The report on a model of which one parameter was changed behind its back."""
    value = model._parameters[name]
    changed = jax.device_put(np.asarray(change(np.array(value))), value.sharding)
    monkeypatch.setitem(model._parameters, name, changed)
    return model.check_layout()


def test_a_good_layout_agrees_everywhere(model: QwenMoe) -> None:
    report = model.check_layout()
    assert report.ok
    places = [(c.place, c.branch) for c in report.comparisons]
    assert places == [
        ("embedding", "embedding"),
        ("layer 0", "attention"),
        ("layer 0", "routed experts"),
        ("layer 0", "shared expert"),
        ("layer 1", "Gated DeltaNet"),
        ("layer 1", "routed experts"),
        ("layer 1", "shared expert"),
        ("logits", "logits"),
    ]
    # nearly a hundred times below the tolerance, and not because nothing was computed
    assert 0 < max(c.difference for c in report.comparisons) < TOLERANCES["float32"] / 50
    assert "agrees in every layer and branch" in str(report)


@pytest.mark.parametrize(
    ("name", "change", "where"),
    some(
        [
            ("layers.0.mlp.shared_expert.down_proj.weight", lambda w: 2 * w, ("layer 0", "shared expert")),
            ("layers.1.mlp.experts.down_proj", lambda w: w * 1.01, ("layer 1", "routed experts")),
            (
                "layers.1.mlp.experts.gate_up_proj",
                lambda w: np.roll(w, 1, axis=0),
                ("layer 1", "routed experts"),
            ),
            ("layers.0.self_attn.k_proj.weight", lambda w: w[::-1], ("layer 0", "attention")),
            ("layers.1.linear_attn.conv1d.weight", lambda w: w * 1.1, ("layer 1", "Gated DeltaNet")),
            ("layers.1.linear_attn.A_log", lambda w: w * np.nan, ("layer 1", "Gated DeltaNet")),
            ("embed_tokens.weight", lambda w: np.roll(w, 1, axis=0), ("embedding", "embedding")),
            ("lm_head.weight", lambda w: np.roll(w, 1, axis=0), ("logits", "logits")),
        ],
        lambda i: i in (0, 2, 5),
    ),
)
def test_a_disagreement_is_isolated_to_its_layer_and_branch(
    model: QwenMoe,
    name: str,
    change: Callable[[Any], Any],
    where: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = damaged(model, name, change, monkeypatch)
    assert not report.ok
    assert [(c.place, c.branch) for c in report.disagreements] == [where]
    assert f"DISAGREES  {where[0]}, {where[1]}" in str(report)


@pytest.mark.slow
def test_a_fused_shared_expert_is_told_from_the_routed_ones(
    fused: QwenMoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.check_layout().ok
    name = "layers.0.mlp.experts.down_proj"
    slots = fused._parameters[name].shape[0] // 2

    def twice(shared: bool) -> Callable[[Any], Any]:
        is_shared = np.arange(2 * slots) % slots == slots - 1
        return lambda w: w * np.where(is_shared == shared, 2, 1)[:, None, None].astype(np.float32)

    for shared, branch in ((True, "shared expert"), (False, "routed experts")):
        report = damaged(fused, name, twice(shared), monkeypatch)
        assert [(c.place, c.branch) for c in report.disagreements] == [("layer 0", branch)]
        monkeypatch.undo()


@pytest.mark.slow
def test_a_bfloat16_model_is_held_to_bfloat16s_roundings() -> None:
    model = QwenMoe.from_pretrained(
        mesh_case(SEED).folder,
        dtype=jnp.bfloat16,
        mesh=make_mesh(expert=2, tensor=2),
        shared_expert="outside",
    )
    report = model.check_layout()
    assert report.ok
    assert report.tolerance == TOLERANCES["bfloat16"]


def test_a_nan_is_a_disagreement() -> None:
    report = LayoutReport("mesh", (Comparison("layer 0", "attention", float("nan")),), 1e-4, 1, 0)
    assert not report.ok


def test_a_model_on_one_device_has_no_layout_to_check() -> None:
    with pytest.raises(InputError, match="load it with mesh=make_mesh"):
        QwenMoe.from_pretrained(mesh_case(SEED).folder, dtype=jnp.float32).check_layout()


def test_the_command_checks_without_loading_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(mesh_case(SEED).folder)
    options = ["--dtype", "float32", "--no-compilation-cache", "--shared-expert", "prescaled"]
    assert main(["check", folder, "--expert", "2", "--tensor", "2", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mesh data 1 x expert 2 x tensor 2: shared expert prescaled, dispatch psum")
    assert "agrees in every layer and branch" in out


def test_a_disagreement_is_exit_status_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "float32", 0.0)  # so that roundings disagree
    folder = str(mesh_case(SEED).folder)
    options = ["--dtype", "float32", "--no-compilation-cache", "--shared-expert", "outside"]
    assert main(["check", folder, "--expert", "2", *options]) == 1
    assert "DISAGREES  layer 0, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a mesh of one device has nothing to disagree with; give --data, --expert or --tensor"),
        (["--expert", "16"], "needs 16 devices, and there are 8"),
        (["--expert", "0"], "the mesh axis expert is 0; expected a positive integer"),
        (["--expert", "2", "--shared-expert", "twice"], "shared_expert is 'twice'; expected"),
        (["--expert", "2", "--exact", "--attention", "data"], "exact=True was given with attention='data'"),
        (["--tensor", "2", "--process-id", "0"], "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not given"),
    ],
)
def test_a_layout_that_does_not_exist_is_one_line_and_exit_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mesh_case(SEED).folder), "--no-compilation-cache", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""

"""Meshes and choices that do not fit are refused with one sentence that says what to do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support.configs import random_config

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.parallel.choose import choose_layout
from qwen_moe_jax.parallel.layout import Layout

FUSABLE, UNFUSABLE = (ModelConfig.from_dict(random_config(seed)) for seed in (22, 1))


def choose(config: ModelConfig = FUSABLE, mesh: Mesh | None = None, **choices: Any) -> Layout | None:
    return choose_layout(config, mesh, compute=jnp.dtype(jnp.float32), kernels=Kernels("cpu"), **choices)


def test_axes_stand_in_their_order_with_tensor_neighbours_next_to_each_other() -> None:
    mesh = make_mesh(data=2, expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "tensor": 2}
    np.testing.assert_array_equal(mesh.devices.ravel(), jax.devices())
    assert make_mesh(expert=3).devices.size == 3
    assert make_mesh(tensor=2, devices=jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:6]


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_a_size_that_is_no_positive_integer_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match=r"axis expert is .*; expected a positive integer"):
        make_mesh(expert=size)


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"data 2 x expert 4 x tensor 2 needs 16 devices, and there are 8; give"
    ):
        make_mesh(data=2, expert=4, tensor=2)
    with pytest.raises(InputError, match=r"needs 4 devices, and there are 2"):
        make_mesh(tensor=4, devices=jax.devices()[:2])


@pytest.mark.parametrize("mesh", ["expert=2", 4, Mesh(np.array(jax.devices()[:2]), ("model",))])
def test_something_else_than_a_mesh_of_ours_is_refused(mesh: Any) -> None:
    with pytest.raises(InputError, match="expected one from make_mesh"):
        choose(mesh=mesh)


@pytest.mark.parametrize("mesh_given", [True, False])
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"shared_expert": "replicated"}, r"shared_expert is 'replicated'; expected 'prescaled', 'outside'"),
        ({"expert_dispatch": "ring"}, r"expert_dispatch is 'ring'; expected 'psum', 'all_to_all'"),
        ({"attention": "expert"}, r"attention is 'expert'; expected 'tensor', 'data'"),
        (
            {"exact": True, "expert_dispatch": "all_to_all"},
            r"exact=True .*expert_dispatch='all_to_all'.*'psum'",
        ),
        ({"exact": True, "attention": "data"}, r"exact=True .*attention='data'.*'tensor'"),
        ({"exact": True, "shared_expert": "sharded"}, r"exact=True .*shared_expert='sharded'.*'outside'"),
    ],
)
def test_unknown_and_contradictory_choices_are_refused(
    mesh_given: bool, choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(mesh=make_mesh(expert=2) if mesh_given else None, **choice)


def test_a_shared_expert_of_another_width_cannot_be_fused() -> None:
    with pytest.raises(InputError, match=r"as wide as the others, and this model's are 32 and 24 wide; use"):
        choose(UNFUSABLE, make_mesh(expert=2), shared_expert="fused")


@pytest.mark.slow
def test_auto_measures_and_says_which() -> None:
    for config, fusable in ((FUSABLE, True), (UNFUSABLE, False)):
        layout = choose(config, make_mesh(expert=2))
        assert layout is not None
        assert layout.shared_expert in ("prescaled", "outside", "sharded", *(("fused",) if fusable else ()))
    exact = choose(mesh=make_mesh(expert=2), exact=True)
    assert exact is not None
    assert exact.shared_expert == "outside"


def test_one_device_needs_no_layout_unless_it_is_to_equal_one_bit_by_bit() -> None:
    assert choose() is None
    assert choose(expert_dispatch="all_to_all", shared_expert="sharded") is None
    for choice in ({"exact": True}, {"shared_expert": "fused"}):
        layout = choose(**choice)
        assert layout is not None
        assert layout.mesh.devices.size == 1


def test_layouts_are_part_of_compiled_programs() -> None:
    """Equal layouts compile once: what ranks are asked is hashable and compares by value."""
    layout = choose(mesh=make_mesh(expert=2), shared_expert="sharded")
    assert layout is not None
    again = dataclasses.replace(layout)
    assert layout.ranks(jnp.float32) == again.ranks(jnp.float32)
    assert hash(layout.ranks(jnp.float32)) == hash(again.ranks(jnp.float32))


def test_a_mesh_is_refused_before_weights_are_read(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_moe_text", "num_hidden_layers": 1}')
    with pytest.raises(InputError, match="expected one from make_mesh"):
        QwenMoe.from_pretrained(tmp_path, dtype=jnp.float32, mesh="two")  # type: ignore[arg-type]

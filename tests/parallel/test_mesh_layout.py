"""The table of logical axes: everything stored is held, where it belongs, and comes back as it was."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import QWEN_397B, random_config
from support.meshes import factorisations, mesh_case, on_mesh, run
from support.slow import some

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.reader import read_parameters, read_targets
from qwen_moe_jax.checkpoint.targets import check_sources, place
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import SHARED_EXPERT_MODES, Layout

FLOAT32 = DtypePolicy(compute=jnp.dtype(jnp.float32), matrix=jnp.dtype(jnp.float32))
MESHES = [sizes for devices in (1, 2, 3, 6, 8) for sizes in factorisations(devices)]


def layouts(seed: int) -> list[Layout]:
    """Every mesh with every mode that the configuration allows, attention and dispatch in turn."""
    config = ModelConfig.from_dict(random_config(seed))
    found = []
    for i, ((data, expert, tensor), mode) in enumerate(itertools.product(MESHES, SHARED_EXPERT_MODES)):
        if mode == "fused" and config.moe_intermediate_size != config.shared_expert_intermediate_size:
            continue
        mesh = make_mesh(data=data, expert=expert, tensor=tensor)
        attention, dispatch = ("tensor", "data")[i % 2], ("psum", "all_to_all")[i // 2 % 2]
        found.append(Layout(config, mesh, attention, mode, dispatch))
    return found


def random_stored(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in parameter_shapes(config).items()
    }


def held(layout: Layout, stored: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    def fetch(name, box, out):
        out[...] = stored[name][box]
        return []

    return {name: place(target, fetch)[0] for name, target in layout.targets(FLOAT32).items()}


@pytest.mark.parametrize("seed", some([2, 8, 14, 22], lambda i: i == 1))
def test_every_layout_holds_every_stored_element_and_gives_it_back(seed: int) -> None:
    stored = random_stored(ModelConfig.from_dict(random_config(seed)))
    for layout in layouts(seed):
        check_sources(layout.targets(FLOAT32), {name: value.shape for name, value in stored.items()})
        back = layout.stored(held(layout, stored))
        assert list(back) == list(stored)
        for name, value in stored.items():
            np.testing.assert_array_equal(back[name], value, f"{name} {layout}")


def test_a_layout_that_forgets_a_parameter_is_noticed() -> None:
    """What fusion did to a peer: the loader dropped shared_expert.* with a warning."""
    layout = layouts(22)[0]
    targets = layout.targets(FLOAT32)
    dropped = next(name for name in targets if ".shared_expert." in name)
    del targets[dropped]
    with pytest.raises(ValueError, match=rf"no device holds all of {dropped}"):
        check_sources(targets, parameter_shapes(layout.config))


def test_fused_stacks_hold_the_shared_expert_in_their_last_slot_on_every_rank() -> None:
    config = ModelConfig.from_dict(random_config(22))
    stored = random_stored(config)
    layout = Layout(config, make_mesh(expert=2, tensor=2), shared_expert="fused")
    arrays = held(layout, stored)
    assert not any(".shared_expert." in name for name in arrays)
    inner = config.moe_intermediate_size // 2
    for shard in arrays["layers.0.mlp.experts.gate_up_proj"].addressable_shards:
        local = np.asarray(shard.data)
        assert local.shape == (config.num_experts // 2 + 1, 2 * inner, config.hidden_size)
        rows = slice(inner, None) if shard.index[1].start else slice(0, inner)
        for part, place_ in (("gate_proj", slice(0, inner)), ("up_proj", slice(inner, None))):
            wanted = stored[f"layers.0.mlp.shared_expert.{part}.weight"][rows]
            np.testing.assert_array_equal(local[-1, place_], wanted)


def test_the_output_gate_is_sliced_with_its_head_and_scarce_key_heads_are_replicated() -> None:
    """6 query heads on 3 key/value heads over 6 ranks: one query head each, each key head twice."""
    config = ModelConfig.from_dict(random_config(22))
    stored = random_stored(config)
    arrays = held(Layout(config, make_mesh(expert=2, tensor=3)), stored)
    dim = config.head_dim
    layer = f"layers.{config.layer_types.index('full_attention')}.self_attn."
    for name, per_head, head_of in (
        ("q_proj.weight", 2 * dim, lambda rank: rank),
        ("k_proj.weight", dim, lambda rank: rank // 2),
    ):
        local = np.split(np.asarray(arrays[layer + name]), 6)
        heads = np.split(stored[layer + name], len(stored[layer + name]) // per_head)
        for rank in range(6):
            np.testing.assert_array_equal(local[rank], heads[head_of(rank)])


def test_nothing_that_can_be_divided_is_whole_on_a_rank() -> None:
    """Bytes of a rank at the sizes of the 397B, TP=2 EP=4: an eighth but for routers, norms, key heads."""
    config = ModelConfig.from_dict(QWEN_397B)
    layout = Layout(config, make_mesh(expert=4, tensor=2), shared_expert="sharded")
    whole_bytes = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    rank_bytes = sum(
        int(np.prod(t.struct.sharding.shard_shape(t.struct.shape))) for t in layout.targets(FLOAT32).values()
    )
    assert 1 / 8 <= rank_bytes / whole_bytes < 1.004 / 8


def test_each_slice_is_read_once_and_nothing_else() -> None:
    """A process with all devices reads a file once, unless some heads are wanted by several ranks."""
    case = mesh_case(2)  # 3 key heads of either kind
    config = ModelConfig.from_file(case.folder)
    shapes = parameter_shapes(config)
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    _, whole_report = read_parameters(case.folder, structs)
    assert whole_report.read_bytes == whole_report.file_bytes
    for sizes, replicated in (((1, 3, 1), False), ((2, 1, 3), False), ((1, 2, 3), True)):
        for mode in ("outside", "sharded", "fused"):
            layout = Layout(config, make_mesh(*sizes), shared_expert=mode)
            _, report = read_targets(case.folder, layout.targets(FLOAT32), shapes)
            if not replicated and mode != "fused":
                assert report.read_bytes == whole_report.file_bytes, layout
            # the fused slot is read for each rank of the expert axis, whose stacks differ
            assert whole_report.file_bytes <= report.read_bytes <= 1.3 * whole_report.file_bytes, layout


@pytest.mark.parametrize("mode", some(["sharded", "fused"], lambda i: i == 1))
def test_a_model_on_a_mesh_saves_what_it_was_loaded_from(mode: str, tmp_path: Path) -> None:
    case = mesh_case(22)
    model = on_mesh(22, 1, 2, 2, shared_expert=mode)
    model.save_pretrained(tmp_path / "hf")
    model.save_orbax(tmp_path / "orbax")
    config = ModelConfig.from_file(case.folder)
    structs = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parameter_shapes(config).items()
    }
    original, _ = read_parameters(case.folder, structs)
    saved, _ = read_parameters(tmp_path / "hf", structs)
    for name, value in original.items():
        np.testing.assert_array_equal(value, saved[name], name)
    mesh = make_mesh(expert=3)
    again = QwenMoe.from_pretrained(tmp_path / "orbax", dtype=jnp.float32, mesh=mesh, shared_expert=mode)
    direct = QwenMoe.from_pretrained(case.folder, dtype=jnp.float32, mesh=mesh, shared_expert=mode)
    for a, b in zip(run(again, case.rows).logits, run(direct, case.rows).logits, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wide_checkpoint_is_rounded_on_a_mesh_as_on_one_device() -> None:
    case = mesh_case(22)
    arrays = [
        QwenMoe.from_pretrained(case.folder, dtype=jnp.bfloat16, **layout)
        for layout in ({}, {"mesh": make_mesh(expert=2, tensor=2), "shared_expert": "fused"})
    ]
    one, meshed = arrays
    assert meshed.layout is not None
    back = meshed.layout.stored(meshed._parameters)
    for name, value in one._parameters.items():
        np.testing.assert_array_equal(np.asarray(value), back[name], name)

"""The Orbax layout: the same parameters back, in any sharding, and damage named."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import TIED_SEED, UNTIED_SEED, config_of, expected_of, random_parameters

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.checkpoint import orbax
from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
from qwen_moe_jax.checkpoint.names import is_matrix
from qwen_moe_jax.checkpoint.orbax import read_orbax, save_orbax, stored_arrays
from qwen_moe_jax.checkpoint.orbax_folder import is_orbax
from qwen_moe_jax.checkpoint.writer import write_safetensors
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError

CONFIG = config_of(UNTIED_SEED)
EXPECTED = expected_of(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bfloat16 model held in float32, in Orbax layout; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    save_orbax(folder, random_parameters(CONFIG), CONFIG, dtype=jnp.bfloat16)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def assert_same(read, parameters):
    assert list(read) == list(parameters)
    for name, value in parameters.items():
        assert read[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(read[name]), np.asarray(value), name)


@pytest.mark.parametrize("seed", [UNTIED_SEED, TIED_SEED])
def test_float32_parameters_come_back(seed, tmp_path):
    config = config_of(seed)
    parameters = random_parameters(config)
    assert not is_orbax(tmp_path)
    save_orbax(tmp_path / "new", parameters, config, dtype=jnp.float32)
    assert is_orbax(tmp_path / "new")
    assert ModelConfig.from_file(tmp_path / "new").dtype == "float32"
    assert_same(read_orbax(tmp_path / "new", expected_of(config)), parameters)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_matrices_of_a_bfloat16_model_are_stored_in_bfloat16_and_held_as_asked(held, saved):
    stored = stored_arrays(saved)
    assert {name for name, array in stored.items() if array.dtype == jnp.bfloat16} == set(
        filter(is_matrix, EXPECTED)
    )
    assert_same(read_orbax(saved, expected_of(CONFIG, held)), random_parameters(CONFIG, matrix=held))


def test_tokenizer_files_come_along_and_an_earlier_checkpoint_is_replaced(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    for seed in (1, 2):
        parameters = random_parameters(CONFIG, seed)
        save_orbax(tmp_path / "new", parameters, CONFIG, dtype=jnp.float32, extra_files_from=source)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert_same(read_orbax(tmp_path / "new", EXPECTED), parameters)


RESHARD = """
import sys
sys.path[:0] = sys.argv[3:]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from checkpoint_cases import UNTIED_SEED, config_of, expected_of, random_parameters
from qwen_moe_jax.checkpoint.orbax import read_orbax
from qwen_moe_jax.checkpoint.reader import read_parameters

assert len(jax.devices()) == 4
config = config_of(UNTIED_SEED)
mesh = Mesh(np.array(jax.devices()), ("expert",))
expected = {
    name: jax.ShapeDtypeStruct(
        struct.shape,
        struct.dtype,
        sharding=NamedSharding(mesh, PartitionSpec("expert" if ".experts." in name else None)),
    )
    for name, struct in expected_of(config).items()
}
truth = random_parameters(config)
for read in (read_orbax(sys.argv[1], expected), read_parameters(sys.argv[2], expected)[0]):
    for name, value in read.items():
        assert value.sharding == expected[name].sharding, name
        assert np.array_equal(np.asarray(value), np.asarray(truth[name])), name
    experts = read["layers.0.mlp.experts.down_proj"]
    assert experts.addressable_shards[0].data.shape[0] == config.num_experts // 4
print("ok")
"""


@pytest.mark.slow
def test_both_layouts_load_into_the_sharding_asked_for(saved, tmp_path):
    assert CONFIG.num_experts % 4 == 0
    write_safetensors(tmp_path, random_parameters(CONFIG), CONFIG, dtype=jnp.bfloat16)
    run = subprocess.run(
        [sys.executable, "-c", RESHARD, saved, tmp_path, *filter(None, sys.path)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "ok\n", run.stderr


def test_orbax_is_imported_only_when_it_is_used():
    code = "import sys, qwen_moe_jax.checkpoint.orbax; assert 'orbax.checkpoint' not in sys.modules"
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_missing_unexpected_and_misshapen_parameters_are_named_at_once(saved):
    expected = dict(EXPECTED)
    del expected["norm.weight"]
    expected["layers.9.mlp.gate.weight"] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    expected["lm_head.weight"] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        read_orbax(saved, expected)
    message = str(caught.value)
    assert "missing keys: layers.9.mlp.gate.weight" in message
    assert "unexpected keys: norm.weight" in message
    assert f"lm_head.weight is {list(EXPECTED['lm_head.weight'].shape)} instead of [2, 3]" in message


def test_nan_weights_are_named(tmp_path):
    parameters = random_parameters(CONFIG)
    for name, value in (("norm.weight", jnp.nan), ("layers.1.mlp.gate.weight", jnp.inf)):
        parameters[name] = parameters[name].at[0].set(value)
    save_orbax(tmp_path, parameters, CONFIG, dtype=jnp.float32)
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite .* layers\.1\.mlp\.gate\.weight, norm\.weight;"
    ):
        read_orbax(tmp_path, EXPECTED)


def test_a_folder_without_orbax_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="holds no orbax folder"):
        read_orbax(tmp_path, EXPECTED)


@pytest.mark.parametrize(
    "lost",
    [
        "layers.1",
        "layers.1/layers.1.mlp.gate.weight",
        "layers.1/layers.1.mlp.gate.weight/.zarray",
        "layers.1/layers.1.mlp.experts.down_proj/0.0.0",
        "norm/norm.weight/0",
    ],
)
def test_a_damaged_checkpoint_is_named(lost, copy):
    path = copy / "orbax" / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="is not a readable Orbax checkpoint") as caught:
        read_orbax(copy, EXPECTED)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_array_is_named(copy):
    file = copy / "orbax" / "lm_head" / "lm_head.weight" / "0.0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not a readable Orbax checkpoint"):
        read_orbax(copy, EXPECTED)


@pytest.mark.parametrize("text", ["[]", "{", '{"groups": {"../up": ["x"]}}', '{"groups": {"norm": [7]}}'])
def test_a_damaged_manifest_is_named(text, copy):
    (copy / "orbax" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_orbax(copy, EXPECTED)


@pytest.mark.parametrize("renamed", [False, True])
def test_an_interrupted_save_is_refused(renamed, copy):
    """What another program, or a copy that ended early, leaves; and what a save leaves that was killed."""
    if renamed:
        (copy / "orbax").rename(copy / "orbax.part")
    else:
        (copy / "orbax" / "manifest.json").unlink()
    for open_ in (QwenMoe.from_pretrained, inspect_checkpoint, stored_arrays):
        with pytest.raises(CheckpointError, match=r"interrupted save.* again\.$"):
            open_(copy)


def test_a_save_that_fails_leaves_the_earlier_one_and_the_next_one_replaces_both(copy, monkeypatch):
    parameters = random_parameters(CONFIG, 5)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(orbax, "finish", fail)
        with pytest.raises(OSError, match="disk full"):
            save_orbax(copy, parameters, CONFIG, dtype=jnp.float32)
    assert_same(read_orbax(copy, EXPECTED), random_parameters(CONFIG))
    save_orbax(copy, parameters, CONFIG, dtype=jnp.float32)
    assert_same(read_orbax(copy, EXPECTED), parameters)
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "orbax"]


def test_orbax_itself_restores_a_group_and_files_hold_nothing_but_the_values(saved):
    import orbax.checkpoint as ocp

    parameters = random_parameters(CONFIG)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        group = checkpointer.restore(saved.resolve() / "orbax" / "layers.0")
    assert set(group) == {name for name in EXPECTED if name.startswith("layers.0.")}
    for name, value in group.items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), parameters[name], name)
        chunk = saved / "orbax" / "layers.0" / name / ".".join("0" * value.ndim)
        assert chunk.read_bytes() == np.asarray(value).tobytes(), name


def test_a_matrix_that_would_be_rounded_is_refused(tmp_path):
    parameters = random_parameters(CONFIG)
    parameters["lm_head.weight"] = parameters["lm_head.weight"] + 2**-9
    with pytest.raises(CheckpointError, match=r"lm_head\.weight cannot be written in bfloat16"):
        save_orbax(tmp_path, parameters, CONFIG, dtype=jnp.bfloat16)


def test_a_folder_with_a_hugging_face_checkpoint_is_refused(tmp_path):
    write_safetensors(tmp_path, random_parameters(CONFIG), CONFIG, dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="another layout"):
        save_orbax(tmp_path, random_parameters(CONFIG), CONFIG, dtype=jnp.float32)

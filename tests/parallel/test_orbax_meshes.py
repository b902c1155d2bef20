"""Orbax checkpoints on meshes: the bits and bytes that safetensors give there, wherever saved from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.configs import DIVISIBLE_BY_8, random_config
from support.reference import build_reference, save_reference
from test_processes import free_port

from qwen_moe_jax import make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.orbax import read_orbax_targets, save_orbax
from qwen_moe_jax.checkpoint.reader import read_parameters, read_targets
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout

SEED = 2  # three key heads of either kind, fusable, 16 experts
FLOAT32 = DtypePolicy(compute=jnp.dtype("float32"), matrix=jnp.dtype("float32"))
BFLOAT16 = DtypePolicy(compute=jnp.dtype("bfloat16"), matrix=jnp.dtype("bfloat16"))

# One of two processes with four devices each: reads its part and prints how much that was.
ONE_OF_TWO = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from qwen_moe_jax.parallel.processes import start_processes
assert start_processes(sys.argv[1], 2, int(sys.argv[2])) == 2
from qwen_moe_jax import make_mesh
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.checkpoint.orbax import read_orbax_targets
from qwen_moe_jax.checkpoint.reader import read_targets
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
import numpy as np

policy = DtypePolicy(compute=np.dtype("float32"), matrix=np.dtype("float32"))
config = ModelConfig.from_file(sys.argv[3])
layout = Layout(config, make_mesh(expert=4, tensor=2), shared_expert="sharded")
shapes = parameter_shapes(config)
truth, _ = read_targets(sys.argv[3], layout.targets(policy), shapes)
read, report = read_orbax_targets(sys.argv[4], layout.targets(policy), shapes, {})
for name, value in truth.items():
    for a, b in zip(value.addressable_shards, read[name].addressable_shards, strict=True):
        assert a.index == b.index and np.array_equal(a.data, b.data), name
print(json.dumps([report.read_bytes, report.file_bytes]), flush=True)
"""


def config_dict() -> dict:
    """Every dimension divides by 8, so that half of the devices hold half of what is divided."""
    return random_config(SEED) | DIVISIBLE_BY_8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face, converted from it); not to be changed."""
    base = tmp_path_factory.mktemp("meshes")
    source = save_reference(build_reference(config_dict(), 0), base / "source")
    convert_checkpoint(source, base / "orbax")
    return source, base / "orbax"


def assert_same(read: dict[str, jax.Array], truth: dict[str, jax.Array]) -> None:
    assert list(read) == list(truth)
    for name, value in truth.items():
        assert read[name].sharding == value.sharding, name
        assert read[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(read[name], np.float32), np.asarray(value, np.float32), name)


@pytest.mark.parametrize("policy", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sizes", "choices"),
    [
        ((1, 8, 1), {"shared_expert": "sharded"}),
        ((1, 1, 8), {"shared_expert": "outside"}),
        ((2, 2, 2), {"shared_expert": "prescaled"}),
        ((1, 2, 3), {"shared_expert": "fused"}),  # uneven: padded heads and rows
        ((2, 2, 1), {"shared_expert": "outside", "attention": "data"}),
    ],
)
def test_restored_on_a_mesh_as_from_safetensors(sizes, choices, policy, folders) -> None:
    source, orbax = folders
    config = ModelConfig.from_file(source)
    shapes = parameter_shapes(config)
    layout = Layout(config, make_mesh(*sizes), **choices)
    truth, expected = read_targets(source, layout.targets(policy), shapes)
    read, report = read_orbax_targets(orbax, layout.targets(policy), shapes, {})
    assert_same(read, truth)
    assert report.read_bytes == expected.read_bytes
    assert report.file_bytes == expected.file_bytes
    assert set(report.rounded) == set(expected.rounded)
    assert report.dtypes == expected.dtypes


def test_saved_from_one_mesh_and_restored_on_others(folders, tmp_path) -> None:
    """Saved in parts, one file a part; then read where no boundary is a boundary of a part."""
    source, _ = folders
    config = ModelConfig.from_file(source)
    shapes = parameter_shapes(config)
    mesh = make_mesh(expert=4, tensor=2)

    def sharding(shape: tuple[int, ...]) -> NamedSharding:
        axes = (("expert", 4), ("tensor", 2))
        parts = [axis if n % size == 0 else None for n, (axis, size) in zip(shape, axes, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*parts))

    structs = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(shape))
        for name, shape in shapes.items()
    }
    parameters, _ = read_parameters(source, structs)
    save_orbax(tmp_path, parameters, config, dtype=jnp.float32)
    stack = tmp_path / "orbax" / "layers.0" / "layers.0.mlp.experts.down_proj"
    assert len([path for path in stack.iterdir() if path.name != ".zarray"]) == 8
    for sizes in ((1, 1, 1), (1, 3, 2), (2, 1, 4)):
        layout = Layout(config, make_mesh(*sizes), shared_expert="outside")
        truth, expected = read_targets(source, layout.targets(FLOAT32), shapes)
        read, report = read_orbax_targets(tmp_path, layout.targets(FLOAT32), shapes, {})
        assert_same(read, truth)
        assert report.read_bytes == expected.read_bytes


def test_each_of_two_processes_reads_what_its_devices_hold(folders) -> None:
    address = f"localhost:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, address, str(number), *map(str, folders)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    for worker, (out, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-2000:]
        read, file = json.loads(out.splitlines()[-1])
        # half of all, and the routers and norms, which in so small a model are not small
        assert 0.5 < read / file < 0.56

"""What a device holds, against arrays that really lie on one, and what fits beside it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.configs import QWEN_397B
from support.meshes import mesh_case, on_mesh

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.cli import main
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.devices import DEVICES, find_device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.formats.cache import PAGE
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.parallel.memory import USABLE, device_memory

SEED = 22
SIZES = [(1, 1, 1), (1, 2, 2), (2, 1, 2), (1, 3, 1), (1, 8, 1), (1, 1, 6)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("choices", [{"shared_expert": "prescaled"}, {"shared_expert": "sharded"}])
def test_bytes_are_those_of_the_arrays_on_a_device(sizes: tuple[int, int, int], choices: dict) -> None:
    model = on_mesh(SEED, *sizes, **choices)
    held = device_memory(model.config, sizes, 2 * PAGE, **choices).holdings["float32"]
    arrays = model._parameters.values()
    assert sum(held.weights.values()) == sum(a.addressable_shards[0].data.nbytes for a in arrays)
    forward = model.sequence_logits
    layers = forward.new_cache(forward.padded(1), 2 * PAGE).layers
    row = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(layers))
    assert held.sequence(2 * PAGE) == row


def test_inspect_prints_what_a_device_of_a_mesh_holds(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(mesh_case(SEED).folder)
    assert main(["inspect", folder, "--expert", "64", "--context", "128"]) == 0
    assert "a device of the mesh data 1 x expert 64 x tensor 1" in capsys.readouterr().out
    model = on_mesh(SEED, 1, 2, 2, shared_expert="prescaled")
    held = sum(value.addressable_shards[0].data.nbytes for value in model._parameters.values())
    layers = model.sequence_logits.new_cache(1, 128).layers
    row = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(layers))
    assert main(["inspect", folder, "--expert", "2", "--tensor", "2", "--context", "128"]) == 0
    in_float32 = capsys.readouterr().out.split("  in float32")[-1]
    assert f"weights        {held / 1024:.4g} KiB:" in in_float32
    assert f"{row / 1024:.4g} KiB with 128 tokens" in in_float32


@pytest.mark.parametrize("choices", [{}, {"attention": "data"}])
def test_the_largest_batch_fits_and_one_row_more_does_not(choices: dict) -> None:
    config = ModelConfig.from_dict(QWEN_397B)
    for device in DEVICES.values():
        memory = device_memory(config, (1, 8, 1), 32_768, device=device, **choices)
        for dtype, held in memory.holdings.items():
            weights, usable = sum(held.weights.values()), USABLE * device.memory
            batch = memory.largest_batch(dtype, 32_768)
            if batch == 0:
                assert weights + held.sequence(32_768) > usable
                continue
            rows = batch // memory.batch_multiple
            assert weights + rows * held.sequence(32_768) <= usable
            assert weights + (rows + 1) * held.sequence(32_768) > usable
            longest = held.longest(device, 10**9)
            assert weights + held.sequence(longest) <= usable < weights + held.sequence(longest + 1)


def test_the_397b_in_bfloat16_needs_eight_mi300x_and_half_as_many_mi355x() -> None:
    """794 GB of weights: 8 x 192 GiB hold them, 4 do not; 4 x 288 GiB do."""
    config = ModelConfig.from_dict(QWEN_397B)
    for name, ranks, fits in (
        ("mi300x", 8, True),
        ("mi300x", 4, False),
        ("mi355x", 4, True),
        ("h100", 8, False),
    ):
        memory = device_memory(config, (1, ranks, 1), 4096, device=find_device(name))
        assert (memory.largest_batch("bfloat16", 4096) > 0) == fits
        assert ("does not fit" in str(memory).split("in float32")[0]) != fits


def test_a_data_axis_multiplies_the_batch_and_not_the_weights() -> None:
    config, device = ModelConfig.from_dict(QWEN_397B | {"num_hidden_layers": 8}), find_device("mi300x")
    one, four = (device_memory(config, (n, 2, 1), 4096, device=device) for n in (1, 4))
    assert one.holdings == four.holdings
    assert four.largest_batch("bfloat16", 4096) == 4 * one.largest_batch("bfloat16", 4096)


def test_a_model_without_attention_layers_has_no_longest_context() -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}
    memory = device_memory(
        ModelConfig.from_dict(QWEN_397B | layers), (1, 1, 1), 100, device=find_device("h100")
    )
    assert memory.holdings["bfloat16"].longest(find_device("h100"), 262_144) == 262_144
    assert "262,144 tokens, one row a device" in str(memory)


def test_inspect_prints_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_397B))
    arguments = ["inspect", str(tmp_path), "--expert", "8", "--device", "MI300X", "--context", "8192"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "AMD Instinct MI300X: 192 GiB" in out
    batch = re.search(r"largest batch  .* of 4,096 tokens, ([\d,]+) of 8,192 tokens", out)
    assert batch is not None
    memory = device_memory(
        ModelConfig.from_dict(QWEN_397B), (1, 8, 1), 8192, device=find_device("mi300x"), shared_expert="auto"
    )
    assert int(batch[1].replace(",", "")) == memory.largest_batch("bfloat16", 8192)
    assert "does not fit" in out.split("  in float32")[-1]


@pytest.mark.parametrize(
    "load",
    [
        lambda: on_mesh(SEED, 1, 2, 2, shared_expert="sharded"),
        lambda: QwenMoe.from_pretrained(mesh_case(SEED).folder, dtype=jnp.bfloat16),
    ],
    ids=["mesh", "one device"],
)
def test_a_model_describes_itself(load: Callable[[], QwenMoe]) -> None:
    model = load()
    found = model.describe(context=100, device="h100")
    assert repr(found) == str(found)  # what a notebook shows
    held = found.memory.holdings[found.held]
    arrays = model._parameters.values()
    assert sum(held.weights.values()) == sum(a.addressable_shards[0].data.nbytes for a in arrays)
    mode = "sharded" if model.layout else "outside"
    for part in (
        f"computes in {model.dtype}",
        f"held in {held_dtype(model.dtype, model.kernels)}",
        f"shared expert {mode}",
        "routed experts",
        "H100",
    ):
        assert part in str(found)
    with pytest.raises(InputError, match="device is 'tpu'"):
        model.describe(device="tpu")
    with pytest.raises(InputError, match="context is 0"):
        model.describe(context=0)

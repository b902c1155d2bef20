"""Boxes of tensors: any box, dtype and way of reading gives the elements that NumPy's indexing gives."""

from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.checkpoint import read_box as module
from qwen_moe_jax.checkpoint.read_box import OpenFiles, iter_float32, read_box, read_boxes
from qwen_moe_jax.checkpoint.safetensors_files import READABLE_DTYPES, StoredTensor
from qwen_moe_jax.errors import CheckpointError


def stored(folder, rng, shape, dtype):
    """A tensor of random finite numbers in the middle of a file, at any byte."""
    values = rng.normal(size=shape)
    values = (np.abs(values) if dtype == "F8_E8M0" else values).astype(READABLE_DTYPES[dtype])
    before = int(rng.integers(0, 9000))
    file = folder / f"{rng.integers(1 << 60)}"
    file.write_bytes(rng.bytes(before) + values.tobytes() + rng.bytes(int(rng.integers(0, 2))))
    return StoredTensor(file, "a.tensor", dtype, shape, before, values.nbytes), values


def random_box(rng, shape):
    starts = [int(rng.integers(0, n)) for n in shape]
    return tuple(slice(s, int(rng.integers(s, n)) + 1) for s, n in zip(starts, shape, strict=True))


# Dtypes that are read as another one.
FLOATS = ("F32", "BF16", "F16")


@pytest.mark.parametrize("threads", [None, 3])
@pytest.mark.parametrize("seed", range(6))
def test_random_boxes(seed, threads, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    pool = ThreadPoolExecutor(threads) if threads else None
    for _ in range(40):
        # pieces of any size, so that small tensors are cut in every dimension
        monkeypatch.setattr(module, "_PIECE", int(rng.choice([1, 64, 600, 1 << 20])))
        monkeypatch.setattr(module, "_JOB", int(rng.choice([1, 500, 1 << 23])))
        shape = tuple(int(n) for n in rng.integers(1, 14, rng.integers(1, 5)))
        dtype = str(rng.choice([d for d in READABLE_DTYPES if d != "F8_E8M0"]))  # it has no zero
        tensor, values = stored(tmp_path, rng, shape, dtype)
        box = random_box(rng, shape)
        held = np.dtype(rng.choice(["float32", "bfloat16"])) if dtype in FLOATS else values.dtype
        room = np.zeros([2 * n for n in shape], held)
        out = room[tuple(slice(1, 1 + s.stop - s.start) for s in box)]
        with OpenFiles() as files:
            assert read_boxes([(tensor, box, out)], files, pool) == []
        np.testing.assert_array_equal(out, values[box].astype(held))
        out[...] = 0
        assert not room.astype(np.float32).any(), "nothing beside the box is written"


@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "F8_E8M0"])
def test_what_is_not_finite_is_seen_inside_the_box_only(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 100)
    rng = np.random.default_rng(0)
    tensor, values = stored(tmp_path, rng, (9, 30), dtype)
    values[4, 17] = np.nan
    raw = tensor.file.read_bytes()
    tensor.file.write_bytes(raw[: tensor.offset] + values.tobytes() + raw[tensor.offset + tensor.nbytes :])
    for box, finite in ((np.s_[0:9, 10:18], False), (np.s_[0:9, 18:30], True), (np.s_[4:5, 0:17], True)):
        out = np.empty([s.stop - s.start for s in box], values.dtype)
        assert read_box(tensor, box, out) == finite


def test_a_file_that_shrinks_is_a_clean_error(tmp_path):
    tensor, _ = stored(tmp_path, np.random.default_rng(0), (64, 64), "F32")
    out = np.empty((64, 64), np.float32)
    part = (tensor, np.s_[0:64, 0:64], out)
    with OpenFiles() as files:
        assert not read_boxes([part], files)
        tensor.file.write_bytes(tensor.file.read_bytes()[: tensor.offset + 64 * 32 * 4])
        with pytest.raises(CheckpointError, match=r"ended inside a\.tensor: it changed while being read"):
            read_boxes([part], files)


def test_iterating_gives_every_value_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS", 50)
    tensor, values = stored(tmp_path, np.random.default_rng(0), (7, 31), "BF16")
    found = list(iter_float32(tensor))
    assert [len(part) for part in found] == [50, 50, 50, 50, 17]
    assert all(part.dtype == jnp.float32 for part in found)
    np.testing.assert_array_equal(np.concatenate(found), values.ravel().astype(np.float32))

"""Files that are missing, cut, garbled or changed at random: one clear error each, and nothing else."""

import json
import shutil
import signal
import tracemalloc

import numpy as np
import pytest
from checkpoint_cases import EXPECTED, error_of, shards_of
from support.slow import some

from qwen_moe_jax.checkpoint.reader import checkpoint_dtype, read_parameters
from qwen_moe_jax.errors import CheckpointError, CheckpointNotFoundError

INDEX = "model.safetensors.index.json"


def test_missing_folder_and_missing_weights_are_not_found(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere does not exist"):
        read_parameters(tmp_path / "nowhere", EXPECTED)
    with pytest.raises(CheckpointNotFoundError, match=r"holds no weights; expected model\.safetensors"):
        read_parameters(tmp_path, EXPECTED)
    with pytest.raises(CheckpointNotFoundError):
        checkpoint_dtype(tmp_path)


def test_every_missing_shard_is_named(sharded):
    gone = [shards_of(sharded)[0], shards_of(sharded)[2]]
    for shard in gone:
        shard.unlink()
    with pytest.raises(CheckpointNotFoundError) as caught:
        read_parameters(sharded, EXPECTED)
    assert all(shard.name in str(caught.value) for shard in gone)


def test_shards_without_their_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    message = error_of(sharded)
    assert shards_of(sharded)[0].name in message
    assert INDEX in message


def test_a_second_set_of_weights_beside_the_index_is_refused(sharded):
    shutil.copy(shards_of(sharded)[0], sharded / "model.safetensors")
    assert "holds both model.safetensors and an index" in error_of(sharded)


def test_index_and_shards_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    first, second = (shard.name for shard in shards_of(sharded)[:2])
    moved = next(key for key, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][moved] = second
    (sharded / INDEX).write_text(json.dumps(index))
    message = error_of(sharded)
    assert f"{second} lacks {moved}" in message
    assert f"{first} holds {moved}" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_damaged_index_is_named(content, sharded):
    (sharded / INDEX).write_text(content)
    assert f"{INDEX} is damaged" in error_of(sharded)


def test_index_that_leaves_the_folder_is_refused(sharded):
    (sharded / INDEX).write_text('{"weight_map": {"model.norm.weight": "../other.safetensors"}}')
    assert "names ../other.safetensors" in error_of(sharded)


def test_truncated_shards_are_all_named(sharded):
    cut = shards_of(sharded)[:2]
    for shard in cut:
        shard.write_bytes(shard.read_bytes()[:-5])
    message = error_of(sharded)
    assert all(f"{shard.name} is truncated: its header describes" in message for shard in cut)


def test_trailing_bytes_are_refused(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"123")
    assert "has 3 bytes more than" in error_of(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is truncated or not a safetensors file"),
        (b"\x10\0\0", "is truncated or not a safetensors file"),
        (b"PK\x03\x04" * 20, "is a zip archive"),
        (b"\x80\x02}q\x00." * 20, "is a Python pickle"),
        (b"\x00\xe1\xf5\x05" + bytes(60), "is truncated or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x08" + b"\0" * 7 + b"\xff" * 8, "garbled safetensors header"),
        (b"\x02" + b"\0" * 7 + b"[]", "garbled safetensors header"),
    ],
)
def test_garbage_in_place_of_a_file_is_named(content, said, folder):
    (folder / "model.safetensors").write_bytes(content)
    message = error_of(folder)
    assert said in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        7,
    ],
)
def test_headers_that_contradict_themselves_are_garbled(entry, tmp_path):
    header = json.dumps({"model.norm.weight": entry}).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(file)
    assert "garbled safetensors header" in error_of(tmp_path)


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"model.norm.weight": {entry}, "model.norm.weight": {entry}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "holds model.norm.weight twice" in error_of(tmp_path)


def test_a_doubled_tensor_among_very_many_is_found_at_once(tmp_path):
    """As many as the 397B has with one matrix an expert: time in proportion to their number."""
    entries = [f'"t{i}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for i in range(100_000)]
    header = ("{" + ", ".join([*entries, entries[-1]]) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "holds t99999 twice" in error_of(tmp_path)


def test_a_key_that_the_index_has_twice_is_named(sharded):
    text = (sharded / INDEX).read_text()
    first = next(iter(json.loads(text)["weight_map"].items()))
    entry = f"{json.dumps(first[0])}: {json.dumps(first[1])}"
    assert entry in text
    (sharded / INDEX).write_text(text.replace(entry, f"{entry}, {entry}"))
    assert f"names {first[0]} twice" in error_of(sharded)


def test_pickles_in_place_of_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "only pytorch_model.bin, which are not read" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a\\b", "C:x", "a\0b", "x" * 300, 7])
def test_names_that_are_no_files_of_the_folder_are_refused(name, sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "expected files in the same folder" in error_of(sharded)


# Damage at random

FUZZ_CASES = 2400
# An error must not take long or much: an honest read of these files takes 30 ms and 1 MB.
SECONDS = 5
PEAK_BYTES = 64 << 20

ODD = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    2**200,
    1e300,
    0.5,
    "",
    "F32",
    "BF16",
    "\ud800",
    "a/b",
    [],
    [0],
    {},
    [[]],
)


def _places(value, path=()):
    """Every path into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _changed(value, rng):
    """A JSON value with one thing changed, removed, doubled or put in another's place."""
    value = json.loads(json.dumps(value))
    places = [path for path in _places(value) if path]
    path = places[rng.integers(len(places))]
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    odd = ODD[rng.integers(len(ODD))]
    kind = rng.integers(5)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(odd)] = parent[path[-1]]
    elif kind == 2 and isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), odd)
    elif kind == 3 and type(parent[path[-1]]) is int:
        parent[path[-1]] += int(rng.integers(-64, 65))
    else:
        parent[path[-1]] = odd
    return value


def _garbled(raw, rng):
    """Bytes with a few changed, cut off, doubled or put in."""
    raw, kind = bytearray(raw), rng.integers(4)
    at = int(rng.integers(len(raw)))
    if kind == 0:
        for place in rng.integers(len(raw), size=rng.integers(1, 9)):
            raw[place] = rng.integers(256)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        del raw[at : at + int(rng.integers(1, 200))]
    else:
        raw[at:at] = rng.integers(256, size=rng.integers(1, 200), dtype=np.uint8).tobytes()
    return bytes(raw)


def _damaged(raw, rng):
    """A safetensors file with a change in its length, its header as text, as JSON, or anywhere."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    kind = rng.integers(5)
    if kind == 0:
        lengths = (0, 1, length - 1, length + 1, len(raw), 99_999_999, 2**40, 2**64 - 1)
        new = lengths[rng.integers(len(lengths))]
        return new.to_bytes(8, "little") + header + data
    if kind == 1:
        return _garbled(raw, rng)
    if kind == 2:
        header = _garbled(header, rng)
    elif kind == 3:
        depth = int(rng.integers(1, 100_000))
        header = b"[" * depth if rng.integers(2) else b'{"a":' * depth
    else:
        header = json.dumps(_changed(json.loads(header), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data


def _expected_or_refused(folder, original):
    """Reads: either an error of ours in printable text, or the very parameters (the change was harmless)."""
    try:
        found, _ = read_parameters(folder, EXPECTED)
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert len(message) < 10_000
        return True
    assert found.keys() == original.keys()
    return False


@pytest.mark.parametrize("part", some(range(4), lambda i: i == 0))
def test_random_damage_is_a_clean_error(part, sharded):
    rng = np.random.default_rng(part)
    original, _ = read_parameters(sharded, EXPECTED)
    files = [sharded / INDEX, *shards_of(sharded)]
    refused = 0

    def too_long(*_):
        raise TimeoutError("reading a damaged checkpoint hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    tracemalloc.start()
    try:
        for _ in range(FUZZ_CASES // 4):
            file = files[0] if rng.integers(3) == 0 else files[rng.integers(1, len(files))]
            raw = file.read_bytes()
            if file.suffix == ".json" and rng.integers(2):
                broken = json.dumps(_changed(json.loads(raw), rng)).encode()
            else:
                broken = _garbled(raw, rng) if file.suffix == ".json" else _damaged(raw, rng)
            file.write_bytes(broken)
            tracemalloc.reset_peak()
            signal.alarm(SECONDS)
            refused += _expected_or_refused(sharded, original)
            signal.alarm(0)
            assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
            file.write_bytes(raw)
    finally:
        signal.alarm(0)
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, before)
    # Some changes only touch values or metadata; most must be seen.
    assert refused > FUZZ_CASES // 4 * 0.6

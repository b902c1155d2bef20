"""File to file into the Orbax layout: what is stored stays as it is, and a killed conversion goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_cases import TIED_SEED, UNTIED_SEED, config_of, edit, expected_of, fuse_experts, reference
from support.slow import some

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.checkpoint import convert
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.inspect import inspect_checkpoint
from qwen_moe_jax.checkpoint.orbax import read_orbax, stored_arrays
from qwen_moe_jax.checkpoint.reader import read_parameters
from qwen_moe_jax.errors import CheckpointError, InputError

CONFIG = config_of(UNTIED_SEED)

# Dies by SIGKILL before the N-th event of a kind that touches the destination.
KILLED = """
import os, signal, sys
source, destination, event, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
import orbax.checkpoint

def hook(name, arguments):
    global count
    where = source if event == "open" else destination
    if name == event and str(arguments[0]).startswith(where):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
convert_checkpoint(source, destination)
print("finished")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Per-expert bfloat16 matrices beside float32 vectors, in several files; not to be changed."""
    folder = tmp_path_factory.mktemp("source")
    model = reference(UNTIED_SEED, "bfloat16")
    model.save_pretrained(folder)
    edit(folder, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items() if v.ndim == 1}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Without an interruption; not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "new"
    convert_checkpoint(source, folder)
    return folder


def arrays_of(folder):
    """Every file of every array, by its place."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "orbax").glob("*/*.*/*")
        if path.is_file()
    }


def finished_groups(folder):
    return {
        path.name
        for path in (folder / "orbax.part").glob("*")
        if path.is_dir() and ".saving" not in path.name
    }


def stamps(folder, groups):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for group in groups
        for path in (folder / group).rglob("*")
    }


def assert_equals_source(folder, source, config):
    stored = stored_arrays(folder)
    expected = expected_of(config)
    truth, report = read_parameters(source, expected)
    assert {name: array.dtype for name, array in stored.items()} == report.dtypes
    read = read_orbax(folder, expected)
    assert list(read) == list(truth)
    for name, value in truth.items():
        np.testing.assert_array_equal(np.asarray(read[name]), np.asarray(value), name)


def test_values_and_dtypes_are_those_of_the_source(source, converted):
    assert_equals_source(converted, source, CONFIG)
    dtypes = {array.dtype.name for array in stored_arrays(converted).values()}
    assert dtypes == {"bfloat16", "float32"}
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"
    assert (converted / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in converted.iterdir() if path.suffix != ".json") == ["orbax"]


@pytest.mark.parametrize("seed", [UNTIED_SEED, TIED_SEED])
def test_fused_experts_and_tied_embeddings(seed, tmp_path):
    reference(seed).save_pretrained(tmp_path / "source")
    edit(tmp_path / "source", fuse_experts)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "new")
    config = config_of(seed)
    assert_equals_source(tmp_path / "new", tmp_path / "source", config)
    assert report.written_bytes == sum(array.size * 4 for array in stored_arrays(tmp_path / "new").values())
    assert report.kept_bytes == 0


# Of 12 renames the first names the manifest, then come two a group: Orbax' own, and the one after it is on
# the disk; the last makes the checkpoint whole.
@pytest.mark.parametrize(
    ("event", "count", "groups"),
    some(
        [
            ("os.rename", 1, 0),
            ("os.rename", 2, 0),
            ("os.rename", 7, 2),
            ("os.mkdir", 5, None),
            ("open", 30, None),
            ("os.rename", 12, 5),
        ],
        lambda i: i in (0, 2),
    ),
)
def test_a_killed_conversion_is_refused_and_goes_on(event, count, groups, source, converted, tmp_path):
    assert CONFIG.num_hidden_layers == 2
    destination = tmp_path / "new"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, source, destination, event, str(count)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr
    sentence = (
        rf"^{destination} is an unfinished conversion; run `qwen-moe-jax convert {source} {destination}` "
        r"again to finish it\.$"
        if (event, count) != ("os.rename", 1)
        else r"interrupted save .* save or convert it again"
    )
    for open_ in (QwenMoe.from_pretrained, inspect_checkpoint, stored_arrays):
        with pytest.raises(CheckpointError, match=sentence):
            open_(destination)

    finished = finished_groups(destination)
    if groups is None:
        assert 0 < len(finished) < 5
    else:
        assert len(finished) == groups
    before = stamps(destination / "orbax.part", finished)
    report = convert_checkpoint(source, destination)
    assert stamps(destination / "orbax", finished) == before, "what was finished is not written again"
    kept = sum(
        array.size * array.dtype.itemsize
        for name, array in stored_arrays(destination).items()
        if any(name.startswith(f"{group}.") for group in finished)
    )
    assert report.kept_bytes == kept
    assert arrays_of(destination) == arrays_of(converted)
    assert (destination / "config.json").read_bytes() == (converted / "config.json").read_bytes()
    assert sorted(path.name for path in (destination / "orbax").iterdir()) == sorted(
        path.name for path in (converted / "orbax").iterdir()
    )


@pytest.fixture
def begun(source, tmp_path, monkeypatch):
    """A copy of the source, and a conversion of it that ended after two groups."""
    copy = shutil.copytree(source, tmp_path / "copy")
    written = []

    def fail(part, group, *rest):
        if len(written) == 2:
            raise OSError("disk full")
        written.append(group)
        write_group(part, group, *rest)

    write_group = convert.write_group
    with monkeypatch.context() as patched:
        patched.setattr(convert, "write_group", fail)
        with pytest.raises(OSError, match="disk full"):
            convert_checkpoint(copy, tmp_path / "new")
    assert finished_groups(tmp_path / "new") == set(written)
    return copy, tmp_path / "new"


def test_another_training_of_the_same_model_is_refused(begun):
    copy, destination = begun
    edit(copy, lambda tensors: tensors["model.norm.weight"].add_(1))  # names, shapes and sizes stay
    with pytest.raises(
        CheckpointError, match=r"unfinished conversion of .* differs in model\.safetensors; give"
    ):
        convert_checkpoint(copy, destination)


def test_another_configuration_is_refused(begun):
    copy, destination = begun
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError, match=r"differs in config\.json; give"):
        convert_checkpoint(copy, destination)


def test_a_source_that_was_moved_is_the_same(begun, converted, tmp_path):
    copy, destination = begun
    convert_checkpoint(copy.rename(tmp_path / "moved"), destination)
    assert arrays_of(destination) == arrays_of(converted)


def test_a_destination_that_holds_something_is_refused(source, converted, tmp_path):
    with pytest.raises(InputError, match="Orbax layout already; give a new folder"):
        convert_checkpoint(source, converted)
    (tmp_path / "note").write_text("")
    with pytest.raises(InputError, match="not an empty folder"):
        convert_checkpoint(source, tmp_path)


def test_a_source_in_orbax_layout_is_refused(converted, tmp_path):
    with pytest.raises(CheckpointError, match="in Orbax layout already; give a Hugging Face checkpoint"):
        convert_checkpoint(converted, tmp_path / "new")


def test_nan_weights_are_refused(folder, tmp_path):
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in model\.norm\.weight"):
        convert_checkpoint(folder, tmp_path / "new")


def test_progress_shows_bytes_and_their_rate(source, tmp_path, capsys):
    convert_checkpoint(source, tmp_path / "new", progress=True)
    shown = capsys.readouterr().err
    assert "Converting" in shown
    assert "B/s" in shown
    assert "100%" in shown

"""The selftest: it notices what is wrong, says so, and nothing that goes wrong keeps it from the rest."""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.problems import load, reference_generate
from support.rocm import rocm  # noqa: F401
from support.slow import some

from qwen_moe_jax.aot import toolchain
from qwen_moe_jax.devices import find_device
from qwen_moe_jax.errors import CheckpointNotFoundError, InputError
from qwen_moe_jax.kernels.table import TARGETS, Kernels, make_kernels
from qwen_moe_jax.selftest import SelftestReport, add_command, kernel_checks, parity, selftest, selftest_parts
from qwen_moe_jax.selftest.expectations import find_expectations, make_expectations
from qwen_moe_jax.selftest.models import PLAIN, Models
from qwen_moe_jax.selftest.report import Outcome, Skip, run_parts

ABACUS = Path(__file__).resolve().parents[1] / "checkpoints" / "abacus"
NAMES = [name for name, _ in selftest_parts(ABACUS)]
# The reference's logits against ours, both float32, and as stored to 5 digits behind the point.
STORED_TOLERANCE = 5e-5


def only(*kept: str) -> list[str]:
    """What to skip so that these parts run."""
    return [name for name in NAMES if name not in kept]


def command(*arguments: str) -> int:
    """Runs the command as `cli.main` does, without its handling of errors."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), argparse.ArgumentParser(add_help=False))
    options = parser.parse_args(["selftest", *arguments])
    return options.run(options)


# The report


def fail() -> Outcome:
    raise RuntimeError("first line\nsecond line")


def skip() -> Outcome:
    raise Skip("there is no moon")


def test_a_part_that_raises_is_failed_with_its_sentence_and_the_others_run():
    report = run_parts(
        [("one", fail), ("two", skip), ("three", partial(Outcome, summary="well"))], checkpoint="x"
    )
    assert [part.status for part in report.parts] == ["failed", "skipped", "ok"]
    assert [part.summary for part in report.parts] == ["RuntimeError: first line", "there is no moon", "well"]
    assert "in fail" in report.part("one").details["traceback"]
    assert not report.ok
    assert "FAILED: 1 ok, 1 skipped, 1 failed" in str(report)


def test_an_error_of_the_users_is_shown_as_it_is():
    def refuse() -> Outcome:
        raise InputError("that is 3; expected 4.")

    assert run_parts([("one", refuse)], checkpoint="x").part("one").summary == "that is 3; expected 4."


def test_a_report_survives_json_with_numbers_that_json_does_not_have():
    details = {"a": np.float32("nan"), "b": [np.int64(3), -np.inf], "c": np.arange(2), "d": {"e": None}}
    report = run_parts([("one", lambda: Outcome(summary="s", details=details))], checkpoint="x")
    text = report.to_json()
    assert SelftestReport.from_json(text) == report
    assert json.loads(text, parse_constant=pytest.fail)["ok"] is True
    assert report.part("one").details == {"a": "nan", "b": [3, "-inf"], "c": [0, 1], "d": {"e": None}}
    with pytest.raises(ValueError, match="no selftest report"):
        SelftestReport.from_json("{}")


def test_a_process_that_dies_leaves_behind_which_part_was_running(tmp_path):
    file = tmp_path / "report.json"

    def die() -> Outcome:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_parts([("one", partial(Outcome, summary="well")), ("two", die)], checkpoint="x", output=file)
    left = SelftestReport.from_json(file.read_text())
    assert [(part.name, part.status) for part in left.parts] == [("one", "ok"), ("two", "unfinished")]
    assert not left.ok


def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        run_parts([("one", pytest.fail)], checkpoint="x", output=tmp_path / "nowhere" / "report.json")


def test_the_json_says_what_ran_where(tmp_path):
    file = tmp_path / "report.json"
    report = selftest(ABACUS, output=file, skip=only("versions", "devices", "table"))
    found = json.loads(file.read_text())
    assert SelftestReport.from_json(file.read_text()) == report
    assert (found["ok"], found["checkpoint"]) == (True, "abacus")
    assert [part["name"] for part in found["parts"]] == NAMES
    details = {part["name"]: part["details"] for part in found["parts"]}
    packages = details["versions"]["packages"]
    assert packages["jax"] == jax.__version__
    assert {"jaxlib", "qwen-moe-jax", "flax", "numpy"} <= set(packages)
    assert {"python", "system", "backend", "backend_version", "environment"} <= set(details["versions"])
    assert len(details["devices"]["devices"]) == jax.device_count()
    assert {"kind", "compute_capability", "memory"} <= set(details["devices"]["devices"][0])
    assert (details["table"]["target"], details["table"]["kernels"]) == ("cpu", "interpreted")
    assert details["table"]["bfloat16"] == make_kernels("cpu").lines("bfloat16")
    assert all(part["summary"] == "asked for" for part in found["parts"] if part["status"] == "skipped")


# The command


def test_the_status_is_0_where_all_is_well_and_1_where_it_is_not(tmp_path, capsys, monkeypatch):
    well = [f"--skip={name}" for name in only("versions")]
    file = tmp_path / "report.json"
    assert command(str(ABACUS), "--json", str(file), *well) == 0
    assert "passed: 1 ok" in capsys.readouterr().out
    assert json.loads(file.read_text())["ok"] is True
    monkeypatch.setattr(
        kernel_checks.delta_kernel, "delta_step", _wrong(kernel_checks.delta_kernel.delta_step)
    )
    assert command(str(ABACUS), *[f"--skip={name}" for name in only("kernel delta step")]) == 1
    assert "kernel delta step" in capsys.readouterr().out


def test_mistakes_are_errors_of_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="abacus does not exist"):
        command()
    with pytest.raises(InputError, match="skip names 'everything'; parts are versions, devices"):
        command(str(ABACUS), "--skip=everything")


# Kernels


def _wrong(function):
    """The same 5 % too large."""

    def wrong(*args, **options):
        return jax.tree.map(lambda x: x * jnp.asarray(1.05, x.dtype), function(*args, **options))

    return wrong


BREAKABLE = {
    "delta step": (kernel_checks.delta_kernel, "delta_step", kernel_checks.delta_step),
    "delta chunks": (kernel_checks.chunks_kernel, "delta_chunks", kernel_checks.delta_chunks),
    "flash attention": (kernel_checks.flash_attention, "attend", kernel_checks.attention),
    "scaled products": (kernel_checks.scaled_matmul, "scaled_matmul", kernel_checks.scaled),
    "gathered": (
        kernel_checks.expert_kernels,
        "gathered_kernels",
        partial(kernel_checks.experts, "gathered"),
    ),
}


@pytest.mark.parametrize("kernel", some(BREAKABLE, lambda i: i == 0))
def test_a_kernel_that_is_a_little_wrong_is_failed(kernel, monkeypatch):
    module, name, check = BREAKABLE[kernel]
    monkeypatch.setattr(module, name, _wrong(getattr(module, name)))
    outcome = check("cpu")
    assert not outcome.ok
    bad = [case for case in outcome.details["cases"] if not case["ok"]]
    assert all(case["difference"] > case["tolerance"] for case in bad)
    assert bad[0]["case"] in outcome.summary


def test_a_case_that_does_not_compile_or_is_nan_fails_and_the_others_are_compared():
    def refuse():
        raise RuntimeError("out of resource: shared memory")

    one = np.ones(2)
    cases = [
        kernel_checks.Case("first", refuse, 1e-3),
        kernel_checks.Case("second", lambda: (one * np.nan, one, 1.0), 1e-3),
        kernel_checks.Case("third", lambda: (one, one, 1.0), 1e-3),
    ]
    outcome = kernel_checks.compare(cases, "compiled")
    assert [case["ok"] for case in outcome.details["cases"]] == [False, False, True]
    assert "1 of 3 cases agree" in outcome.summary
    assert "first: RuntimeError: out of resource: shared memory" in outcome.summary


@pytest.mark.parametrize("target", TARGETS)
def test_the_tables_way_to_widen_float8_is_among_those_checked(target):
    plain, in_kernels = kernel_checks.WIDENINGS[target]
    assert Kernels(target).widening in plain
    assert Kernels(target).kernel_widening in in_kernels


@pytest.mark.slow
@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize("device", ["mi300x", "mi355x"])
def test_every_case_compiles_for_the_devices_that_it_is_meant_for(device, monkeypatch):
    described = find_device(device)
    sharding = jax.sharding.SingleDeviceSharding(toolchain.topology(described)[0])

    def compiled_only(function, *arguments):
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        jax.jit(function).lower(*structs).compile()
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))

    monkeypatch.setattr(kernel_checks, "on_device", compiled_only)
    checks = [partial(kernel_checks.experts, form) for form in ("gathered", "grouped")]
    checks += [kernel_checks.attention, kernel_checks.scaled]
    checks += [kernel_checks.delta_step, kernel_checks.delta_chunks]
    cases = [case for check in checks for case in check(described.arch).details["cases"]]
    assert len(cases) >= 30
    assert [case for case in cases if "error" in case] == []


# The model

VOCABULARY = 50


class Answers:
    """A model that says what it is told to."""

    def __init__(self, tokens: list[list[int]], logits: np.ndarray):
        self.tokens, self.values = tokens, logits

    def generate(self, rows, **options):
        return SimpleNamespace(sequences=self.tokens)

    def logits(self, rows):
        return self.values


def compared(change) -> Outcome:
    """Of two models that say the same, one of which is changed: `change(its tokens, its logits, others')`."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, 6).tolist() for _ in range(4)]
    wanted = rng.normal(size=(4, 16, VOCABULARY)).astype(np.float32)
    tokens = [row[5:-1].argmax(axis=-1).tolist() for row in wanted]
    ours, found = [list(row) for row in tokens], wanted.copy()
    change(ours, found, wanted)
    sides = {PLAIN: Answers(tokens, wanted), "table": Answers(ours, found)}
    models: Any = SimpleNamespace(
        prompts=prompts, new_tokens=10, plain="xla", load=lambda dtype, which: sides[which]
    )
    return parity.against_plain(models, "bfloat16")


def test_the_same_answers_pass():
    outcome = compared(lambda ours, found, wanted: None)
    assert outcome.ok
    assert outcome.details["same"] == 4
    assert outcome.details["overall_difference"] == 0


@pytest.mark.parametrize("gap", [0.01, 0.5])
def test_another_token_passes_where_the_two_are_as_good_as_equal_only(gap):
    def change(ours, found, wanted):
        other = int(np.argsort(wanted[2, 8])[-2])
        wanted[2, 8, other] = wanted[2, 8, ours[2][3]] - gap
        found[2, 8, other] = wanted[2, 8, other]
        ours[2][3:] = [other, 1, 2, 3]

    outcome = compared(change)
    assert outcome.ok == (gap < 0.1)
    assert (outcome.details["same"], outcome.details["ties"]) == (3, int(outcome.ok))
    assert "and 1 up to a tie" in outcome.summary or not outcome.ok


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ours, found, wanted: found.__setitem__((1, 3), 0),  # one position of 63
        lambda ours, found, wanted: found.__setitem__((0, 2, 7), np.nan),
        lambda ours, found, wanted: found.__imul__(1.03),  # all of them, a little
        lambda ours, found, wanted: ours[3].pop(),  # did not end where it should
    ],
    ids=["a position", "a NaN", "a little everywhere", "a token less"],
)
def test_what_is_wrong_does_not_pass(spoil):
    assert not compared(spoil).ok


def test_what_is_stored_is_what_the_reference_says():
    stored, _ = find_expectations(ABACUS)
    assert stored is not None
    reference = load(ABACUS)
    assert reference_generate(reference, [row.prompt for row in stored.rows]) == [
        list(row.tokens) for row in stored.rows
    ]
    for row in stored.rows[:3]:
        with torch.no_grad():
            logits = reference(torch.tensor([[*row.prompt, *row.tokens]])).logits[0].numpy()
        for position in row.positions:
            np.testing.assert_allclose(
                logits[position.index, list(position.ids)], position.logits, rtol=0, atol=STORED_TOLERANCE
            )


@pytest.mark.parametrize("other", ["one bit", "longer", "no file"])
def test_another_checkpoint_skips_what_is_stored_and_says_so(other, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(ABACUS, folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    if other == "no file":
        weights.unlink()
    else:
        weights.write_bytes(data + b"x" * (other == "longer"))
    models = Models(folder, "cpu")
    report = run_parts([("stored", partial(parity.against_stored, models, "float32"))], checkpoint="other")
    assert report.ok
    assert report.part("stored").status == "skipped"
    assert report.part("stored").summary.startswith("nothing is stored of ")
    assert "(stored are: abacus)" in report.part("stored").summary
    assert len(models.prompts) == 8
    assert max(map(max, models.prompts)) < models.config.vocab_size


@pytest.mark.slow
def test_all_of_it_passes_on_this_machine(tmp_path):
    report = selftest(ABACUS, output=tmp_path / "report.json")
    assert report.ok, str(report)
    assert SelftestReport.from_json((tmp_path / "report.json").read_text()) == report
    # on a CPU that pretends to have 8 devices, nothing has a reason to be skipped
    assert {part.status for part in report.parts} == {"ok"}
    assert report.part("kernel gathered experts").details["kernels"] == "interpreted"
    assert report.part("decode, batch 8").details["tokens_per_second"] > 0


@pytest.mark.slow
def test_what_is_stored_can_be_made_anew():
    stored, _ = find_expectations(ABACUS)
    made = make_expectations(ABACUS)
    assert stored is not None
    assert [row.tokens for row in made.rows] == [row.tokens for row in stored.rows]
    for ours, theirs in zip(made.rows, stored.rows, strict=True):
        for a, b in zip(ours.positions, theirs.positions, strict=True):
            assert a.ids == b.ids
            np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=STORED_TOLERANCE)

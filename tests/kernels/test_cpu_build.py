"""The C++ kernels are built once, and a machine that cannot build them goes on without."""

import os
import platform
import shutil
import subprocess
import sys
import tomllib
import warnings
from fnmatch import fnmatch
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.cpu import build
from qwen_moe_jax.kernels.cpu.build import VARIANTS, BuildError, best_variant
from qwen_moe_jax.kernels.table import Kernels, make_kernels

if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
ABACUS = ROOT / "checkpoints" / "abacus"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.native_variant.cache_clear()
    build.load.cache_clear()
    yield tmp_path
    build.native_variant.cache_clear()
    build.load.cache_clear()


def fake_compiler(folder: Path, says: str, status: int) -> Path:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {status}\n")
    script.chmod(0o755)
    return script


@pytest.mark.slow
def test_the_first_use_builds_with_a_message_and_the_second_does_not(fresh, capsys):
    file = build.build("plain")
    assert "building CPU kernels (plain), once" in capsys.readouterr().err
    written = file.stat().st_mtime_ns
    assert build.build("plain") == file
    assert file.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert file.is_relative_to(fresh)


def test_what_decides_a_library_decides_its_name(fresh, monkeypatch, tmp_path):
    compiler = build._compiler()
    names = {build._digest(compiler, ()), build._digest(compiler, ("-O1",))}
    monkeypatch.setattr(build, "processor_features", lambda: frozenset({"something else"}))
    names.add(build._digest(compiler, ()))
    sources = tmp_path / "sources"
    shutil.copytree(build._SOURCES, sources)
    (sources / "simd.h").write_text("// other\n")
    monkeypatch.setattr(build, "_SOURCES", sources)
    names.add(build._digest(compiler, ()))
    names.add(build._digest(str(fake_compiler(tmp_path, "", 0)), ()))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("says", "words"), [("simd.h:3: error: no such thing", "no such thing"), ("", "failed")]
)
def test_a_failed_build_is_one_warning_and_plain_xla(fresh, monkeypatch, tmp_path, says, words):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, says, 1)))
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert make_kernels("cpu") == Kernels("cpu")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_kernels("cpu") == Kernels("cpu")
    assert not list(fresh.glob("**/*.so"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_a_compiler_a_model_runs_on_plain_xla(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    model = QwenMoe.from_pretrained(ABACUS)
    assert model.kernels == Kernels("cpu")
    lines = str(model.describe())
    assert "none, plain XLA only" in lines
    assert "held in float32" in lines
    ids = np.arange(3, 40)[None]
    assert np.isfinite(np.asarray(model.logits(ids))).all()
    with pytest.raises(InputError, match="none could be built here"):
        make_kernels("cpu", {"linear": "native"})


def test_a_compiler_that_is_not_there_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX names no-such-compiler"):
        build.build("plain")


def test_an_unknown_variant_and_one_that_the_processor_lacks_are_refused(monkeypatch):
    with pytest.raises(InputError, match="have no variant 'sse9'"):
        build.load("sse9")
    monkeypatch.setattr(build, "processor_features", lambda: frozenset({"sse2"}))
    with pytest.raises(BuildError, match="this processor lacks avx2, f16c, fma"):
        build.load.__wrapped__("avx2")


@pytest.mark.parametrize(
    ("vendor", "without", "best"),
    [
        ("GenuineIntel", (), "amx"),
        ("GenuineIntel", ("amx_tile",), "avx512"),
        ("AuthenticAMD", ("amx_tile",), "avx512bf16"),
        ("AuthenticAMD", ("amx_tile", "avx512_bf16"), "avx512"),
        ("AuthenticAMD", ("amx_tile", "avx512_bf16", "avx512f"), "avx2"),
        ("", ("amx_tile", "avx512_bf16", "avx512f", "fma"), "plain"),
    ],
)
def test_the_processor_decides_the_variant(monkeypatch, vendor, without, best):
    everything = {flag for flags in VARIANTS.values() for flag in flags}
    monkeypatch.setattr(build, "processor_features", lambda: frozenset(everything - set(without)))
    monkeypatch.setattr(build, "processor_says", lambda field: vendor)
    assert best_variant() == best


def test_describe_says_which_kernels_run():
    model = QwenMoe.from_pretrained(ABACUS)
    lines = str(model.describe())
    assert f"{best_variant()} variant" in lines
    assert "  experts       native" in lines
    assert "held in bfloat16" in lines
    assert "  experts       gathered" in str(QwenMoe.from_pretrained(ABACUS, kernels="xla").describe())


def test_every_source_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["qwen_moe_jax.kernels.cpu"]
    sources = [f.name for f in build._SOURCES.iterdir() if f.suffix in (".h", ".cc")]
    assert len(sources) > 5
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in sources)


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path):
    # the C++ runtime beside it, or the sanitizer does not find what throws
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitized.py"))],
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(found.stdout.strip() for found in runtimes),
            # the interpreter and XLA keep what they have until they end
            "ASAN_OPTIONS": "detect_leaks=0",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{best_variant()}: clean" in done.stdout


@pytest.mark.slow
def test_the_sources_compile_for_arm_and_by_clang_where_those_are_here(tmp_path):
    tried = 0
    for compiler in ("aarch64-linux-gnu-g++", "clang++"):
        if shutil.which(compiler) is None:
            continue
        tried += 1
        command = [compiler, "-std=c++17", "-fPIC", "-shared", "-O2", "-Wno-psabi"]
        command += ["-isystem", build.jax.ffi.include_dir(), str(build._SOURCES / "handlers.cc")]
        subprocess.run([*command, "-o", str(tmp_path / compiler)], check=True)
    if not tried:
        pytest.skip("neither clang++ nor a cross compiler for Arm")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles_also_those_that_do_not_run_here(fresh, variant):
    assert build.build(variant).is_file()


def test_float64_activations_run_on_plain_xla():
    kernels = make_kernels("cpu")
    assert kernels.native is not None
    assert kernels.pick("linear", "float64", 1) == "products"
    assert kernels.pick("linear", jnp.dtype(jnp.bfloat16).name, 1) == "native"

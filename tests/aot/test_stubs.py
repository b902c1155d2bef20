"""Stand-ins for libraries that are missing, for a small plugin that is linked against them."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.rocm import CXX, HIP, RCCL, compile_library, make_libraries, make_plugin

from qwen_moe_jax.aot.stubs import Symbol, build_stubs, read_shared_object
from qwen_moe_jax.errors import ToolchainError

# Loads the libraries it is told of, then a plugin, and says what the plugin's functions return.
LOAD = """
import ctypes, json, sys
*libraries, path = sys.argv[1:]
kept = [ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL) for library in libraries]
plugin = ctypes.CDLL(path)
plugin.call_text.restype = ctypes.c_char_p
names = "call_init", "call_free", "call_version", "call_system", "has_optional"
found = {name: getattr(plugin, name)() for name in names}
found["call_text"] = plugin.call_text().decode()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    return make_plugin(folder / "plugin.so", make_libraries(folder / "libraries"))


def load(plugin: Path, libraries: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, *map(str, libraries), str(plugin)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_its_libraries_the_plugin_does_not_load(plugin: Path) -> None:
    done = load(plugin, [])
    assert done.returncode != 0
    assert f"{HIP}: cannot open shared object file" in done.stderr


def test_with_stubs_it_loads_and_all_they_do_is_fail(plugin: Path, tmp_path: Path) -> None:
    names = build_stubs(plugin, tmp_path)
    assert names == [HIP, RCCL] == sorted(path.name for path in tmp_path.iterdir())
    done = load(plugin, [tmp_path / name for name in names])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["call_init"] == found["call_free"] == found["call_version"] == 100
    assert "no ROCm" in found["call_text"]


def test_neither_weak_symbols_nor_the_systems_own_are_replaced(plugin: Path, tmp_path: Path) -> None:
    done = load(plugin, [tmp_path / name for name in build_stubs(plugin, tmp_path)])
    found = json.loads(done.stdout)
    assert found["has_optional"] == 0
    assert found["call_system"] == 1


def test_needed_libraries_and_versions_are_those_it_was_linked_with(plugin: Path) -> None:
    found = read_shared_object(plugin)
    assert [name for name in found.needed if name != "libc.so.6"] == [HIP, RCCL, CXX]
    assert found.foreign == [HIP, RCCL]
    assert found.search == ()
    for symbol in (
        Symbol("hipInit", "hip_4.2", HIP, weak=False),
        Symbol("hipFree", "hip_6.0", HIP, weak=False),
        Symbol("ncclGetVersion", "", "", weak=False),
        Symbol("__cxa_demangle", "", "", weak=False),
        Symbol("optional", "", "", weak=True),
    ):
        assert symbol in found.undefined


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_folders_that_a_plugin_searches_are_read(tags: str, tmp_path: Path) -> None:
    libraries = make_libraries(tmp_path / "libraries")
    options = [f"-Wl,{tags}", "-Wl,-rpath,$ORIGIN/../rocm/lib", "-Wl,-rpath,/opt/rocm/lib"]
    plugin = make_plugin(tmp_path / "plugin.so", libraries, *options)
    assert read_shared_object(plugin).search == (tmp_path / "../rocm/lib", Path("/opt/rocm/lib"))


def test_the_stubs_depend_on_nothing(plugin: Path, tmp_path: Path) -> None:
    for name in build_stubs(plugin, tmp_path):
        assert read_shared_object(tmp_path / name).needed == ()
        ctypes.CDLL(str(tmp_path / name))


def test_a_plugin_of_the_systems_libraries_alone_needs_no_stubs(tmp_path: Path) -> None:
    compile_library(tmp_path / "plain.so", "extern int getpid(void); int f(void) { return getpid(); }")
    assert build_stubs(tmp_path / "plain.so", tmp_path / "stubs") == []


@pytest.mark.parametrize("kept", [0, 3, 1000, 0.5])
def test_what_is_no_whole_shared_object_is_refused(plugin: Path, tmp_path: Path, kept: float) -> None:
    data = plugin.read_bytes()
    cut = tmp_path / "cut.so"
    cut.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ToolchainError, match=r"cut\.so is not a whole shared object for x86_64"):
        build_stubs(cut, tmp_path / "stubs")


def test_another_processors_shared_object_is_refused(plugin: Path, tmp_path: Path) -> None:
    data = bytearray(plugin.read_bytes())
    data[18] = 183  # e_machine: aarch64
    (tmp_path / "arm.so").write_bytes(data)
    with pytest.raises(ToolchainError, match=r"arm\.so is not a whole shared object for x86_64"):
        build_stubs(tmp_path / "arm.so", tmp_path / "stubs")


def test_a_compiler_that_fails_is_quoted(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc --no-such-option")
    with pytest.raises(
        ToolchainError, match=rf"'cc' could not compile a stand-in for {HIP}: .*no-such-option"
    ):
        build_stubs(plugin, tmp_path)

"""Fetching and loading the compiler: with a small plugin and a pip that serves it, then the real one."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.rocm import CXX, HIP, RCCL, make_libraries, make_plugin, make_wheel, rocm  # noqa: F401  a fixture
from support.slow import some

from qwen_moe_jax.aot import private_jax, toolchain
from qwen_moe_jax.devices import DEVICES, find_device
from qwen_moe_jax.errors import InputError, ToolchainError

REPOSITORY = Path(__file__).resolve().parents[2]

# A pip that takes its wheel from a folder, writes down that it was asked, and can be made slow, or to fail.
PIP = """
import os, pathlib, shutil, sys, time
wanted, destination = sys.argv[-1], pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
with open(os.environ["PIP_LOG"], "a") as log:
    print(wanted, file=log, flush=True)
if "PIP_FAILS" in os.environ:
    sys.exit(os.environ["PIP_FAILS"])
for wheel in pathlib.Path(os.environ["PIP_WHEELS"]).iterdir():
    data = wheel.read_bytes()
    with open(destination / wheel.name, "wb") as out:
        out.write(data[:100])
        out.flush()
        time.sleep(float(os.environ.get("PIP_SECONDS", "0")))
        out.write(data[100:])
"""

PREPARE = "from qwen_moe_jax.aot import toolchain; print(toolchain.prepare())"

# Loads the compiler, and tells what that changed for a program on the CPU.
LOAD = """
import ctypes, json, sys
import jax
from qwen_moe_jax.aot import private_jax, toolchain

def run():
    return [jax.default_backend(), list(map(str, jax.devices())), float(jax.jit(lambda x: 2 * x)(3.0))]

before = run() if "first" in sys.argv else None
toolchain.load()
toolchain.load()
mapped = sorted({line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line})
after = None if "installed" in sys.argv else run()
print(json.dumps({
    "before": before,
    "after": after,
    "loaded": private_jax.has_compiler("rocm"),
    "mapped": mapped,
    "visible": hasattr(ctypes.CDLL(None), "hipInit"),
}))
"""

CPU_ONLY = """
import json
import jax
import qwen_moe_jax, qwen_moe_jax.cli
value = float(jax.jit(lambda x: 2 * x)(3.0))
print(json.dumps([value, jax.default_backend(), open("/proc/self/maps").read().count("rocm")]))
"""

# jax's own plugin, as far as registering goes; with and without a GPU on the machine.
INSTALLED = """
import os
import jax._src.xla_bridge as bridge
def initialize():
    if "NO_GPU" in os.environ:
        raise ValueError("No AMD GPUs were found")
    bridge.register_plugin("rocm", priority=500, library_path={path!r}, options={{}})
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine with a pip of our own, and a cache folder that nothing is in.

    Attributes:
        root: of all that is on it.
        libraries: what a ROCm would have, where no loader looks.
        environment: for its processes.
    """

    root: Path
    libraries: Path
    environment: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.root / "cache" / "qwen_moe_jax" / "rocm" / jax.__version__

    @property
    def downloads(self) -> list[str]:
        log = self.root / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | environment,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> str:
        process = self.start(script, *arguments, **environment)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        return out.splitlines()[-1]

    def load(self, *arguments: str, **environment: str) -> dict[str, Any]:
        return json.loads(self.run(LOAD, *arguments, **environment))


def make_machine(root: Path, *options: str) -> Machine:
    """A machine whose pip serves a plugin that is linked with some options."""
    (root / "python" / "pip").mkdir(parents=True)
    (root / "python" / "pip" / "__init__.py").touch()
    (root / "python" / "pip" / "__main__.py").write_text(PIP, encoding="utf-8")
    libraries = make_libraries(root / "libraries")
    (libraries / CXX).rename(root / CXX)  # the system has its own
    (root / "link").mkdir()
    for path in [*libraries.glob("*.so*"), root / CXX]:
        (root / "link" / path.name).symlink_to(path)
    make_wheel(root / "wheels", make_plugin(root / "plugin.so", root / "link", *options))
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment = kept | {
        "PYTHONPATH": f"{root / 'python'}:{REPOSITORY}",
        "XDG_CACHE_HOME": str(root / "cache"),
        "PIP_LOG": str(root / "pip.log"),
        "PIP_WHEELS": str(root / "wheels"),
    }
    return Machine(root, libraries, environment)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_machine(tmp_path)


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This process made to run on the machine, where no other test has loaded the compiler."""
    monkeypatch.setattr(private_jax, "has_compiler", lambda platform: False)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    return machine


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = make_machine(tmp_path_factory.mktemp("prepared"))
    machine.run(PREPARE)
    return machine


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened")


@pytest.mark.parametrize("order", ["first", "later"])
def test_loading_changes_nothing_for_the_cpu(prepared: Machine, order: str) -> None:
    found = prepared.load(order)
    assert found["loaded"]
    assert found["after"] == ["cpu", ["cpu:0"], 6.0]
    assert found["before"] in (None, found["after"])


def test_stubs_are_loaded_and_no_other_library_sees_them(prepared: Machine) -> None:
    found = prepared.load()
    assert str(prepared.folder / "stubs" / HIP) in found["mapped"]
    assert not found["visible"]


def test_importing_the_package_loads_nothing_of_it(prepared: Machine) -> None:
    assert json.loads(prepared.run(CPU_ONLY)) == [6.0, "cpu", 0]


def test_a_real_rocm_is_used_instead_of_the_stubs(prepared: Machine) -> None:
    mapped = prepared.load(LD_LIBRARY_PATH=str(prepared.libraries))["mapped"]
    assert {str(prepared.libraries / name) for name in (HIP, RCCL)} <= set(mapped)
    assert not [path for path in mapped if "stubs" in path]


def test_a_real_rocm_that_only_the_plugin_knows_of_is_used_too(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, f"-Wl,-rpath,{tmp_path / 'libraries'}")
    machine.run(PREPARE)
    mapped = machine.load()["mapped"]
    assert {str(machine.libraries / name) for name in (HIP, RCCL)} <= set(mapped)
    assert not [path for path in mapped if "stubs" in path]


def test_a_rocm_that_is_not_whole_is_named_with_what_it_lacks(prepared: Machine, tmp_path: Path) -> None:
    (tmp_path / HIP).symlink_to(prepared.libraries / HIP)
    process = prepared.start(LOAD, LD_LIBRARY_PATH=str(tmp_path))
    error = process.communicate(timeout=120)[1].splitlines()[-1]
    assert f"ToolchainError: The compiler in {prepared.folder} cannot be loaded with the ROCm" in error
    assert f"{RCCL}: cannot open shared object file" in error


def test_a_plugin_that_jax_has_is_used_and_nothing_is_prepared(machine: Machine) -> None:
    package = machine.root / "python" / "jax_plugins" / "xla_rocm7"
    package.mkdir(parents=True)
    source = INSTALLED.format(path=str(machine.root / "plugin.so"))
    (package / "__init__.py").write_text(source, encoding="utf-8")
    found = machine.load("installed", LD_LIBRARY_PATH=str(machine.libraries))
    assert found["loaded"]
    assert str(machine.root / "plugin.so") in found["mapped"]
    assert not machine.folder.exists()

    # without a GPU it does not register, and the prepared one is loaded
    machine.run(PREPARE)
    found = machine.load(NO_GPU="1")
    assert found["loaded"]
    assert str(machine.folder / "xla_rocm_plugin.so") in found["mapped"]
    assert found["after"][0] == "cpu"


def test_only_the_first_call_downloads_and_it_asks_for_the_version_of_jax(here: Machine) -> None:
    assert toolchain.prepare() == here.folder == toolchain.default_folder()
    assert toolchain.prepare() == here.folder
    assert here.downloads == [f"jax-rocm7-pjrt=={jax.__version__}"]
    manifest = json.loads((here.folder / "toolchain.json").read_text())
    assert manifest["jax"] == jax.__version__
    assert [here.root / "wheels" / manifest["wheel"]] == list((here.root / "wheels").iterdir())
    assert manifest["stubs"] == [HIP, RCCL]
    assert (here.folder / "xla_rocm_plugin.so").read_bytes() == (here.root / "plugin.so").read_bytes()
    assert not list(here.folder.parent.glob("*.part*"))


def test_an_empty_folder_may_be_given(here: Machine) -> None:
    own = here.root / "own"
    own.mkdir()
    assert toolchain.prepare(own) == own
    assert (own / "xla_rocm_plugin.so").is_file()
    assert not here.folder.exists()


def test_of_two_calls_at_once_one_downloads(machine: Machine) -> None:
    processes = [machine.start(PREPARE, PIP_SECONDS="1") for _ in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert out.strip() == str(machine.folder), errors
    assert len(machine.downloads) == 1
    assert machine.load()["loaded"]


@pytest.mark.parametrize(
    "kill", some([os.kill, os.killpg], lambda i: i == 0), ids=["without_its_pip", "with_its_pip"]
)
def test_a_killed_call_leaves_nothing_that_loads_and_the_next_one_finishes(
    machine: Machine, kill: Callable[[int, int], None]
) -> None:
    process = machine.start(PREPARE, PIP_SECONDS="300")
    try:
        wait_for(lambda: [wheel for wheel in machine.root.glob("cache/**/*.whl") if wheel.stat().st_size])
        kill(process.pid, signal.SIGKILL)
        process.wait()
        refused = machine.start(LOAD).communicate(timeout=120)[1].splitlines()[-1]
        assert "ToolchainError: The compiler for AMD GPUs is not in" in refused
        machine.run(PREPARE)
        assert machine.load()["loaded"]
        assert not list(machine.folder.parent.glob("*.part*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("step", ["_download", "_unpack", "build_stubs", "_compiler_target", "_sync"])
def test_an_interrupt_at_any_step_leaves_nothing(
    here: Machine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toolchain, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            toolchain.prepare()
    assert [path.suffix for path in here.folder.parent.iterdir()] == [".lock"]
    with pytest.raises(ToolchainError, match="run `qwen-moe-jax toolchain`"):
        toolchain.load()
    toolchain.prepare()
    assert here.folder.is_dir()


def refusal(machine: Machine) -> str:
    """The sentence with which preparing ends, having left nothing."""
    with pytest.raises(ToolchainError) as caught:
        toolchain.prepare()
    assert not machine.folder.exists()
    assert not list(machine.root.glob("cache/**/*.part*"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_pip_it_says_how_to_get_it(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert "has no pip" in refusal(here)
    assert "ensurepip" in refusal(here)


def test_without_a_compiler_nothing_is_downloaded(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "No C compiler: 'no-such-compiler' is not on the PATH" in refusal(here)
    assert here.downloads == []


@pytest.mark.parametrize(("system", "processor"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_another_machine_is_named(
    here: Machine, monkeypatch: pytest.MonkeyPatch, system: str, processor: str
) -> None:
    monkeypatch.setattr(toolchain.sys, "platform", system)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: processor)
    assert f"This machine is {system} on {processor}" in refusal(here)


def test_a_version_that_does_not_exist_and_a_network_that_fails_are_told_apart(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        "ERROR: Could not find a version that satisfies the requirement (from versions: {})\nERROR: No match"
    )
    monkeypatch.setenv("PIP_FAILS", "ERROR: Ignored yanked ones\n" + line.format("0.9.1, 0.10.1"))
    message = refusal(here)
    assert message.startswith(
        f"pip could not download jax-rocm7-pjrt {jax.__version__}, which does not exist."
    )
    assert "0.9.1, 0.10.1" in message
    monkeypatch.setenv("PIP_FAILS", "WARNING: Retrying\n" + line.format("none"))
    assert "Check the network" in refusal(here)
    monkeypatch.setenv("PIP_FAILS", "ERROR: Could not install packages due to an OSError: no space")
    assert "due to an OSError: no space. Check" in refusal(here)


def test_a_disk_without_room_is_refused_before_the_download(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = toolchain.shutil.disk_usage(here.root)._replace(free=12_000_000)
    monkeypatch.setattr(toolchain.shutil, "disk_usage", lambda path: usage)
    assert "has 12 MB left; the compiler for AMD GPUs needs 700 MB" in refusal(here)
    assert here.downloads == []


def test_a_disk_that_fills_up_is_a_sentence(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(toolchain, "_unpack", fill)
    assert "is full; the compiler for AMD GPUs needs 700 MB" in refusal(here)


def test_a_folder_that_cannot_be_made_is_a_sentence(here: Machine) -> None:
    (here.root / "cache").write_text("a file", encoding="utf-8")
    assert "could not be put into" in refusal(here)


def test_a_folder_of_something_else_is_neither_loaded_nor_overwritten(here: Machine) -> None:
    here.folder.mkdir(parents=True)
    (here.folder / "thesis.txt").write_text("mine", encoding="utf-8")
    for call in (toolchain.prepare, toolchain.load):
        with pytest.raises(ToolchainError, match="holds something, but not a compiler for AMD GPUs"):
            call()
    assert [path.name for path in here.folder.iterdir()] == ["thesis.txt"]


def test_the_compiler_of_another_jax_is_refused(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toolchain.prepare()
    running = jax.__version__
    monkeypatch.setattr(jax, "__version__", "0.99.1")
    with pytest.raises(ToolchainError, match=rf"the compiler of jax {running}, and this is jax 0\.99\.1"):
        toolchain.load(folder)
    with pytest.raises(ToolchainError, match=r"not in .*0\.99\.1; run `qwen-moe-jax toolchain`"):
        toolchain.load()


def test_a_damaged_compiler_is_refused(here: Machine) -> None:
    toolchain.prepare()
    os.truncate(here.folder / "xla_rocm_plugin.so", 1000)
    with pytest.raises(ToolchainError, match=r"is damaged; delete the folder"):
        toolchain.load()


def test_a_jax_without_a_private_name_is_a_sentence(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.prepare()
    monkeypatch.delattr("jaxlib.xla_client.make_c_api_device_topology")
    monkeypatch.setattr(toolchain, "_real_runtime", lambda plugin: "libamdhip64.so.7")  # no stubs in here
    with pytest.raises(ToolchainError) as caught:
        toolchain.load()
    assert "has no jaxlib.xla_client.make_c_api_device_topology" in str(caught.value)
    assert "checked with jax 0.10.2" in str(caught.value)


@pytest.mark.parametrize("arch", ["sm_90", "gfx9999", "gfx90"])
def test_no_topology_is_made_of_an_architecture_that_is_not_known(arch: str) -> None:
    device = dataclasses.replace(find_device("h100"), arch=arch)
    with pytest.raises(InputError, match=rf"NVIDIA H100 \({arch}\); .* for gfx942, gfx950 only"):
        toolchain.topology(device)


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 8), (1, 1, 2.0)])
def test_a_topologys_shape_is_three_positive_numbers(shape: Any) -> None:
    with pytest.raises(InputError, match="expected slices, hosts and devices"):
        toolchain.topology(find_device("mi300x"), shape)


def test_a_peak_is_what_the_compute_units_do_at_their_clock() -> None:
    """CDNA 3: 2048 operations a clock and compute unit in bfloat16; CDNA 4 and Hopper: 4096."""
    per_clock = {"gfx942": 2048, "gfx950": 4096, "sm_90": 4096}
    for device in DEVICES.values():
        peak = device.compute_units * device.clock_ghz * 1e9 * per_clock[device.arch]
        # data sheets give five digits
        assert device.peak_flops["bfloat16"] == pytest.approx(peak, rel=1e-4)
        assert device.peak_flops["float8"] == pytest.approx(2 * peak, rel=1e-4)


def compiled_sum(device: str, dtype: str = "float32", n: int = 256) -> jax.stages.Compiled:
    """x @ w, every row and column divided among eight devices, none of which exists."""
    mesh = jax.make_mesh((8,), ("expert",), devices=toolchain.topology(find_device(device), (1, 1, 8)))
    columns, rows = jax.P(None, "expert"), jax.P("expert")
    summed = jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "expert"), mesh=mesh, in_specs=(columns, rows), out_specs=jax.P()
    )
    x, w = (
        jax.ShapeDtypeStruct((n, n), dtype, sharding=jax.NamedSharding(mesh, spec))
        for spec in (columns, rows)
    )
    return jax.jit(summed).lower(x, w).compile()


@pytest.mark.slow
@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize("device", ["mi300x", "mi325x", "mi355x"])
def test_a_sum_over_eight_compiles_to_an_all_reduce_and_code_of_the_chip(device: str) -> None:
    compiled = compiled_sum(device)
    text = compiled.as_text()
    assert text is not None
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    program: Any = compiled.runtime_executable()
    # the notes of AMD's code objects, of which compression leaves these words
    code = program.serialize()
    assert b"amdhsa.kernels" in code
    assert {arch for arch in (b"gfx942", b"gfx950") if arch in code} == {find_device(device).arch.encode()}


@pytest.mark.slow
@pytest.mark.usefixtures("rocm")
def test_topologies_have_the_devices_that_were_asked_for() -> None:
    for shape, count in (((1, 1, 1), 1), ((1, 1, 8), 8), ((1, 2, 4), 8), ((2, 2, 8), 32)):
        devices = toolchain.topology(find_device("mi355x"), shape)
        assert len({device.id for device in devices}) == len(devices) == count
        assert {device.device_kind for device in devices} == {"AMD Instinct MI355X"}


@pytest.mark.slow
@pytest.mark.usefixtures("rocm")
def test_the_cpu_computes_as_before_after_a_program_was_compiled() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    before = jax.jit(lambda x: jnp.tanh(x) @ x.T)(x)
    compiled_sum("mi300x")
    assert jax.default_backend() == "cpu"
    assert {device.platform for device in jax.devices()} == {"cpu"}
    jax.clear_caches()
    np.testing.assert_array_equal(jax.jit(lambda x: jnp.tanh(x) @ x.T)(x), before)
    with pytest.raises(RuntimeError, match="rocm"):
        jax.devices("rocm")


@pytest.mark.slow
@pytest.mark.usefixtures("rocm")
@pytest.mark.parametrize("device", ["mi300x", "mi355x"])
def test_cost_analysis_counts_a_devices_share_of_a_product(device: str) -> None:
    n = 256
    flops = private_jax.cost_analysis(compiled_sum(device, n=n))["flops"]
    # n^2 results of n / 8 products each, and less than one operation a result for each of the other 7 devices
    assert 2 * n**3 / 8 <= flops < 2 * n**3 / 8 + 8 * n**2

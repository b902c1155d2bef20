"""The same program over two processes of four devices each: loading, generating and checking, and dying."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.configs import DIVISIBLE_BY_8, random_config
from support.meshes import mesh_case, on_mesh
from support.reference import build_reference, save_reference

from qwen_moe_jax import make_mesh
from qwen_moe_jax.checkpoint.layout import parameter_shapes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.processes import HEARTBEAT_SECONDS, start_processes

SEED = 2  # three key heads of either kind, fusable, 16 experts
PROMPTS = [list(range(1, 14)), [5, 3, 2], [7] * 9]
WORKER = Path(__file__).with_name("worker.py")
REPOSITORY = Path(__file__).resolve().parents[2]
# Two layers' sums in another order.
TOLERANCE = 5e-6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(folder: Path, sizes: str, mode: str, task: str) -> list[subprocess.Popen[str]]:
    """Two workers with four devices each."""
    address = f"localhost:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(REPOSITORY)}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), address, "2", str(i), "4", str(folder), sizes, mode, task],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]


def results(workers: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    found = []
    for worker in workers:
        out, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-2000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def bytes_of_devices(layout: Layout, devices: list[Any], itemsize: int) -> int:
    """Bytes of the distinct slices that some devices hold, in a file of one dtype."""
    total = 0
    for name, shape in parameter_shapes(layout.config).items():
        dimensions = layout.dimensions(name, len(shape))
        sharding = layout.sharding(layout.spec(name, len(shape)))
        held = tuple(n if d is None else d.size for n, d in zip(shape, dimensions, strict=True))
        indices = sharding.devices_indices_map(held)
        # on this mesh nothing is padded, so that a slice's own size is what is read for it
        distinct = {tuple(s.indices(n)[:2] for s, n in zip(indices[d], held, strict=True)) for d in devices}
        total += sum(int(np.prod([stop - start for start, stop in box])) for box in distinct)
    return total * itemsize


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [("1x2x4", "outside"), ("2x4x1", "auto")],
)
@pytest.mark.slow
def test_two_processes_equal_one(sizes: str, mode: str) -> None:
    folder = mesh_case(SEED).folder
    found = results(start(folder, sizes, mode, "run"))
    one = on_mesh(SEED, *map(int, sizes.split("x")), shared_expert=found[0]["mode"])
    assert one.layout is not None
    assert [f["processes"] for f in found] == [2, 2]
    assert found[0]["mode"] == found[1]["mode"], "auto is decided for all"
    expected = np.asarray(one.logits(PROMPTS))
    sequences = one.generate(PROMPTS, max_new_tokens=8).sequences
    sampled = one.generate(PROMPTS, max_new_tokens=8, do_sample=True, seed=3, frequency_penalty=0.5).sequences
    for f in found:
        assert f["sequences"] == sequences
        assert f["sampled"] == sampled
        logits = np.asarray(f["logits"], np.float32)
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert f["ok"]
        assert f["largest"] > 0, "something was compared"


@pytest.mark.slow
def test_each_process_reads_only_what_its_devices_hold(tmp_path: Path) -> None:
    """Every dimension divides by 8, so that bytes can be counted from shapes alone."""
    config = random_config(SEED) | DIVISIBLE_BY_8
    folder = save_reference(build_reference(config, 0), tmp_path)
    found = results(start(folder, "1x4x2", "sharded", "run"))
    layout = Layout(ModelConfig.from_file(folder), make_mesh(expert=4, tensor=2), shared_expert="sharded")
    devices = layout.mesh.devices.ravel().tolist()
    file_bytes = sum(int(np.prod(shape)) for shape in parameter_shapes(layout.config).values()) * 4
    for process, f in enumerate(found):
        mine = devices[4 * process : 4 * process + 4]
        assert f["read_bytes"] == bytes_of_devices(layout, mine, itemsize=4)
        # half of all, and the routers and norms, which in so small a model are not small
        assert 0.5 < f["read_bytes"] / file_bytes < 0.56


@pytest.mark.slow
def test_the_command_runs_over_two_processes_and_the_first_one_prints() -> None:
    """Positions as flags in one and as environment variables in the other."""
    question = "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?"
    command = [
        sys.executable,
        "-m",
        "qwen_moe_jax.cli",
        "generate",
        "--model",
        "checkpoints/abacus",
        question,
    ]
    command += ["--expert", "2", "--tensor", "2", "--shared-expert", "sharded", "--no-compilation-cache"]
    address = f"localhost:{free_port()}"
    flags = ["--coordinator", address, "--num-processes", "2", "--process-id", "0"]
    variables = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    workers = [
        subprocess.Popen(
            command + extra,
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for extra, environment in ((flags, {}), ([], variables))
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["12 + 7 = 19. The answer is 19.\n", ""]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_id": 1}, r"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not given"),
        ({"coordinator": "localhost:1", "num_processes": 2}, r"JAX_PROCESS_ID is not given"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, r"process 2 of 2 .*below"),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 0}, r"the coordinator as host:port"),
    ],
)
def test_processes_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        start_processes(**given)


def test_the_environment_speaks_for_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_processes() == 1
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(
        InputError, match="number of processes is 'two' and this one's '0'; expected integers"
    ):
        start_processes(process_id="0")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_dead_process_ends_the_other_with_an_error() -> None:
    workers = start(mesh_case(SEED).folder, "1x2x4", "outside", "loop")
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert any(line == "ready\n" for line in worker.stdout), "it ended before it began"
        # only now: were one to die by itself, the other might still be on its way to "ready"
        started = time.monotonic()
        workers[1].kill()
        assert workers[1].wait(timeout=30) == -signal.SIGKILL, "it went on until it was killed"
        _, errors = workers[0].communicate(timeout=3 * HEARTBEAT_SECONDS)
        assert workers[0].returncode != 0
        assert errors, "the survivor says why"
        assert time.monotonic() - started < 3 * HEARTBEAT_SECONDS
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()

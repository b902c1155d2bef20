"""What the engine's compiled steps of a whole bfloat16 model do on a CPU, with the C++ kernels."""

import re

import jax
import numpy as np
import pytest
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.engine.plan import BORDERS
from qwen_moe_jax.engine.rows import Entries, Roster, RowStates, StepRows
from qwen_moe_jax.engine.sampling import MOST_ENDS, RowSampling, SamplingParams
from qwen_moe_jax.formats.cache import KVCache, Placement
from qwen_moe_jax.kernels.table import IMPLEMENTATIONS, NATIVE, make_kernels

ROWS, SLOTS, PAGES, WIDTH = 2, 3, 11, 4
if make_kernels("cpu").native is None:
    pytest.skip("without the C++ kernels", allow_module_level=True)


def given(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def model():
    return QwenMoe.from_pretrained(CHECKPOINT, dtype="bfloat16", draft_tokens=0)


@pytest.fixture(scope="module")
def pools(model):
    layers = model._steps.forward.new_layers(PAGES, SLOTS)
    return jax.tree.map(lambda x: given(x.dtype.name, *x.shape), layers)


@pytest.fixture(scope="module")
def decode(model, pools):
    """The compiled decode step."""
    slots, rows = given("int32", SLOTS), given("int32", ROWS)
    states = RowStates(token=slots, length=slots, emitted=slots, finished=given("bool", SLOTS), drafts=None)
    roster = Roster(
        slots=rows,
        limit=rows,
        end_ids=given("int32", ROWS, MOST_ENDS),
        draft_limit=rows,
        places=given("int32", ROWS, BORDERS),
        sampling=SamplingParams.of([RowSampling()] * ROWS),
    )
    entries = Entries(begins=given("bool", ROWS), token=rows, length=rows, emitted=rows)
    told = StepRows(roster, entries, given("int32", SLOTS, WIDTH), slots)
    snapshots = jax.tree.map(
        lambda x: given(x.dtype.name, *x.shape), model._steps.forward.new_states(SLOTS + 1)
    )
    return model._steps.lower_decode(pools, snapshots, states, told).compile()


@pytest.fixture(scope="module")
def prefill(model, pools):
    """The compiled prefill step."""
    one = given("int32", 1)
    placed = Placement(tables=given("int32", 1, WIDTH), slots=one, length=one)
    return model._steps.lower_prefill(pools, given("int32", 1, 32), None, one, placed).compile()


def spelt(struct: jax.ShapeDtypeStruct) -> str:
    short = {"bfloat16": "bf16", "float32": "f32"}[struct.dtype.name]
    return f"{short}[{','.join(map(str, struct.shape))}]"


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_pages_and_states_are_not_copied_in_a_step(step, pools, request):
    text = request.getfixturevalue(step).as_text()
    for layer in pools:
        for struct in (layer.k, layer.v) if isinstance(layer, KVCache) else (layer.state, layer.conv):
            shape = re.escape(spelt(struct))
            assert re.search(rf"{shape}\S* (parameter|get-tuple-element)\(", text)
            sizes = re.escape(",".join(map(str, struct.shape)))  # of any dtype: none is widened either
            made = re.findall(rf"= \w+\[{sizes}\]\S* ([\w-]+)\(", text)
            assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, made


def test_no_matrix_is_widened_or_copied_in_a_step(model, decode):
    smallest = min(x.nbytes for name, x in model._parameters.items() if "embed" in name or "head" in name)
    assert decode.memory_analysis().temp_size_in_bytes < smallest
    for name, x in model._parameters.items():
        if x.dtype == "bfloat16" and x.ndim >= 2:
            wide = re.escape(spelt(jax.ShapeDtypeStruct(x.shape, "float32")))
            assert not re.search(rf"= {wide}", decode.as_text()), name


def test_every_native_operation_is_in_the_programs(decode, prefill):
    names = {"embedding": "rows", "scaled": None}
    for operation, known in IMPLEMENTATIONS.items():
        target = names.get(operation, operation)
        if NATIVE not in known.values() or target is None:
            continue
        text = (prefill if operation == "delta_chunks" else decode).as_text()
        assert f"_{target}" in text, operation


def test_a_pool_takes_memory_as_it_is_written(model):
    """Two GiB of pages, and no more of them resident than were touched."""

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    forward = model._steps.forward
    before = resident()
    layers = forward.new_layers((2 << 30) // forward.page_bytes, SLOTS)
    jax.block_until_ready(layers)
    assert resident() - before < 64 << 20
    one = np.zeros(1, np.int32)
    table = np.arange(WIDTH, dtype=np.int32)[None]
    placed = Placement(tables=table, slots=one, length=one)
    layers, done = model._steps.prefill(layers, np.ones((1, 32), np.int32), None, one + 32, placed)
    jax.block_until_ready(done)
    assert resident() - before < 128 << 20


def test_weights_keep_the_checkpoint_s_dtype(model):
    held = {x.dtype.name for x in model._parameters.values() if x.ndim >= 2 and x.size > 4096}
    assert held == {"bfloat16"}

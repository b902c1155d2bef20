"""What the compiled programs of a whole bfloat16 model do on a CPU, with the C++ kernels."""

import re

import jax
import numpy as np
import pytest
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.engine.sampling import SamplingParams, SamplingPlan
from qwen_moe_jax.formats.cache import KVCache
from qwen_moe_jax.generation.engine import Sampler
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.kernels.table import IMPLEMENTATIONS, NATIVE, make_kernels

BATCH, CAPACITY = 2, 96
if make_kernels("cpu").native is None:
    pytest.skip("without the C++ kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    return QwenMoe.from_pretrained(CHECKPOINT, dtype="bfloat16")


@pytest.fixture(scope="module")
def decode(model):
    """(compiled decode loop, the cache it takes)."""
    config = GenerationConfig(max_new_tokens=4)
    plan = SamplingPlan.of(config)
    sampler = Sampler(
        params=SamplingParams.of(config, BATCH),
        seeds=np.zeros(BATCH, np.uint32),
        sequence_index=np.arange(BATCH, dtype=np.uint32),
        eos_ids=np.asarray([-1], np.int32),
        prompt_mask=None,
    )
    rows = [np.arange(3, 20, dtype=np.int32), np.arange(5, 60, dtype=np.int32)]
    cache, last = model.engine.prefill(rows, CAPACITY - 60)
    state, _ = model.engine.first(cache, last, sampler, plan)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.cache)
    return model.engine.lower_decode(state, sampler, plan).compile(), shapes


def spelt(struct: jax.ShapeDtypeStruct) -> str:
    short = {"bfloat16": "bf16", "float32": "f32"}[struct.dtype.name]
    return f"{short}[{','.join(map(str, struct.shape))}]"


def test_keys_values_and_states_are_not_copied_in_a_step(decode):
    compiled, cache = decode
    text = compiled.as_text()
    for layer in cache.layers:
        for struct in (layer.k, layer.v) if isinstance(layer, KVCache) else (layer.state,):
            shape = re.escape(spelt(struct))
            assert re.search(rf"{shape}\S* (parameter|get-tuple-element)\(", text)
            made = re.findall(rf"= {shape}\S* ([\w-]+)\(", text)
            assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, made


def test_no_matrix_is_widened_or_copied_in_a_step(model, decode):
    compiled, _ = decode
    smallest = min(x.nbytes for name, x in model._parameters.items() if "embed" in name or "head" in name)
    assert compiled.memory_analysis().temp_size_in_bytes < smallest
    for name, x in model._parameters.items():
        if x.dtype == "bfloat16" and x.ndim >= 2:
            wide = re.escape(spelt(jax.ShapeDtypeStruct(x.shape, "float32")))
            assert not re.search(rf"= {wide}", compiled.as_text()), name


def test_every_native_operation_is_in_the_programs(model, decode):
    compiled, _ = decode
    prefill = model.engine.lower_prefill(
        model.engine.new_cache(1, CAPACITY), jax.ShapeDtypeStruct((1, 32), "int32")
    ).as_text()
    names = {"embedding": "rows", "float8": None}
    for operation, known in IMPLEMENTATIONS.items():
        target = names.get(operation, operation)
        if NATIVE not in known.values() or target is None:
            continue
        assert f"_{target}" in (prefill if operation == "delta_chunks" else compiled.as_text()), operation


def test_weights_keep_the_checkpoint_s_dtype(model):
    held = {x.dtype.name for x in model._parameters.values() if x.ndim >= 2 and x.size > 4096}
    assert held == {"bfloat16"}

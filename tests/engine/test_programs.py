"""An engine compiles each of its steps once, however the arrays that it begins with came about."""

import numpy as np
import pytest
from support.meshes import mesh_case
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe, make_mesh

REQUESTS = ({}, {"repetition_penalty": 1.3}, {"do_sample": True, "num_return_sequences": 2})
GUIDED = {"response_format": {"type": "regex", "pattern": "[a-c]{3,9}"}}


def drafting() -> tuple[QwenMoe, tuple[dict, ...]]:
    return QwenMoe.from_pretrained(CHECKPOINT, draft_tokens=2), (*REQUESTS, GUIDED)


def on_a_mesh() -> tuple[QwenMoe, tuple[dict, ...]]:
    mesh = make_mesh(data=2, expert=2)
    # without a tokenizer, which guides need
    return QwenMoe.from_pretrained(mesh_case(22).folder, mesh=mesh, dtype="float32"), REQUESTS


@pytest.mark.parametrize("load", [drafting, on_a_mesh])
def test_every_step_is_compiled_once(load):
    model, requests = load()
    rng = np.random.default_rng(1)
    with model.engine(max_rows=4, memory=1 << 25) as engine:
        prompts = [rng.integers(0, 60, length).tolist() for length in (1, 40, 90, 200)]
        asked = [(prompt, options) for prompt in prompts for options in requests]
        for turn in range(2):
            handles = [
                engine.submit(prompt, max_new_tokens=6 + turn, eos_token_id=[], **options)
                for prompt, options in asked
            ]
            for handle in handles:
                handle.result()
        assert engine.stats().cached_prompt_tokens > 0
        assert model._steps.compiled_programs == engine.stats().compiled_programs

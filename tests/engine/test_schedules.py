"""Random schedules on small models: every request gets the tokens that it gets alone, whatever else goes
on."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import parity
from support.meshes import mesh_case, on_mesh
from support.reference import save_reference

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.formats.cache import PAGE
from qwen_moe_jax.generation.engine import Engine

# Log-probabilities by other chunks and batches: float32 sums in other orders, of logits of about 5.
LOGPROB_TOLERANCE = 2e-4
REQUESTS = 40
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.5},
    {"do_sample": True, "top_k": 12, "top_p": 0.8},
    {"do_sample": True, "min_p": 0.05, "presence_penalty": 0.7, "temperature": 2.0},
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, and what it gets alone."""

    prompt: list[int]
    options: dict[str, Any]
    sequences: list[list[int]]
    logprobs: list[list[float]]


def draw_requests(model: QwenMoe, seed: int) -> list[Asked]:
    """Prompts of 1 to 200 tokens, most of them beginning like others, each run in an engine of its own
    rows."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    trunks = [rng.integers(0, vocab, 180).tolist() for _ in range(3)]
    asked = []
    with model.engine(max_rows=4, memory=1 << 25, prefix_cache=False) as engine:
        for number in range(REQUESTS):
            trunk = trunks[rng.integers(3)][: int(rng.choice([0, 1, 63, 64, 65, 100, 128, 150, 180]))]
            prompt = [*trunk, *rng.integers(0, vocab, rng.integers(0, 30)).tolist()] or [7]
            options = OPTIONS[number % len(OPTIONS)] | {
                "max_new_tokens": int(rng.integers(1, 14)),
                "seed": int(rng.integers(100)),
                "eos_token_id": rng.integers(0, vocab, 2).tolist(),
                "return_logprobs": True,
            }
            if options.get("do_sample"):
                options["num_return_sequences"] = int(rng.integers(1, 4))
            out = engine.submit(prompt, **options).result()
            assert out.logprobs is not None
            asked.append(Asked(prompt, options, out.sequences, out.logprobs))
    return asked


@functools.cache
def one_device(seed: int) -> tuple[QwenMoe, list[Asked]]:
    folder = save_reference(parity.random_model(seed).reference, Path(tempfile.mkdtemp()))
    model = QwenMoe.from_pretrained(folder, dtype="float32")
    return model, draw_requests(model, seed)


def run_schedule(engine: Engine, asked: list[Asked], rng: np.random.Generator) -> int:
    """Requests come and are cancelled between steps; returns how many tokens were compared."""
    engine._driven = True  # steps are taken here, so that a schedule is the same each time
    chosen = [asked[i] for i in rng.integers(0, len(asked), rng.integers(1, 9))]
    under_way, compared = [], 0
    for request in chosen:
        under_way.append((request, engine.submit(request.prompt, **request.options)))
        for _ in range(int(rng.choice([0, 0, 1, 2, 5, 12]))):
            engine._work_once()
        if rng.random() < 0.15:
            under_way[rng.integers(len(under_way))][1].cancel()
    for request, handle in under_way:
        out = handle.result()
        pairs = zip(out.sequences, request.sequences, out.logprobs, request.logprobs, strict=True)
        for number, (tokens, expected, logprobs, wanted) in enumerate(pairs):
            cancelled = out.finish_reasons[number] == "cancelled"
            assert tokens == (expected[: len(tokens)] if cancelled else expected)
            np.testing.assert_allclose(logprobs, wanted[: len(tokens)], atol=LOGPROB_TOLERANCE)
            compared += len(tokens)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_pages == stats.pages
    return compared


@functools.cache
def engine_of(seed: int, *, tight: bool) -> Engine:
    """With room, or so tight that rows have to give way."""
    model, _ = one_device(seed)
    forward = model._steps.forward
    few = 4 * forward.state_bytes + 12 * forward.page_bytes
    return model.engine(max_rows=4, memory=few if tight else 1 << 25)


def check_schedules(seed: int, numbers: range, *, tight: bool) -> None:
    engine, asked = engine_of(seed, tight=tight), one_device(seed)[1]
    compared = sum(run_schedule(engine, asked, np.random.default_rng([seed, n])) for n in numbers)
    assert compared > 5 * len(numbers)
    assert engine.stats().compiled_programs <= 24
    if not tight:
        assert engine.stats().cached_prompt_tokens > PAGE


def test_in_any_schedule_a_request_gets_what_it_gets_alone() -> None:
    check_schedules(22, range(3), tight=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 22, 7])
def test_in_a_hundred_schedules_a_request_gets_what_it_gets_alone(seed: int) -> None:
    check_schedules(seed, range(10, 85), tight=False)
    check_schedules(seed, range(85, 120), tight=True)


@pytest.mark.slow
def test_rows_that_gave_their_pages_back_go_on_with_the_same_tokens() -> None:
    model, _ = one_device(22)  # with layers of attention: pages take memory
    forward = model._steps.forward
    vocab = model.config.vocab_size
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, vocab, 50).tolist() for _ in range(3)]
    options = [
        {"max_new_tokens": 100, "eos_token_id": [], "seed": n, **OPTIONS[2 * (n % 2)]} for n in range(3)
    ]
    memory = 3 * forward.state_bytes + 6 * forward.page_bytes
    with model.engine(max_rows=3, memory=memory, prefix_cache=False) as tight:
        found = dict(tight.run(prompts, options))
        assert tight.stats().preemptions > 0
        assert tight.stats().free_pages == tight.stats().pages
    with model.engine(max_rows=1, memory=1 << 25, prefix_cache=False) as alone:
        for number, (prompt, given) in enumerate(zip(prompts, options, strict=True)):
            assert alone.submit(prompt, **given).result().sequences == found[number].sequences


MESHES = [
    ((2, 2, 2), {"shared_expert": "sharded"}),
    ((2, 2, 1), {"attention": "data", "shared_expert": "prescaled"}),
    ((1, 2, 2), {"expert_dispatch": "all_to_all", "shared_expert": "outside"}),
    ((4, 1, 1), {"shared_expert": "prescaled"}),
]


def check_mesh(sizes: tuple[int, int, int], choices: dict[str, Any], count: int) -> None:
    seed = 22
    alone = QwenMoe.from_pretrained(mesh_case(seed).folder, dtype="float32")
    asked = draw_requests(alone, seed)
    engine = on_mesh(seed, *sizes, **choices).engine(max_rows=8, memory=1 << 24)
    compared = sum(
        run_schedule(engine, asked, np.random.default_rng([seed, number])) for number in range(count)
    )
    assert compared > 5 * count
    assert engine.stats().cached_prompt_tokens > PAGE


@pytest.mark.slow
def test_on_a_mesh_a_request_gets_what_it_gets_alone_on_one_device() -> None:
    check_mesh(*MESHES[0], 4)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "choices"), MESHES[1:])
def test_on_every_kind_of_mesh_a_request_gets_what_it_gets_alone(sizes, choices) -> None:
    check_mesh(sizes, choices, 12)


@pytest.mark.slow
def test_a_cached_beginning_gives_logits_as_near_the_truth_as_a_cold_one() -> None:
    """The states of a snapshot are those of a prompt that was read in other chunks."""
    model, _ = one_device(3)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.config.vocab_size, 200).tolist()
    with model.engine(max_rows=2, memory=1 << 25) as engine:
        cold = engine.submit(prompt, max_new_tokens=8, return_logprobs=True, eos_token_id=[]).result()
        warm = engine.submit(prompt, max_new_tokens=8, return_logprobs=True, eos_token_id=[]).result()
    assert (cold.usage.cached_prompt_tokens, warm.usage.cached_prompt_tokens) == (0, 192)
    assert warm.sequences == cold.sequences
    whole = np.asarray(model.logits([prompt + cold.sequences[0]]))[0, len(prompt) - 1 : -1]
    logprobs = jax.nn.log_softmax(whole)[np.arange(8), cold.sequences[0]]
    for out in (cold, warm):
        assert out.logprobs is not None
        np.testing.assert_allclose(out.logprobs[0], logprobs, atol=LOGPROB_TOLERANCE)

"""The engine as its users meet it: submit, iterate, results, cancel, asyncio, run, closing, errors."""

import asyncio
import threading

import numpy as np
import pytest
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.errors import EngineError, InputError

CHATS = [
    [
        {
            "role": "user",
            "content": f"Tom has {n} apples. Anna gives him 7 more. How many apples does Tom have?",
        }
    ]
    for n in range(11, 23)
]
LONG = {"max_new_tokens": 2000, "eos_token_id": []}


@pytest.fixture(scope="module")
def model():
    return QwenMoe.from_pretrained(CHECKPOINT, dtype="float32")


@pytest.fixture(scope="module")
def engine(model):
    with model.engine(max_rows=4, memory=64 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def expected(model):
    return model.generate(CHATS).texts


def test_requests_of_many_threads_get_their_own_replies(engine, expected):
    found = {}

    def ask(number: int) -> None:
        found[number] = engine.submit(CHATS[number]).result().texts[0]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(CHATS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(CHATS))] == expected


def test_iterating_gives_every_piece_also_late_and_twice(engine, expected):
    request = engine.submit(CHATS[0])
    assert "".join(piece.text for piece in request) == expected[0]
    assert "".join(piece.text for piece in request) == expected[0]
    assert request.done
    assert request.result().texts == [expected[0]]


@pytest.mark.slow
def test_pieces_of_several_sequences_say_whose_they_are(engine):
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0, "max_new_tokens": 9}
    request = engine.submit(CHATS[0], **options)
    found = {0: [], 1: [], 2: []}
    for piece in request:
        found[piece.index].append(piece.token_id)
    assert [found[n] for n in range(3)] == request.result().sequences
    assert len(set(map(tuple, found.values()))) == 3


def test_async_for_gives_the_pieces_while_other_tasks_run(engine, expected):
    async def read(number: int) -> str:
        return "".join([piece.text async for piece in engine.submit(CHATS[number])])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(read, range(len(CHATS))))

    assert asyncio.run(all_of_them()) == expected


def test_run_gives_each_result_as_it_is_there(engine, expected, capsys):
    options = [{"max_new_tokens": 2 if n % 2 else 96} for n in range(len(CHATS))]
    order = []
    for number, out in engine.run(CHATS, options, progress=True):
        order.append(number)
        assert len(out.sequences) == 1
        if number % 2:
            assert len(out.sequences[0]) == 2
        else:
            assert out.texts == [expected[number]]
    assert sorted(order) == list(range(len(CHATS)))
    assert order != sorted(order)  # short ones do not wait for long ones
    assert "tokens/s" in capsys.readouterr().err


def test_leaving_run_cancels_the_rest(engine):
    for _, _ in engine.run(CHATS, {"max_new_tokens": 500, "eos_token_id": []}):
        break
    engine.submit(CHATS[0], max_new_tokens=1).result()
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_cancelled_request_keeps_what_it_had_and_gives_its_pages_back(engine):
    request = engine.submit(CHATS[0], **LONG)
    pieces = iter(request)
    first = next(pieces)
    request.cancel()
    out = request.result()
    assert out.finish_reasons == ["cancelled"]
    assert out.sequences[0][0] == first.token_id
    assert len(out.sequences[0]) < 2000
    request.cancel()  # nothing happens
    assert list(pieces) is not None  # iterating ends
    engine.submit(CHATS[0], max_new_tokens=1).result()
    stats = engine.stats()
    assert (stats.running, stats.free_pages) == (0, stats.pages)


def test_a_consumer_that_fails_harms_no_other(engine, expected):
    def bad() -> None:
        for _ in engine.submit(CHATS[1]):
            raise RuntimeError("a consumer's own trouble")

    with pytest.raises(RuntimeError, match="own trouble"):
        bad()
    assert engine.submit(CHATS[0]).result().texts == [expected[0]]


def test_waiting_may_be_limited(engine):
    request = engine.submit(CHATS[0], **LONG)
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 seconds"):
        request.result(timeout=0.01)
    request.cancel()


def test_what_never_fits_is_refused_when_it_is_submitted(model):
    forward = model._steps.forward
    memory = forward.state_bytes + 3 * forward.page_bytes
    with model.engine(max_rows=1, memory=memory, prefix_cache=False) as small:
        with pytest.raises(InputError, match="need 4 pages of 64 tokens, and the engine has 3"):
            small.submit(list(range(3, 103)), max_new_tokens=94)
        out = small.submit(list(range(3, 103)), max_new_tokens=93, eos_token_id=[]).result()
        assert len(out.sequences[0]) == 93


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows is 0; expected a positive integer"),
        ({"max_rows": 2.5}, r"max_rows is 2\.5"),
        ({"memory": -1}, "memory is -1"),
        ({"memory": 1000}, "1,000 bytes of memory do not hold the states of 64 rows"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        model.engine(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.submit(["a", "b"]), "submit takes one prompt, and was given 2"),
        (lambda e: e.submit(""), "prompt 0 is empty"),
        (lambda e: e.submit("a", temprature=1), "did you mean 'temperature'"),
        (lambda e: e.run(["a", ["b", "c"]]), "prompt 1 holds 2 prompts"),
        (lambda e: e.run(["a", ""]), "prompt 1: prompt 0 is empty"),
        (lambda e: e.run(["a"], [{}, {}]), "options holds 2 entries for 1 prompts"),
        (lambda e: e.run(["a"], "greedy"), "options is a str"),
        (lambda e: e.run(["a", "b"], [{}, 3]), "options holds a int"),
    ],
)
def test_bad_requests_are_errors_of_the_call(engine, call, message):
    with pytest.raises(InputError, match=message):
        call(engine)


def test_a_closed_engine_ends_what_runs_and_takes_no_more(model):
    made = model.engine(max_rows=2, memory=64 << 20)
    request = made.submit(CHATS[0], **LONG)
    made.close()
    with pytest.raises(EngineError, match="the engine was closed"):
        request.result()
    with pytest.raises(EngineError, match="the engine was closed"):
        made.submit(CHATS[0])
    made.close()


def test_a_step_that_fails_is_told_to_everyone_and_the_next_request_works(model, expected, monkeypatch):
    with model.engine(max_rows=2, memory=64 << 20) as made:
        broken, submitted = made._core, threading.Event()

        def fail() -> bool:
            submitted.wait()  # all are to be in the step that fails
            raise MemoryError("no memory for the step")

        monkeypatch.setattr(broken, "advance", fail)
        requests = [made.submit(chat) for chat in CHATS[:3]]
        submitted.set()
        for request in requests:
            with pytest.raises(EngineError, match="no memory for the step"):
                request.result()
        assert made.submit(CHATS[0]).result().texts == [expected[0]]


def test_stop_strings_cost_one_step_at_most(model):
    """The device does not know of them: a row that meets one is in the step that follows, and no further."""
    with model.engine(max_rows=1, memory=64 << 20) as made:
        core = made._core
        assert core is not None
        planned = []
        plan = core.scheduler.plan
        core.scheduler.plan = lambda steps=1: planned.append(plan(steps)) or planned[-1]
        out = made.submit(CHATS[0], stop_strings=[" = "]).result()
        steps = sum(step.steps for step in planned if hasattr(step, "steps"))
        assert len(out.sequences[0]) <= steps <= len(out.sequences[0]) + 1


@pytest.mark.slow
def test_warmup_compiles_everything_there_is(model):
    with model.engine(max_rows=2, memory=64 << 20) as made:
        assert 0 < made.warmup() <= 24
        programs = set(made._core.programs)
        for options in ({}, {"do_sample": True}, {"presence_penalty": 1.0}):
            made.submit(CHATS[0], **options).result()
        made.submit(list(range(3, 700)), max_new_tokens=2).result()
        assert set(made._core.programs) == programs


def test_stats_count(model):
    with model.engine(max_rows=2, memory=64 << 20) as made:
        prompt = np.arange(3, 203).tolist()
        made.submit(prompt, max_new_tokens=3, eos_token_id=[]).result()
        again = made.submit(prompt, max_new_tokens=3, eos_token_id=[]).result()
        stats = made.stats()
        assert again.usage.cached_prompt_tokens == 192
        assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.generated_tokens) == (400, 192, 6)
        assert stats.cached_pages == 3
        assert stats.free_pages == stats.pages

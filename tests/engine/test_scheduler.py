"""The scheduler alone, on a device that checks what every row reads: nothing is lost, doubled, or starved."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_device import FakeDevice, alone, check_ownership

from qwen_moe_jax.engine.plan import DecodeStep, PrefillStep, Sequence
from qwen_moe_jax.engine.scheduler import Scheduler
from qwen_moe_jax.engine.shapes import PrefillShapes
from qwen_moe_jax.errors import InputError

PAGE = 4
VOCABULARY = 6  # so that texts share beginnings, and end


def shapes(*given: tuple[int, int], while_decoding: int = 16) -> PrefillShapes:
    return PrefillShapes(given, overhead=4, while_decoding=while_decoding)


def make(**changes) -> Scheduler:
    options = {
        "ranks": 1,
        "slots": 3,
        "pages": 40,
        "page_length": PAGE,
        "snapshots": 12,
        "shapes": shapes((1, 4), (1, 16), (2, 8)),
        "context": 200,
    }
    return Scheduler(**(options | changes))


def prompt(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def finish(device: FakeDevice, most_steps: int = 4) -> None:
    for _ in range(5000):
        if not device.advance(most_steps):
            return
        check_ownership(device.scheduler)
    raise AssertionError("work does not end")


def run_one(scheduler: Scheduler, tokens: np.ndarray, new: int, lag: int = 1) -> tuple[Sequence, FakeDevice]:
    """A request by itself; a device goes with the pages of its scheduler."""
    device = getattr(scheduler, "device", None) or FakeDevice(
        scheduler, vocabulary=VOCABULARY, lag=lag, page_length=PAGE
    )
    scheduler.device = device  # type: ignore[attr-defined]
    (sequence,) = scheduler.submit(tokens, new)
    finish(device, 1)  # pages are short here: with more, several borders would be under way at once
    assert sequence.emitted == alone(tokens.tolist(), new, VOCABULARY)
    return sequence, device


requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, 2), min_size=1, max_size=30),  # prompts of two tokens: many share beginnings
        st.integers(1, 12),  # new tokens
        st.integers(1, 3),  # sequences
        st.integers(0, 12),  # steps until the next one comes
        st.one_of(st.none(), st.integers(0, 20)),  # steps until it is cancelled
        st.integers(0, 3),  # drafts a step
    ),
    min_size=1,
    max_size=10,
)
machines = st.fixed_dictionaries(
    {
        "ranks": st.integers(1, 2),
        "slots": st.integers(1, 4),
        "pages": st.integers(11, 40),
        "snapshots": st.integers(0, 6),
        "prefix_cache": st.booleans(),
    }
)


@settings(deadline=None, max_examples=250, derandomize=True)
@given(requests, machines, st.integers(0, 2), st.sampled_from([1, 3, 16]))
def test_every_request_gets_what_it_gets_alone_and_nothing_is_lost(asked, machine, lag, most_steps):
    scheduler = make(**machine)
    device = FakeDevice(scheduler, vocabulary=VOCABULARY, lag=lag, page_length=PAGE)
    arriving, cancelling, every, cancelled = list(asked), [], [], set()
    pause, steps = 0, 0
    while True:
        while arriving and pause <= 0:
            tokens, new, sequences, pause, cancel, drafts = arriving.pop(0)
            made = scheduler.submit(prompt(*tokens), new, sequences, drafts)
            every += [(sequence, tokens, new) for sequence in made]
            if cancel is not None:
                cancelling += [(steps + cancel, made[-1])]
        pause -= 1
        for when, sequence in cancelling:
            if when == steps and sequence.state != "finished":
                scheduler.finish(sequence)
                cancelled.add(sequence)
        more = device.advance(most_steps)
        check_ownership(scheduler)
        steps += 1
        assert steps < 4000, "a request starves"
        if not more and not arriving:
            break
    for sequence, tokens, new in every:
        assert sequence.state == "finished"
        expected = alone(tokens, new, VOCABULARY)
        if sequence in cancelled:
            assert sequence.emitted == expected[: len(sequence.emitted)]
        else:
            assert sequence.emitted == expected
    assert device.longest_wait <= 1
    assert scheduler.running == scheduler.waiting == 0
    total = machine["ranks"] * machine["pages"]
    assert scheduler.free_pages + scheduler.cached_pages == total
    if not machine["prefix_cache"]:
        assert scheduler.free_pages == total


def test_drafted_tokens_leave_snapshots_at_the_borders_that_they_come_to():
    scheduler = make(pages=80)
    device = FakeDevice(scheduler, vocabulary=10**9, lag=1, page_length=PAGE)
    first = list(range(1, 8))
    (turn,) = scheduler.submit(prompt(*first), 30, 1, 3)
    finish(device, 1)
    assert turn.emitted == alone(first, 30, 10**9)
    assert device.passes < 25
    reply = [*first, *turn.emitted]
    (following,) = scheduler.submit(prompt(*reply, 9, 9, 9), 2)
    finish(device, 1)
    assert following.cached == (len(reply) - 1) // PAGE * PAGE
    assert following.emitted == alone([*reply, 9, 9, 9], 2, 10**9)


def test_few_pages_make_the_youngest_give_way_and_come_back():
    scheduler = make(pages=9, slots=3, prefix_cache=False)
    device = FakeDevice(scheduler, vocabulary=10**9, lag=1, page_length=PAGE)  # hardly ever an end
    made = [scheduler.submit(prompt(*[n] * 8), 20)[0] for n in (1, 2, 3)]
    finish(device)
    assert scheduler.preemptions > 0
    assert made[0].epoch == 0  # the oldest never gives way
    for n, sequence in zip((1, 2, 3), made, strict=True):
        assert sequence.emitted == alone([n] * 8, 20, 10**9)


def test_an_identical_prompt_hits_at_its_last_border():
    """States kept at ends only give an identical prompt no hit (sglang #22935)."""
    scheduler = make()
    run_one(scheduler, prompt(*range(1, 12)), 3)
    again, _ = run_one(scheduler, prompt(*range(1, 12)), 3)
    assert again.cached == 8
    whole, _ = run_one(scheduler, prompt(*range(1, 9)), 3)
    assert whole.cached == 0  # 8 tokens, the last of which is to be run: the border inside is at 4
    again, _ = run_one(scheduler, prompt(*range(1, 9)), 3)
    assert again.cached == 4


def test_a_longer_prompt_and_the_next_turn_of_a_chat_hit():
    scheduler = make()
    first = list(range(1, 11))
    turn, _ = run_one(scheduler, prompt(*first), 12)
    longer, _ = run_one(scheduler, prompt(*first, 7, 7, 7), 2)
    assert longer.cached == 8
    reply = [*first, *turn.emitted]
    following, _ = run_one(scheduler, prompt(*reply, 9, 9, 9), 2)
    assert following.cached == (len(reply) - 1) // PAGE * PAGE


def test_a_branch_in_the_middle_hits_from_the_third_on():
    scheduler = make()
    trunk = list(range(1, 18))
    run_one(scheduler, prompt(*trunk, 1, 1, 1, 1), 1)
    second, _ = run_one(scheduler, prompt(*trunk, 2, 2, 2, 2), 1)
    assert second.cached == 0  # its keys are there, but no state where it leaves
    third, _ = run_one(scheduler, prompt(*trunk, 3, 3, 3, 3), 1)
    assert third.cached == 16


def test_without_the_prefix_cache_nothing_is_found_and_nothing_stays():
    scheduler = make(prefix_cache=False)
    for _ in range(2):
        sequence, _ = run_one(scheduler, prompt(*range(1, 12)), 3)
        assert sequence.cached == 0
        assert scheduler.free_pages == 40


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_sequences_of_a_prompt_share_its_pages(prefix_cache):
    scheduler = make(prefix_cache=prefix_cache)
    device = FakeDevice(scheduler, vocabulary=10**9, lag=1, page_length=PAGE)
    made = scheduler.submit(prompt(*range(1, 19)), 6, 3)
    shared = 0
    while device.advance(1):
        check_ownership(scheduler)
        pages = [set(sequence.pages) for sequence in made if sequence.pages]
        if len(pages) == 3:
            shared = max(shared, len(set.intersection(*pages)))
    assert shared == 4  # of 18 tokens, 16 in whole pages
    assert [sequence.cached for sequence in made] == [0, 16, 16]


def test_a_row_waits_for_one_prefill_step_at_most():
    scheduler = make(slots=3, pages=200, context=800, shapes=shapes((1, 4)))
    device = FakeDevice(scheduler, vocabulary=10**9, lag=1, page_length=PAGE)
    scheduler.submit(prompt(1, 2), 60)
    for _ in range(4):
        device.advance(1)
    scheduler.submit(prompt(*range(1, 200)), 3)
    finish(device, 1)
    assert device.longest_wait == 1


def test_a_step_that_rows_wait_for_is_short():
    scheduler = make(slots=3, pages=200, context=800, shapes=shapes((1, 4), (1, 64), while_decoding=4))
    scheduler.submit(prompt(1, 2), 60)
    steps = [scheduler.plan(), scheduler.plan()]
    assert all(step is not None for step in steps)
    scheduler.submit(prompt(*range(1, 200)), 3)
    step = scheduler.plan()
    step = step if isinstance(step, PrefillStep) else scheduler.plan()
    assert isinstance(step, PrefillStep)
    assert step.shape == (1, 4)
    scheduler = make(slots=3, pages=200, context=800, shapes=shapes((1, 4), (1, 64), while_decoding=4))
    scheduler.submit(prompt(*range(1, 200)), 3)
    step = scheduler.plan()
    assert isinstance(step, PrefillStep)
    assert step.shape == (1, 64)


def test_chunks_of_several_prompts_go_together_where_that_is_worth_it():
    scheduler = make(slots=4, shapes=shapes((1, 4), (1, 16), (4, 16)), prefix_cache=False)
    for n in range(1, 5):
        scheduler.submit(prompt(*[n] * 13), 1)
    step = scheduler.plan()
    assert isinstance(step, PrefillStep)
    assert step.shape == (4, 16)
    assert [len(row.tokens) for row in step.rows] == [12] * 4
    step = scheduler.plan()
    assert isinstance(step, DecodeStep)
    assert [row.token for row in step.rows] == [1, 2, 3, 4]


def test_rows_go_where_their_beginning_is_and_else_where_there_is_room():
    scheduler = make(ranks=2)
    device = FakeDevice(scheduler, vocabulary=VOCABULARY, lag=1, page_length=PAGE)
    (first,) = scheduler.submit(prompt(*range(1, 12)), 2)
    (second,) = scheduler.submit(prompt(*range(20, 31)), 2)
    finish(device)
    assert (first.rank, second.rank) == (0, 1)
    (again,) = scheduler.submit(prompt(*range(20, 31)), 2)
    finish(device)
    assert (again.rank, again.cached) == (1, 8)


def test_what_never_fits_is_refused_with_the_numbers():
    scheduler = make(pages=4)
    with pytest.raises(InputError, match="prompt of 10 tokens and 8 new ones need 5 pages of 4 tokens"):
        scheduler.submit(prompt(*range(10)), 8)
    scheduler.submit(prompt(*range(10)), 7)  # the last token is never written


def test_a_stale_result_is_not_taken():
    scheduler = make()
    (sequence,) = scheduler.submit(prompt(1), 5)
    step = scheduler.plan()
    assert isinstance(step, DecodeStep)
    scheduler._preempt(sequence)
    scheduler.emit(sequence, [3], step.rows[0].epoch)
    assert sequence.emitted == []

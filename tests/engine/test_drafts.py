"""Drafts of multi-token prediction change how many tokens a pass gives, and nothing else."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.drafts import drafting_checkpoint
from support.problems import CHECKPOINT

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.checkpoint.convert import convert_checkpoint
from qwen_moe_jax.checkpoint.parts import holds_part, read_part
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.engine.drafting import Drafts, after_step, after_token, no_drafts
from qwen_moe_jax.engine.shapes import right_pad
from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.evaluation.word_problems import held_out
from qwen_moe_jax.formats.cache import DeltaNetCache, empty_cache

# Log-probabilities from passes over other numbers of tokens: float32 sums in other orders, of logits of
# about 5.
LOGPROB_TOLERANCE = 2e-4
# Recurrent states after the same tokens by the same steps, whose inputs were computed for several at a time:
# over the largest value, a few units in the last place for each of the layers before.
STATE_TOLERANCE = 2e-5

# None of them the most likely token as it is, which other programs give: the last test has those.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 0.01},
    {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.3},
    {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.4, "presence_penalty": 0.1},
)


@functools.cache
def folder(seed: int, poisoned: bool = False) -> Path:
    made = Path(tempfile.mkdtemp())
    drafting_checkpoint(made, seed, poisoned=poisoned)
    return made


@functools.cache
def model(seed: int, drafts: int, poisoned: bool = False) -> QwenMoe:
    return QwenMoe.from_pretrained(folder(seed, poisoned), dtype="float32", draft_tokens=drafts)


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: list[int]
    options: dict[str, Any]
    sequences: list[list[int]]
    logprobs: list[list[float]]


@functools.cache
def requests(seed: int) -> list[Asked]:
    """Requests with what they get without drafts."""
    rng, plain = np.random.default_rng(seed), model(seed, 0)
    vocab, asked = plain.config.vocab_size, []
    trunk = rng.integers(0, vocab, 130).tolist()
    with plain.engine(max_rows=2, memory=1 << 25) as engine:
        for number in range(12):
            begin = trunk[: int(rng.choice([0, 5, 63, 64, 65, 127, 128]))]
            prompt = [*begin, *rng.integers(0, vocab, int(rng.integers(1, 12))).tolist()]
            options = OPTIONS[number % len(OPTIONS)] | {
                "max_new_tokens": int(rng.choice([1, 2, 3, 20, 90])),
                "seed": number,
                "eos_token_id": rng.integers(0, vocab, 1).tolist(),
                "return_logprobs": True,
            }
            if options.get("do_sample"):
                options["num_return_sequences"] = 2
            out = engine.submit(prompt, **options).result()
            assert out.logprobs is not None
            asked.append(Asked(prompt, options, out.sequences, out.logprobs))
    return asked


def check(
    drafting: QwenMoe, asked: list[Asked], order: np.random.Generator, **engine: Any
) -> tuple[int, int]:
    """Runs the requests in an order; returns (drafted, accepted)."""
    with drafting.engine(**engine) as made:
        for _ in range(2):  # the second time, beginnings are found in the prefix cache
            turns = order.permutation(len(asked))
            found = dict(made.run([asked[i].prompt for i in turns], [asked[i].options for i in turns]))
            for place, number in enumerate(turns):
                out, wanted = found[place], asked[number]
                assert out.sequences == wanted.sequences
                assert out.logprobs is not None
                for ours, theirs in zip(out.logprobs, wanted.logprobs, strict=True):
                    np.testing.assert_allclose(ours, theirs, atol=LOGPROB_TOLERANCE)
        stats = made.stats()
        assert stats.free_pages == stats.pages
        assert stats.compiled_programs <= 24
        return stats.drafted_tokens, stats.accepted_tokens


# Layers of both kinds, one, three and four key heads, and one token a prompt.
@pytest.mark.parametrize(("seed", "drafts"), [(9, 3)])
def test_with_drafts_every_request_gets_the_tokens_that_it_gets_without(seed: int, drafts: int) -> None:
    drafted, accepted = check(model(seed, drafts), requests(seed), np.random.default_rng(1), max_rows=2)
    assert accepted > drafted / 8 > 10


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "drafts"), [(22, 2), (5, 4)])
def test_for_every_number_of_drafts_the_tokens_are_those_without(seed: int, drafts: int) -> None:
    check(model(seed, drafts), requests(seed), np.random.default_rng(drafts), max_rows=2)


@pytest.mark.slow
def test_drafts_that_say_anything_change_nothing() -> None:
    plain, poisoned = model(0, 0, poisoned=True), model(0, 3, poisoned=True)
    rng = np.random.default_rng(3)
    drafted = accepted = 0
    for length in (1, 40, 64):
        prompt = [rng.integers(0, plain.config.vocab_size, length).tolist()]
        options = {"max_new_tokens": 60, "eos_token_id": []}
        found = poisoned.generate(prompt, **options)
        assert found.sequences == plain.generate(prompt, **options).sequences
        drafted += found.usage.drafted_tokens
        accepted += found.usage.accepted_tokens
    assert accepted < drafted / 4
    # they rest most of the time: a pass of three drafts for each token would be 3 * 180
    assert 0 < drafted < 150


@pytest.mark.slow
def test_rows_that_gave_their_pages_back_go_on_with_the_same_tokens() -> None:
    plain, drafting = model(9, 0), model(9, 3)
    forward = drafting._steps.forward
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, plain.config.vocab_size, 50).tolist() for _ in range(2)]
    options = {"max_new_tokens": 100, "eos_token_id": [], "frequency_penalty": 0.01}
    memory = 2 * forward.state_bytes + 4 * forward.page_bytes
    with drafting.engine(max_rows=2, memory=memory, prefix_cache=False) as tight:
        found = dict(tight.run(prompts, options))
        assert tight.stats().preemptions > 0
        assert tight.stats().accepted_tokens > 0
    with plain.engine(max_rows=2, memory=1 << 25) as roomy:
        assert dict(roomy.run(prompts, options))[1].sequences == found[1].sequences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "choices"),
    [
        ((2, 2, 2), {"attention": "data", "shared_expert": "sharded"}),
        ((1, 2, 2), {"expert_dispatch": "all_to_all", "shared_expert": "outside"}),
    ],
)
def test_on_every_kind_of_mesh_drafts_give_the_tokens_of_one_device_without(sizes, choices) -> None:
    on_mesh = QwenMoe.from_pretrained(
        folder(9), dtype="float32", mesh=make_mesh(*sizes), draft_tokens=3, **choices
    )
    assert on_mesh.layout is not None
    rows = on_mesh.layout.batch_multiple
    drafted, accepted = check(on_mesh, requests(9), np.random.default_rng(2), max_rows=rows, memory=1 << 24)
    assert accepted > drafted / 8 > 10


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kernels"), [(0, "auto"), (3, "xla")])
def test_a_state_after_accepted_drafts_is_the_state_after_these_tokens_one_by_one(
    seed: int, kernels: str
) -> None:
    loaded = QwenMoe.from_pretrained(folder(seed), dtype="float32", draft_tokens=0, kernels=kernels)
    forward, decoder, params = loaded._steps.forward, loaded._decoder, loaded._parameters
    rng = np.random.default_rng(seed)
    lengths, counts, tokens = [7, 1, 30], jnp.asarray([0, 2, 4], jnp.int32), 4
    rows = [rng.integers(0, loaded.config.vocab_size, n).astype(np.int32) for n in lengths]
    given, valid = right_pad(rows, 32)
    compute = jnp.dtype(jnp.float32)
    _, cache = forward.hidden(params, given, valid, empty_cache(decoder.config, 3, 64, compute, compute))
    more = jnp.asarray(rng.integers(0, loaded.config.vocab_size, (3, tokens)), jnp.int32)
    before = jax.tree.map(np.asarray, cache.layers)
    _, looked = jax.jit(forward.look)(params, more, jnp.ones((3, tokens), bool), cache)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, cache.layers), before)
    slots = jnp.arange(3, dtype=jnp.int32)
    accepted = jax.jit(forward.accept)(params, looked, counts, slots, cache.layers)
    for place in range(tokens):
        one = (place < counts)[:, None]
        _, cache = forward.hidden(params, more[:, place : place + 1], one, cache)
    for ours, theirs in zip(accepted, cache.layers, strict=True):
        if isinstance(ours, DeltaNetCache):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=STATE_TOLERANCE * np.abs(b).max())


@pytest.mark.slow
def test_a_drawn_token_has_the_probability_that_the_model_gives_it() -> None:
    """Pearson's statistic over the 8 likeliest second tokens and the rest, of those among 2,000 samples with
    drafts that begin alike. At 8 degrees of freedom it passes 26.1 once in a thousand; were n of them drawn
    from q instead of p, with n sum (q - p)^2 / p = 36, it would 94 times in a hundred."""
    drafting = model(0, 2)
    prompt, samples = [3, 1, 4], 2000
    config = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.8, "eos_token_id": []}
    with drafting.engine(max_rows=1) as engine:  # others would be other programs
        out = engine.submit(prompt, max_new_tokens=3, num_return_sequences=samples, **config).result()
    assert out.usage.accepted_tokens > samples / 10
    first = np.bincount([row[0] for row in out.sequences]).argmax()
    rows = [row for row in out.sequences if row[0] == first]
    logits = np.asarray(drafting.logits([[*prompt, int(first)]])[0, -1], np.float64) / 0.8
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    likely = np.argsort(-probabilities)[:8]
    counts = np.bincount([row[1] for row in rows], minlength=len(probabilities))
    observed = np.append(counts[likely], len(rows) - counts[likely].sum())
    expected = len(rows) * np.append(probabilities[likely], 1 - probabilities[likely].sum())
    assert ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 26.1


@pytest.mark.slow
def test_the_trained_layer_drafts_and_nothing_behind_a_stop_string_is_shown() -> None:
    plain, drafting = (
        QwenMoe.from_pretrained(CHECKPOINT, dtype="float32", draft_tokens=drafts) for drafts in (0, 3)
    )
    chats = [[{"role": "user", "content": problem.question}] for problem in held_out(6, 0)]
    drafted = accepted = 0
    for chat in chats:
        found = drafting.generate(chat, max_new_tokens=64)
        assert found.texts == plain.generate(chat, max_new_tokens=64).texts
        drafted += found.usage.drafted_tokens
        accepted += found.usage.accepted_tokens
    assert accepted > 0.8 * drafted > 60
    # in the middle of what one pass accepts
    options = {"stop_strings": ["= 1", "he answer"], "max_new_tokens": 64}
    for chat in chats[:3]:
        pieces = list(drafting.stream(chat, **options))
        out = plain.generate(chat, **options)
        assert out.texts is not None
        assert "".join(piece.text for piece in pieces) == out.texts[0]
        assert [piece.token_id for piece in pieces] == out.sequences[0]
        assert pieces[-1].finish_reason == out.finish_reasons[0] == "stop"


# The rule.


COST = 0.45


def _state(gain: float, rest: int = 0, next_rest: int = 32) -> Drafts:
    return dataclasses.replace(
        no_drafts(1, 3),
        gain=jnp.asarray([gain], jnp.float32),
        rest=jnp.asarray([rest]),
        next_rest=jnp.asarray([next_rest]),
    )


def _after(drafts: Drafts, used: int, emitted: int) -> Drafts:
    return after_step(drafts, jnp.asarray([used]), jnp.asarray([emitted]), COST)


def test_a_row_whose_drafts_fail_rests_longer_each_time() -> None:
    drafts = _state(0.75)
    for _ in range(3):
        drafts = _after(drafts, 3, 1)
        assert int(drafts.rest[0]) == 0
    drafts = _after(drafts, 3, 1)
    assert int(drafts.rest[0]) == 32
    assert int(drafts.next_rest[0]) == 64
    for _ in range(32):
        assert int(drafts.rest[0]) > 0
        drafts = after_token(drafts, jnp.asarray([1]))
    assert int(drafts.rest[0]) == 0
    drafts = _after(drafts, 3, 1)
    assert (int(drafts.rest[0]), int(drafts.next_rest[0])) == (64, 128)


def test_a_row_goes_on_where_its_drafts_give_more_than_they_cost() -> None:
    for used, emitted in ((3, 4), (1, 2), (2, 2)):  # 4 for 2.35, 2 for 1.45, 2 for 1.9
        drafts = _state(0.75)
        for _ in range(60):
            drafts = _after(drafts, used, emitted)
            assert int(drafts.rest[0]) == 0
        assert float(drafts.gain[0]) == pytest.approx(emitted - 1 - COST * used, abs=0.02)
    drafts = _state(0.75)
    for _ in range(60):  # 2 for 2.35: a draft holds in every step, and that is not enough
        drafts = _after(drafts, 3, 2)
    assert int(drafts.rest[0]) > 0
    nothing = _after(_state(0.75), 0, 1)
    assert float(nothing.gain[0]) == 0.75


# What is asked for.


@pytest.mark.slow
def test_drafts_are_asked_for_where_there_are_any(tmp_path) -> None:
    drafting = model(9, 3)
    out = drafting.generate([[1, 2, 3]], max_new_tokens=30, eos_token_id=[], draft_tokens=0)
    assert out.usage.drafted_tokens == out.usage.accepted_tokens == 0
    some = drafting.generate([[1, 2, 3]], max_new_tokens=30, eos_token_id=[], draft_tokens=1)
    assert 0 < some.usage.drafted_tokens <= 30
    more = drafting.generate([[1, 2, 3]], max_new_tokens=30, eos_token_id=[])
    assert more.usage.accepted_tokens > 5
    assert out.sequences == some.sequences == more.sequences
    assert QwenMoe.from_pretrained(folder(9)).draft_tokens == 0  # "auto", on a CPU
    with pytest.raises(InputError, match="draft_tokens is 4, and this model drafts at most 3"):
        drafting.generate([[1]], draft_tokens=4)
    with pytest.raises(InputError, match="draft_tokens is -1; expected 0"):
        drafting.generate([[1]], draft_tokens=-1)
    for wrong in (-1, 9, True, "some", 1.5):
        with pytest.raises(InputError, match="expected 0 to 8"):
            QwenMoe.from_pretrained(folder(9), draft_tokens=wrong)
    assert QwenMoe.from_pretrained(folder(9), draft_tokens="auto", exact=True).draft_tokens == 0
    model(9, 0).save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="no multi-token prediction"):
        QwenMoe.from_pretrained(tmp_path / "text", draft_tokens=1)


@pytest.mark.slow
def test_a_model_that_drafts_is_saved_with_its_drafter(tmp_path) -> None:
    drafting = model(9, 3)
    drafting.save_pretrained(tmp_path / "whole")
    before, after = (
        {key: np.asarray(value) for key, value in read_part(place, "mtp")[0].items()}
        for place in (folder(9), tmp_path / "whole")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert holds_part(tmp_path / "whole", "mtp")
    on_mesh = QwenMoe.from_pretrained(
        folder(9), dtype="float32", mesh=make_mesh(1, 2, 2), draft_tokens=3, shared_expert="sharded"
    )
    on_mesh.save_pretrained(tmp_path / "mesh")
    for name, value in read_part(tmp_path / "mesh", "mtp")[0].items():
        np.testing.assert_array_equal(value, before[name])
    on_mesh.save_orbax(tmp_path / "orbax")
    convert_checkpoint(folder(9), tmp_path / "converted")
    prompt, options = [[5, 4, 3, 2]], {"max_new_tokens": 40, "eos_token_id": []}
    wanted = drafting.generate(prompt, **options)
    for place in ("orbax", "converted"):
        found = QwenMoe.from_pretrained(tmp_path / place, draft_tokens=3)
        assert "mtp" not in found.skipped
        for name, value in read_part(tmp_path / place, "mtp")[0].items():
            np.testing.assert_array_equal(value, before[name])
        out = found.generate(prompt, **options)
        assert (out.sequences, out.usage.accepted_tokens) == (wanted.sequences, wanted.usage.accepted_tokens)
    assert set(QwenMoe.from_pretrained(tmp_path / "orbax", draft_tokens=0).skipped) == {"mtp"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (1, 2, 2)])
def test_in_float8_drafts_give_the_tokens_without_and_the_drafter_is_float8_too(sizes, tmp_path) -> None:
    quantize_checkpoint(folder(9), tmp_path / "fp8")
    assert holds_part(tmp_path / "fp8", "mtp")
    mesh = None if sizes is None else make_mesh(*sizes)
    plain, drafting = (
        QwenMoe.from_pretrained(tmp_path / "fp8", draft_tokens=k, mesh=mesh, shared_expert="sharded")
        for k in (0, 3)
    )
    name = "mtp.layers.0.mlp.experts.down_proj"
    assert drafting._parameters[name].dtype == jnp.float8_e4m3fn
    prompts = [np.random.default_rng(n).integers(0, plain.config.vocab_size, 20).tolist() for n in range(4)]
    options = {"max_new_tokens": 50, "eos_token_id": [], "frequency_penalty": 0.01}
    wanted, found = plain.generate(prompts, **options), drafting.generate(prompts, **options)
    assert found.sequences == wanted.sequences
    assert found.usage.accepted_tokens > found.usage.drafted_tokens / 8 > 4
    drafting.save_pretrained(tmp_path / "again")
    before, after = (read_part(tmp_path / place, "mtp")[0] for place in ("fp8", "again"))
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (1, 2, 1)])
def test_with_exact_every_token_is_the_one_without_drafts_however_close_two_are(sizes) -> None:
    mesh = None if sizes is None else make_mesh(*sizes)
    plain, drafting = (
        QwenMoe.from_pretrained(folder(9), dtype="bfloat16", draft_tokens=k, exact=True, mesh=mesh)
        for k in (0, 3)
    )
    prompts = [np.random.default_rng(n).integers(0, plain.config.vocab_size, 30).tolist() for n in range(6)]
    options = {"max_new_tokens": 80, "eos_token_id": [], "return_logprobs": True}
    with plain.engine(max_rows=2, memory=1 << 25) as engine:
        wanted = dict(engine.run(prompts, options))
    with drafting.engine(max_rows=2, memory=1 << 25) as engine:
        found = dict(engine.run(prompts, options))
        assert engine.stats().accepted_tokens > 40
    for number, out in wanted.items():
        assert found[number].sequences == out.sequences
        assert found[number].logprobs == out.logprobs  # every bit

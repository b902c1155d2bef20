"""generate and stream on a tiny random checkpoint: seeds, ends, logprobs, bounds and errors."""

import json

import jax
import numpy as np
import pytest
from support.configs import random_config, random_ids
from support.reference import build_reference, save_reference
from text_files import write_text_files

from qwen_moe_jax import GenerationConfig, QwenMoe
from qwen_moe_jax.errors import InputError

VOCAB, CONTEXT = 300, 160
# Log-probabilities by the cached one-token path and by one forward: float32 sums in other orders, of
# logits of about 5.
LOGPROB_TOLERANCE = 2e-4
SAMPLE = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    config = random_config(1) | {
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    }
    save_reference(build_reference(config, seed=1), path)
    # ends of text are chosen by each test: a random model would hit them anywhere
    (path / "generation_config.json").unlink(missing_ok=True)
    return write_text_files(path, VOCAB)


@pytest.fixture(scope="module")
def model(folder):
    loaded = QwenMoe.from_pretrained(folder, compilation_cache=None)
    loaded._eos_ids = ()
    return loaded


def prompts(*lengths: int) -> list[list[int]]:
    return [random_ids({"vocab_size": VOCAB}, length, seed=length).tolist() for length in lengths]


THREE = (5, 11, 8)


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(prompts(*THREE), max_new_tokens=20, return_logprobs=True)


@pytest.fixture(scope="module")
def sampled(model):
    return model.generate(prompts(*THREE), max_new_tokens=20, seed=[3, 4, 5], **SAMPLE)


def test_equal_seeds_give_equal_samples_and_other_seeds_others(model, sampled):
    again = model.generate(prompts(*THREE), max_new_tokens=20, seed=[3, 4, 5], **SAMPLE)
    other = model.generate(prompts(*THREE), max_new_tokens=20, seed=[3, 4, 6], **SAMPLE)
    assert again.sequences == sampled.sequences
    assert other.sequences[:2] == sampled.sequences[:2]
    assert other.sequences[2] != sampled.sequences[2]


def test_a_sample_does_not_depend_on_its_neighbours_or_its_place(model, sampled):
    first, second, third = prompts(*THREE)
    moved = model.generate([third, first, prompts(9)[0]], max_new_tokens=20, seed=[5, 3, 77], **SAMPLE)
    assert moved.sequences[:2] == [sampled.sequences[2], sampled.sequences[0]]
    alone = model.generate([second], max_new_tokens=20, seed=4, **SAMPLE)
    assert alone.sequences == [sampled.sequences[1]]


def test_a_greedy_row_equals_the_row_alone(model, greedy):
    for prompt, expected in zip(prompts(*THREE), greedy.sequences, strict=True):
        assert model.generate([prompt], max_new_tokens=20).sequences == [expected]


def test_padding_on_either_side_changes_nothing(model, greedy):
    rows = prompts(*THREE)
    for left in (True, False):
        ids, mask = np.full((3, 11), 7), np.zeros((3, 11), int)
        for index, row in enumerate(rows):
            place = slice(11 - len(row), 11) if left else slice(len(row))
            ids[index, place], mask[index, place] = row, 1
        out = model.generate(ids, attention_mask=mask, max_new_tokens=20)
        assert out.sequences == greedy.sequences


def test_several_sequences_differ_and_stand_next_to_their_prompt(model):
    rows = prompts(*THREE)  # a batch that is already compiled
    out = model.generate(rows, max_new_tokens=12, num_return_sequences=2, seed=[3, 9, 4], **SAMPLE)
    assert len(out.sequences) == 6
    assert len(set(map(tuple, out.sequences))) == 6
    for number, (row, seed) in enumerate(zip(rows, (3, 9, 4), strict=True)):
        alone = model.generate([row], max_new_tokens=12, seed=seed, **SAMPLE)
        assert alone.sequences[0] == out.sequences[2 * number]


def test_any_of_several_eos_ids_ends_a_row_and_is_kept(model, greedy):
    ends = sorted({greedy.sequences[0][4], greedy.sequences[1][9]})
    out = model.generate(prompts(*THREE), max_new_tokens=20, eos_token_id=ends)
    for got, whole, reason in zip(out.sequences, greedy.sequences, out.finish_reasons, strict=True):
        places = [i for i, token in enumerate(whole) if token in ends]
        assert got == (whole[: places[0] + 1] if places else whole)
        assert reason == ("stop" if places else "length")
    assert out.usage.generated_tokens == sum(map(len, out.sequences))


def test_the_first_token_may_end_a_row(model, greedy):
    out = model.generate(prompts(*THREE)[:1], max_new_tokens=20, eos_token_id=greedy.sequences[0][0])
    assert out.sequences == [greedy.sequences[0][:1]]
    assert out.finish_reasons == ["stop"]


def test_a_checkpoints_own_end_tokens_apply_unless_others_are_given(folder, model, greedy):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [greedy.sequences[0][4], 299]}))
    try:
        own = QwenMoe.from_pretrained(folder, compilation_cache=None)
    finally:
        file.unlink()
    own._steps, own._engine = model._steps, model._own_engine()  # the same weights, already compiled
    whole = greedy.sequences[0]
    end = whole.index(whole[4]) + 1
    assert own.generate(prompts(*THREE)[:1], max_new_tokens=20).sequences == [whole[:end]]
    assert own.generate(prompts(*THREE)[:1], max_new_tokens=20, eos_token_id=[]).sequences == [whole]


def test_a_stop_string_ends_a_row_before_it(model, greedy):
    text = greedy.texts[0]
    start = len(text) // 2
    stop = text[start : start + 3]
    out = model.generate(prompts(*THREE)[:1], max_new_tokens=20, stop_strings=[stop, "never found"])
    assert out.texts[0] == text[: text.index(stop)]
    assert out.finish_reasons == ["stop"]
    tokens = out.sequences[0]
    assert tokens == greedy.sequences[0][: len(tokens)]
    assert stop in model.tokenizer.decode(tokens)
    assert stop not in model.tokenizer.decode(tokens[:-1])


def test_logprobs_are_those_of_one_forward_over_the_whole_text(model, greedy):
    sampled = model.generate(
        prompts(*THREE), max_new_tokens=20, return_logprobs=True, repetition_penalty=1.3, **SAMPLE
    )
    for out in (greedy, sampled):
        for prompt, tokens, logprobs in zip(prompts(*THREE), out.sequences, out.logprobs, strict=True):
            logits = np.asarray(model.logits([prompt + tokens]))[0]
            expected = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : -1]
            expected = expected[np.arange(len(tokens)), tokens]
            np.testing.assert_allclose(logprobs, expected, atol=LOGPROB_TOLERANCE)
    assert model.generate(prompts(*THREE), max_new_tokens=20).logprobs is None


def test_output_and_usage_have_one_entry_a_row_and_count_tokens(model, greedy):
    assert greedy.finish_reasons == ["length"] * 3
    assert [len(row) for row in greedy.sequences] == [20] * 3
    assert greedy.texts == [model.tokenizer.decode(row) for row in greedy.sequences]
    assert greedy.usage.prompt_tokens == sum(THREE)
    assert greedy.usage.generated_tokens == 60
    assert greedy.usage.prefill_seconds > 0
    assert greedy.usage.decode_seconds > 0


@pytest.mark.parametrize("options", [{}, SAMPLE | {"seed": 8}, {"stop_strings": "e"}])
def test_a_stream_is_what_generate_returns(model, options):
    prompt = "Tom has three apples"
    whole = model.generate(prompt, max_new_tokens=20, **options)
    pieces = list(model.stream(prompt, max_new_tokens=20, **options))
    assert [piece.token_id for piece in pieces] == whole.sequences[0]
    assert "".join(piece.text for piece in pieces) == whole.texts[0]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reasons[0]


def test_text_chat_and_ids_of_the_same_prompt_give_the_same(model):
    chat = [{"role": "user", "content": "How many apples?"}]
    text = model.chat_template.render(chat, enable_thinking=False)
    expected = model.generate([model.tokenizer.encode(text)], max_new_tokens=5).sequences
    assert model.generate(text, max_new_tokens=5).sequences == expected
    assert model.generate(chat, max_new_tokens=5, enable_thinking=False).sequences == expected
    thinking = model.generate(chat, GenerationConfig(max_new_tokens=5))  # the template's default
    assert thinking.sequences != expected


def test_options_override_the_generation_config(model, greedy):
    config = GenerationConfig(max_new_tokens=7)
    assert model.generate(prompts(5), config).sequences == [greedy.sequences[0][:7]]
    assert model.generate(prompts(5), config, max_new_tokens=3).sequences == [greedy.sequences[0][:3]]


def test_forty_prompt_lengths_and_other_options_compile_nothing_new(model):
    options = SAMPLE | {"top_k": 5, "max_new_tokens": 4}
    engine = model._own_engine()
    model.generate(prompts(3), max_new_tokens=4)
    model.generate(prompts(3), **options)
    model.generate(prompts(40), max_new_tokens=4)
    programs = set(engine._core.programs)
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in range(1, 41):
            model.generate(prompts(length), max_new_tokens=4)
        for change in ({"temperature": 0.4}, {"top_k": 9}, {"top_p": 0.3}, {"min_p": 0.2}, {"seed": 12}):
            model.generate(prompts(3), **(options | change))
        model.generate(prompts(3), **(options | {"max_new_tokens": 9, "eos_token_id": 4}))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert set(engine._core.programs) - programs <= {("prefill", 1, 16), ("move", False)}
    assert len(compiled) <= len(set(engine._core.programs) - programs)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (prompts(CONTEXT + 1), {}, f"prompt has {CONTEXT + 1} tokens, but the context holds {CONTEXT}"),
        (prompts(CONTEXT), {"max_new_tokens": 1}, f"the context holds {CONTEXT}; shorten it"),
        (prompts(CONTEXT - 5), {"max_new_tokens": 6}, "give max_new_tokens at most 5"),
        ("", {}, "prompt 0 is empty"),
        ([], {}, "prompt is empty"),
        ([[1, VOCAB]], {}, f"token id {VOCAB} is outside"),
        ([[1]], {"eos_token_id": VOCAB}, f"the end token {VOCAB} is outside"),
        ([[1]], {"temprature": 1.0}, "did you mean 'temperature'"),
        ([[1]], {"temperature": 0.5}, "give do_sample=True"),
        ([[1], [2]], {"seed": [1]}, "seed holds 1 values for 2 prompts"),
        ([[1]], {"enable_thinking": True}, "only applies to chat messages"),
        ([[1]], {"generation_config": {"top_k": 1}}, "expected a GenerationConfig"),
    ],
)
def test_bad_input_to_generate_and_stream_is_an_error_of_the_call(model, prompt, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, **options)
    with pytest.raises(InputError, match=message if len(prompt) < 2 else "."):
        model.stream(prompt, **options)


def test_logits_refuse_text_and_take_a_full_context(model):
    with pytest.raises(InputError, match="logits takes token ids"):
        model.logits("text")
    with pytest.raises(InputError, match="context holds"):
        model.logits(prompts(CONTEXT + 1))


def test_stream_takes_one_prompt_and_one_sequence(model):
    with pytest.raises(InputError, match="stream takes one prompt"):
        model.stream([[1], [2]])
    with pytest.raises(InputError, match="stream takes one prompt"):
        model.stream([[1]], num_return_sequences=2, **SAMPLE)


def test_without_tokenizer_ids_work_and_text_is_refused(model, greedy, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    out = model.generate(prompts(5), max_new_tokens=20)
    assert out.texts is None
    assert out.sequences == greedy.sequences[:1]
    for call in (
        lambda: model.generate("text"),
        lambda: model.generate([[1]], stop_strings="x"),
        lambda: model.stream([[1]]),
    ):
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            call()


@pytest.fixture
def jax_cache_setting():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_the_folder_given(folder, tmp_path, jax_cache_setting):
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # JAX opens its cache once a process
    cache = tmp_path / "programs"
    cached = QwenMoe.from_pretrained(folder, compilation_cache=cache)
    assert jax.config.jax_compilation_cache_dir == str(cache)
    cached.generate(prompts(5), max_new_tokens=1)
    assert any(cache.iterdir())


def test_no_compilation_cache_leaves_the_setting_of_jax_alone(folder, tmp_path, jax_cache_setting):
    for value in (None, str(tmp_path)):
        jax.config.update("jax_compilation_cache_dir", value)
        QwenMoe.from_pretrained(folder, compilation_cache=None)
        assert jax.config.jax_compilation_cache_dir == value


def test_the_users_own_cache_folder_wins_over_the_automatic_one(folder, tmp_path, jax_cache_setting):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    QwenMoe.from_pretrained(folder)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)

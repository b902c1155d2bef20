"""GenerationConfig refuses what it cannot do, in one sentence that names the option."""

import dataclasses
import math

import pytest

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.options import GenerationConfig

BAD = {
    "max_new_tokens": [0, -1, 1.5, True, "8"],
    "do_sample": [1, 0, None, "yes"],
    "top_logprobs": [-1, 21, 1.5, True, None],
    "prompt_logprobs": [-1, 21, 1.5, True],
    "stop_token_ids": [3, "a", [1.5], None],
    "ignore_eos": [1, None],
    "temperature": [-1.0, math.inf, math.nan, 1e-9, 1e39, "1", None, True],
    "top_k": [-2, 2.0, True, None],
    "top_p": [0, -0.1, 1.1, math.nan, "0.9", None],
    "min_p": [-0.1, 1, 1.5, math.nan, None],
    "repetition_penalty": [0, -1.0, math.inf, math.nan, 1e-40, 1e39, None],
    "presence_penalty": [math.inf, -math.inf, math.nan, 1e39, "0", None],
    "frequency_penalty": [math.inf, -math.inf, math.nan, -1e39, "0", None],
    "eos_token_id": ["", "7", 1.0, True, [1, None], [1.5], [True], {3: 4}],
    "stop_strings": ["", ["a", ""], 5, [5], [None], b"ab", iter(["a"])],
    "num_return_sequences": [0, -2, 1.0, True, None],
    "seed": [-1, 2**32, 1.0, True, None, "", "12", [1, -1], [1.0], [2**32]],
    "return_logprobs": [1, None, "yes"],
    "min_new_tokens": [-1, 1.0, True, None, 129],
    "logit_bias": [5, {"7": 1.0}, {7: "a"}, [7]],
    "bad_words": [None, "word", [""], [5], 5],
    "thinking_budget": [-1, 1.0, True, "none"],
    "response_format": [5, "json_object", ["type"]],
    "draft_tokens": [-1, 1.0, True, "auto"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_an_error_that_names_option_and_value(name, value):
    sampling = {} if name == "do_sample" else {"do_sample": True}
    with pytest.raises(InputError) as error:
        GenerationConfig(**sampling, **{name: value})
    message = str(error.value)
    assert message.startswith(name)
    assert repr(value) in message or repr(math.nan) in message or name == "seed"
    assert "expected" in message


def test_every_option_has_bad_values_under_test():
    assert set(BAD) == {field.name for field in dataclasses.fields(GenerationConfig)}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("stop_string", "stop_strings")],
)
def test_an_unknown_option_suggests_the_nearest(name, nearest):
    with pytest.raises(InputError, match=f"'{name}' is not a generation option; did you mean '{nearest}'"):
        GenerationConfig().override(**{name: 1})


def test_an_option_near_to_none_lists_them_all():
    with pytest.raises(InputError) as error:
        GenerationConfig().override(zzzz=1)
    assert all(field.name in str(error.value) for field in dataclasses.fields(GenerationConfig))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"num_return_sequences": 2}],
)
def test_sampling_options_without_sampling_are_a_contradiction(options):
    with pytest.raises(InputError, match="do_sample"):
        GenerationConfig(**options)
    with pytest.raises(InputError, match="do_sample"):
        GenerationConfig().override(**options)
    assert GenerationConfig(do_sample=True, **options).do_sample


def test_turning_sampling_off_under_sampling_options_is_a_contradiction():
    with pytest.raises(InputError, match="do_sample"):
        GenerationConfig(do_sample=True, temperature=0.5).override(do_sample=False)


def test_penalties_apply_to_greedy_choice_too():
    config = GenerationConfig(repetition_penalty=1.3, presence_penalty=-0.5, frequency_penalty=0.5)
    assert not config.do_sample


def test_override_changes_a_copy():
    config = GenerationConfig()
    assert config.override(max_new_tokens=3).max_new_tokens == 3
    assert config.max_new_tokens == GenerationConfig().max_new_tokens


@pytest.mark.parametrize(
    ("given", "ids"), [(None, None), (7, (7,)), (0, (0,)), ([7, 9], (7, 9)), ((7,), (7,)), ([], ())]
)
def test_eos_token_id_takes_one_several_none_or_the_checkpoints_own(given, ids):
    assert GenerationConfig(eos_token_id=given).eos_ids == ids


@pytest.mark.parametrize(
    ("given", "stops"), [(None, ()), ("ab", ("ab",)), (["ab", "c"], ("ab", "c")), (("x",), ("x",)), ([], ())]
)
def test_stop_strings_take_one_or_several(given, stops):
    assert GenerationConfig(stop_strings=given).stops == stops


def test_one_seed_serves_all_prompts_and_a_list_gives_each_its_own():
    assert GenerationConfig(seed=5).seeds(3) == [5, 5, 5]
    assert GenerationConfig(seed=[5, 0, 2**32 - 1]).seeds(3) == [5, 0, 2**32 - 1]


@pytest.mark.parametrize("seed", [[], [1], [1, 2, 3]])
def test_a_list_of_seeds_must_have_one_for_each_prompt(seed):
    with pytest.raises(InputError, match=f"seed holds {len(seed)} values for 2 prompts"):
        GenerationConfig(seed=seed).seeds(2)


def test_limits_of_every_range_are_accepted():
    GenerationConfig(
        do_sample=True, max_new_tokens=1, temperature=1e-6, top_k=0, top_p=1, min_p=0, repetition_penalty=1e6
    )
    GenerationConfig(do_sample=True, temperature=1e6, top_k=2**40, top_p=1e-9, min_p=0.999)
    GenerationConfig(presence_penalty=-1e6, frequency_penalty=1e6, repetition_penalty=1e-6)


def test_options_mean_what_they_mean_elsewhere() -> None:
    drawn = GenerationConfig(do_sample=True, temperature=0.7, top_k=-1)
    assert drawn.row_sampling(0, 0).top_k == 0
    cold = GenerationConfig(do_sample=True, temperature=0)
    assert cold.row_sampling(0, 0).greedy
    assert GenerationConfig(temperature=0, top_k=-1).row_sampling(0, 0).greedy
    assert GenerationConfig(eos_token_id=3, ignore_eos=True).eos_ids == ()
    for ids in (3, "a", [1.5], None):
        with pytest.raises(InputError, match="stop_token_ids is"):
            GenerationConfig(stop_token_ids=ids)


def test_presets_are_the_model_cards_and_give_way_to_what_is_said_beside_them() -> None:
    config = GenerationConfig().override(preset="thinking-coding", top_p=0.9)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.6, 0.9, 20)
    assert GenerationConfig().override(preset="non-thinking").presence_penalty == 1.5
    with pytest.raises(InputError, match="preset is 'fast'; expected one of thinking, "):
        GenerationConfig().override(preset="fast")

"""What has a say in the next token: forced ends of thinking, banned words, forms; alone and in the engine."""

import copy
import json
import re

import jsonschema
import numpy as np
import pytest
from support.slow import some

from qwen_moe_jax import QwenMoe, make_mesh
from qwen_moe_jax.engine.sampling import mask_words
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.chat import ChatTemplate
from qwen_moe_jax.generation.forms import Forms, grammar_of
from qwen_moe_jax.generation.guides import AfterThinking, AllOf, BannedWords, ThinkingBudget

PROBLEM = "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?"
CHAT = [{"role": "user", "content": PROBLEM}]
OPENED = f"<|im_start|>user\n{PROBLEM}<|im_end|>\n<|im_start|>assistant\n<think>\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
        "unit": {"enum": ["apples", "pears"]},
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["answer", "unit", "steps"],
    "additionalProperties": False,
}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def model():
    return QwenMoe.from_pretrained("checkpoints/abacus", dtype="float32", draft_tokens=0)


@pytest.fixture(scope="module")
def drafting():
    return QwenMoe.from_pretrained("checkpoints/abacus", dtype="float32", draft_tokens=3)


def masks(guide, drafts, vocab):
    """Which tokens a guide allows, bool [drafts + 1, vocab]."""
    words = np.full((len(drafts) + 1, mask_words(vocab)), 0xFFFFFFFF, np.uint32)
    guide.allow(drafts, words)
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)


def follow(guide, rng, vocab, wanted=None, steps=60):
    """Random tokens that a guide allows, with its masks behind drafts compared with those without."""
    found = []
    for _ in range(steps):
        drafts = [int(t) for t in rng.integers(0, vocab, 3)]
        if wanted is not None and rng.random() < 0.7:
            drafts = (wanted[len(found) :] + drafts)[:3]
        ahead, now = masks(guide, drafts, vocab), masks(guide, [], vocab)
        assert (ahead[0] == now[0]).all()
        choices = np.flatnonzero(now[0])
        token = drafts[0] if now[0, drafts[0]] else int(rng.choice(choices))
        found.append(token)
        if guide.accept(token):
            break
        if token == drafts[0]:
            assert (masks(guide, [], vocab)[0] == ahead[1]).all()
    return found


@pytest.mark.parametrize("seed", range(6))
def test_masks_behind_drafts_are_those_that_come_once_they_are_chosen(model, seed):
    rng, tokenizer, vocab = np.random.default_rng(seed), model.tokenizer, model.config.vocab_size
    forms = Forms(tokenizer, vocab)

    def form():
        return forms.guide(grammar_of(AS_JSON), model.end_ids)

    end = tokenizer.encode("\n</think>\n\n")
    reply = tokenizer.encode('{"answer": 12, "unit": "pears", "steps": []}')
    cases = {
        "form": (form(), reply),
        "budget": (ThinkingBudget(tokenizer, 3, opened=True), [9, 9, 9, *end]),
        "banned": (BannedWords(tokenizer, ["19", "apples are", "="]), tokenizer.encode("so 19 = apples are")),
        "form behind thinking": (
            AfterThinking(form(), tokenizer),
            tokenizer.encode("</think>") + tokenizer.encode("\n\n") + reply,
        ),
        "all of them": (
            AllOf([BannedWords(tokenizer, ["pears"]), AfterThinking(form(), tokenizer)]),
            tokenizer.encode("x</think>\n\n"),
        ),
    }
    for guide, wanted in cases.values():
        follow(guide, rng, vocab, wanted)


def test_a_budget_forces_the_end_of_thinking_and_then_lets_go(model):
    out = model.generate(OPENED, thinking_budget=5, max_new_tokens=40, do_sample=True, seed=[4])
    thought, _, rest = out.texts[0].partition("</think>")
    assert len(model.tokenizer.encode(thought.removesuffix("\n"))) <= 5
    assert rest.startswith("\n\n")
    assert rest.strip()
    untouched = model.generate(CHAT, thinking_budget=0)
    assert untouched.sequences == model.generate(CHAT).sequences  # abacus does not think


@pytest.mark.slow
def test_banned_words_do_not_appear_however_they_are_divided(model):
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.5, "num_return_sequences": 16}
    free = model.generate(CHAT, seed=3, **options)
    assert sum("answer" in text for text in free.texts) > 8
    banned = ["answer", "9", " 1"]
    out = model.generate(CHAT, seed=3, bad_words=banned, **options)
    assert not [word for word in banned for text in out.texts if word in text]


def test_bias_bans_and_forces_and_ends_are_held_back(model):
    ids = model.tokenizer.encode
    assert "9" not in model.generate(CHAT, logit_bias={ids("9")[0]: -float("inf")}).texts[0]
    forced = model.generate(CHAT, logit_bias={ids("7")[0]: 1e6}, max_new_tokens=5)
    assert forced.texts[0] == "77777"
    plain = len(model.generate(CHAT).sequences[0])
    for least in (plain - 1, plain, plain + 1, plain + 9):
        found = model.generate(CHAT, min_new_tokens=least, max_new_tokens=plain + 30).sequences[0]
        assert len(found) >= least
        assert (len(found) == plain) == (least < plain)  # the end token itself does not count


@pytest.mark.parametrize("sampled", some([False, True], lambda i: i == 1))
def test_replies_have_their_form_and_drafts_do_not_change_them(model, drafting, sampled):
    options = {"response_format": AS_JSON, "max_new_tokens": 120, "return_logprobs": True}
    if sampled:
        options |= {"do_sample": True, "temperature": 1.3, "seed": [1, 2, 3]}
    chats = [CHAT, [{"role": "user", "content": "How many is 3 + 4?"}], CHAT]
    out = drafting.generate(chats, **options)
    alone = model.generate(chats, **options)
    assert out.sequences == alone.sequences
    natural = options | {"response_format": {"type": "regex", "pattern": r"[0-9+= .]*The answer is [0-9]+\."}}
    held = drafting.generate(chats, **natural)
    assert held.sequences == model.generate(chats, **natural).sequences
    assert held.usage.accepted_tokens > 0
    for text, reason in zip(out.texts, out.finish_reasons, strict=True):
        assert reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    # a token's log-probability is the model's own, whatever may be chosen
    prompts = [model.tokenizer.encode(model.chat_template.render(chat)) for chat in chats]
    scored = model.score(prompts, out.sequences)
    for one, logprobs in zip(scored, out.logprobs, strict=True):
        np.testing.assert_allclose(one.token_logprobs, logprobs, atol=2e-4)


def test_a_regular_expression_and_a_grammar_behind_thinking(model):
    pattern = {"type": "regex", "pattern": "(plum|pear)s? [0-9]{3}"}
    out = model.generate(OPENED, thinking_budget=4, response_format=pattern)
    assert re.fullmatch("(plum|pear)s? [0-9]{3}", out.texts[0].partition("</think>\n\n")[2])
    lark = {"type": "grammar", "grammar": 'start: "(" start ")" | /[0-9]/'}
    text = model.generate(CHAT, response_format=lark, max_new_tokens=30).texts[0]
    assert re.fullmatch(r"\(*[0-9]\)*", text)
    assert text.count("(") == text.count(")")


def test_the_likeliest_tokens_come_with_the_tokens(model, drafting):
    for one in (model, drafting):
        prompts = [model.chat_template.render(CHAT), PROBLEM]
        out = one.generate(prompts, top_logprobs=5, return_logprobs=True, max_new_tokens=12)
        pieces = list(one.stream(CHAT, top_logprobs=2, max_new_tokens=12))
        for sequence, logprobs, likeliest in zip(out.sequences, out.logprobs, out.top_logprobs, strict=True):
            assert len(likeliest) == len(sequence)
            for token, logprob, best in zip(sequence, logprobs, likeliest, strict=True):
                assert len(best) == 5
                assert next(iter(best)) == token  # greedy
                assert list(best.values()) == sorted(best.values(), reverse=True)
                assert best[token] == pytest.approx(logprob, abs=1e-6)
        assert [list(piece.top_logprobs) for piece in pieces] == [list(b)[:2] for b in out.top_logprobs[0]]
    # beside it, the logits of a pass over the whole text say the same
    scored = model.score([model.tokenizer.encode(PROBLEM)], [out.sequences[1]], top_logprobs=5)
    for best, again in zip(out.top_logprobs[1], scored[0].top_logprobs, strict=True):
        assert set(best) == set(again)


@pytest.mark.slow
def test_one_request_that_is_guided_changes_no_other(model):
    problems = [f"Tom has {n} apples. Anna gives him 7 more. How many apples has he?" for n in range(3, 9)]
    chats = [[{"role": "user", "content": text}] for text in problems]
    alone = [model.generate(chat).sequences[0] for chat in chats]
    options = [{}, {"response_format": AS_JSON}, {}, {"bad_words": ["answer"]}, {"top_logprobs": 3}, {}]
    with model.engine(max_rows=4) as engine:
        found = dict(engine.run(chats, options))
        assert engine.stats().compiled_programs <= 24
    for number in (0, 2, 4, 5):
        assert found[number].sequences[0] == alone[number]
    json.loads(found[1].texts[0])


ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "unit": {"type": "string", "enum": ["apples", "pears & <plums>"]},
            "all": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            "kind": {"anyOf": [{"type": "string"}, {"type": "null"}], "enum": ["red", "green"]},
        },
        "required": ["a", "unit", "kind"],
        "additionalProperties": False,
    },
}
NOTHING = {"type": "function", "function": {"name": "nothing"}}


@pytest.mark.parametrize("xml", [True, False])
def test_a_call_that_is_asked_for_is_made_with_arguments_of_its_schema(model, xml):
    source = model.chat_template.source + ("{# <function=...> #}" if xml else "")
    one = copy.copy(model)
    one.chat_template = ChatTemplate(source)
    wanted = {"required": {"add", "nothing"}, "nothing": {"nothing"}}
    for choice, names in wanted.items():
        if choice != "required":
            choice = {"type": "function", "function": {"name": choice}}
        out = one.generate(
            CHAT,
            tools=[ADD, NOTHING],
            tool_choice=choice,
            max_new_tokens=400,
            do_sample=True,
            temperature=1.5,
            num_return_sequences=6,
        )
        assert ("<function=" in out.texts[0]) == xml
        for message in out.messages:
            (call,) = message["tool_calls"]
            assert message["content"] is None
            assert call["function"]["name"] in names
            if call["function"]["name"] == "add":
                jsonschema.validate(json.loads(call["function"]["arguments"]), ADD["parameters"])
    plain = one.generate(CHAT, tools=[ADD], tool_choice="none")
    assert plain.sequences == one.generate(CHAT).sequences
    for options in ({"tool_choice": "required"}, {"tools": [ADD], "tool_choice": "other"}):
        with pytest.raises(InputError, match="tool_choice is"):
            one.generate(CHAT, **options)
    with pytest.raises(InputError, match="one form only"):
        one.generate(CHAT, tools=[ADD], tool_choice="required", response_format=AS_JSON)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [2, 0])
def test_guided_rows_on_a_mesh_get_what_one_device_gives(model, drafts):
    mesh = make_mesh(data=2, expert=2)
    divided = QwenMoe.from_pretrained("checkpoints/abacus", dtype="float32", mesh=mesh, draft_tokens=drafts)
    options = [{"response_format": AS_JSON}, {"top_logprobs": 3}, {"bad_words": ["answer"]}]
    chats = [CHAT, [{"role": "user", "content": "How many is 3 + 4?"}], CHAT]
    with divided.engine(max_rows=4) as engine, model.engine(max_rows=4) as alone:
        found, wanted = dict(engine.run(chats, options)), dict(alone.run(chats, options))
    for number, out in wanted.items():
        assert found[number].sequences == out.sequences
    for best, other in zip(found[1].top_logprobs[0], wanted[1].top_logprobs[0], strict=True):
        assert list(best) == list(other)
        np.testing.assert_allclose(list(best.values()), list(other.values()), atol=2e-4)


MISTAKES = {
    "type": ({"response_format": {"type": "xml"}}, "expected {'type': 'json_schema'"),
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema"),
    "invalid schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "apple"}}}},
        "response_format cannot be followed",
    ),
    "invalid pattern": ({"response_format": {"type": "regex", "pattern": "(["}}, "cannot be followed"),
    "invalid grammar": (
        {"response_format": {"type": "grammar", "grammar": "start: x"}},
        "cannot be followed",
    ),
    "least beside form": ({"response_format": {"type": "json_object"}, "min_new_tokens": 3}, "give one of"),
    "bias outside": ({"logit_bias": {10**6: 1.0}}, "outside the vocabulary"),
    "bias of text": ({"logit_bias": {"7": 1.0}}, "logit_bias is"),
    "endless bias": ({"logit_bias": {7: float("inf")}}, "logit_bias[7] is inf"),
    "bias that is no number": ({"logit_bias": {7: float("nan")}}, "logit_bias[7] is nan"),
    "too many biases": ({"logit_bias": {i: 0.5 for i in range(400)}}, "at most 320"),
    "least": ({"min_new_tokens": 300, "max_new_tokens": 200}, "min_new_tokens is 300"),
    "budget": ({"thinking_budget": -1}, "thinking_budget is -1"),
    "empty word": ({"bad_words": [""]}, "bad_words is"),
    "word": ({"bad_words": "apple"}, "bad_words is"),
}


@pytest.mark.parametrize(("options", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_says_what_was_given_and_what_is_expected(model, options, named):
    with pytest.raises(InputError, match=re.escape(named)):
        model.generate(CHAT, **options)

"""The server, spoken to by OpenAI's own client and by clients that do everything wrong."""

import asyncio
import json
import shutil
import threading
import time

import httpx
import jsonschema
import openai
import pydantic
import pytest
from starlette.requests import ClientDisconnect
from support.servers import comes_to, idle, serving
from support.slow import some

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.serving.app import Server
from qwen_moe_jax.serving.limits import Limits

CHAT = [
    {
        "role": "user",
        "content": "Tom has 12 apples. Anna gives him 7 more. How many apples does Tom have now?",
    }
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "why": {"type": "string"}}},
    },
}
# forces a call, which a model without tools would not make
CALL = {
    "type": "regex",
    "pattern": "12\n<tool_call>\n<function=add>\n<parameter=a>\n[0-9]{2}\n</parameter>\n<parameter=why>\n7\n"
    "</parameter>\n</function>\n</tool_call>",
}
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for key, value in c.function.arguments|items %}{{ key }}={{ value }};{% endfor %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
ASKED = {"model": "abacus", "messages": CHAT}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "abacus"
    shutil.copytree("checkpoints/abacus", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return QwenMoe.from_pretrained(folder, dtype="float32", draft_tokens=0)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, body_bytes=1 << 20, body_seconds=2.0) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(
    "options", some([{"temperature": 0}, {"temperature": 0.9, "seed": 5, "n": 3}], lambda i: i == 1)
)
def test_replies_are_those_of_generate_whole_and_as_a_stream(model, client, options):
    mine = (
        {"do_sample": False} if not options["temperature"] else {"do_sample": True, "top_k": -1, "top_p": 1.0}
    )
    mine |= {"temperature": options["temperature"], "seed": options["seed"]} if mine["do_sample"] else {}
    wanted = model.generate(
        CHAT, num_return_sequences=options.get("n", 1), max_new_tokens=None, return_logprobs=True, **mine
    )
    whole = client.chat.completions.create(**ASKED, **options, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in whole.choices] == wanted.texts
    assert [choice.finish_reason for choice in whole.choices] == wanted.finish_reasons
    assert whole.usage.completion_tokens == wanted.usage.generated_tokens
    assert whole.usage.prompt_tokens == wanted.usage.prompt_tokens
    for choice, logprobs, row in zip(whole.choices, wanted.logprobs, wanted.sequences, strict=True):
        content = choice.logprobs.content
        assert [one.logprob for one in content] == pytest.approx(logprobs, abs=1e-4)
        assert b"".join(bytes(one.bytes) for one in content).decode() == model.tokenizer.decode(row)
        assert all(len(one.top_logprobs) == 2 for one in content)
    texts, logprobs, reasons = {}, {}, {}
    events = list(
        client.chat.completions.create(
            **ASKED, **options, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    for event in events[:-1]:
        (choice,) = event.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        found = choice.logprobs.content if choice.logprobs else []
        logprobs.setdefault(choice.index, []).extend(one.logprob for one in found)
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[i] for i in range(len(texts))] == wanted.texts
    assert [reasons[i] for i in range(len(texts))] == wanted.finish_reasons
    for i, one in enumerate(wanted.logprobs):
        assert logprobs[i] == pytest.approx(one, abs=1e-4)
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_prompt_that_was_there_before_is_counted_as_cached(client):
    long = [{"role": "user", "content": "Tom has 12 apples. " * 30}]
    first = client.chat.completions.create(model="abacus", messages=long, max_tokens=2)
    again = client.chat.completions.create(model="abacus", messages=long, max_tokens=2)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens // 2


def test_tools_go_round(client):
    asked = ASKED | {"tools": [TOOL], "extra_body": {"response_format": CALL}, "max_tokens": 200}
    first = client.chat.completions.create(**asked).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content == "12"
    (call,) = first.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, arguments["why"], type(arguments["a"])) == ("add", "7", int)
    events = [event.choices[0] for event in client.chat.completions.create(**asked, stream=True)]
    (said,) = [delta for event in events for delta in event.delta.tool_calls or []]
    assert (said.index, said.function.name) == (0, "add")
    assert set(json.loads(said.function.arguments)) == {"a", "why"}
    assert "".join(event.delta.content or "" for event in events) == "12"
    assert events[-1].finish_reason == "tool_calls"
    turn = [*CHAT, first.message, {"role": "tool", "tool_call_id": call.id, "content": "19"}]
    assert (
        client.chat.completions.create(model="abacus", messages=turn, tools=[TOOL]).choices[0].message.content
    )
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
    bounded = {"type": "function", "function": {"name": "add", "parameters": schema}}
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        forced = client.chat.completions.create(**ASKED, tools=[bounded], tool_choice=choice, max_tokens=300)
        (call,) = forced.choices[0].message.tool_calls
        assert 0 <= json.loads(call.function.arguments)["a"] <= 99
    plain = client.chat.completions.create(**asked | {"tool_choice": "none"}).choices[0]
    assert plain.message.tool_calls is None
    assert "<tool_call>" in plain.message.content


def test_thinking_is_told_apart(client):
    body = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 4, "temperature": 0}
    whole = client.chat.completions.create(**ASKED, extra_body=body).choices[0].message
    assert whole.reasoning_content
    events = client.chat.completions.create(**ASKED, extra_body=body, stream=True)
    deltas = [event.choices[0].delta for event in events]
    assert (
        "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        == whole.reasoning_content
    )
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    assert "think>" not in whole.content + whole.reasoning_content


class Sum(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    total: int = pydantic.Field(ge=0, le=99)
    unit: str = pydantic.Field(max_length=6)


def test_replies_have_the_form_that_is_asked_for(client):
    parsed = (
        client.chat.completions.parse(**ASKED, response_format=Sum, temperature=0).choices[0].message.parsed
    )
    assert isinstance(parsed, Sum)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    text = client.chat.completions.create(**ASKED, response_format=form, seed=1).choices[0].message.content
    jsonschema.validate(json.loads(text), schema)


def test_completions_echo_and_score_their_prompts(model, client):
    prompt = "12 + 7 = 19. The answer"
    ids = model.tokenizer.encode(prompt)
    (wanted,) = model.score([ids[:1]], [ids[1:]], top_logprobs=1)
    (going_on,) = model.generate(prompt, max_new_tokens=1, return_logprobs=True).logprobs
    for given in (prompt, ids):
        out = client.completions.create(
            model="abacus", prompt=[given, given], max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        assert [choice.index for choice in out.choices] == [0, 1]
        for choice in out.choices:
            assert choice.text.startswith(prompt)
            logprobs = choice.logprobs.token_logprobs
            assert logprobs[0] is None
            assert logprobs[1:] == pytest.approx([*wanted.token_logprobs, *going_on], abs=1e-4)
            best = [max(one.values()) for one in choice.logprobs.top_logprobs[1:-1]]
            assert best == pytest.approx([max(one.values()) for one in wanted.top_logprobs], abs=1e-4)
            assert "".join(choice.logprobs.tokens) == choice.text
    plain = client.completions.create(model="abacus", prompt=prompt, max_tokens=4, temperature=0)
    assert plain.choices[0].text == model.generate(prompt, max_new_tokens=4).texts[0]
    pieces = client.completions.create(
        model="abacus", prompt=prompt, max_tokens=4, temperature=0, stream=True
    )
    assert "".join(event.choices[0].text for event in pieces) == plain.choices[0].text


def test_who_goes_is_cancelled(server):
    address, engine = server
    body = ASKED | {"max_tokens": 3000, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert comes_to(lambda: engine.stats().running == 1)
    assert idle(engine)
    with pytest.raises(httpx.ReadTimeout):  # and gone before there is a reply
        httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.3)
    assert idle(engine)


def test_a_client_that_goes_before_the_first_event_holds_nothing(model):
    body = json.dumps(ASKED | {"stream": True, "max_tokens": 3000, "ignore_eos": True}).encode()
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
    scope |= {"query_string": b"", "scheme": "http", "server": ("test", 80), "asgi": {"spec_version": "2.4"}}

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        raise OSError("the client has gone")

    with model.engine(max_rows=2) as engine:
        app = Server(model, engine, "abacus", Limits(sequences=1)).app()
        for _ in range(3):  # were one held, the next would get 429
            with pytest.raises(ClientDisconnect):
                asyncio.run(app(scope, receive, send))
            assert idle(engine)


def test_limits_of_queue_time_and_key(model):
    with serving(model, max_rows=1, sequences=2, seconds=0.7, api_key="secret") as (address, engine):
        paths = {name: f"{address}/v1/{name}" for name in ("chat/completions", "models")}
        assert httpx.get(paths["models"]).status_code == 401
        wrong = {"authorization": "Bearer secre"}
        assert httpx.post(paths["chat/completions"], json=ASKED, headers=wrong).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        headers, found = {"authorization": "Bearer secret"}, []
        endless = ASKED | {"max_tokens": 3900, "ignore_eos": True}

        def ask():
            found.append(httpx.post(paths["chat/completions"], json=endless, headers=headers, timeout=30))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while engine.stats().running + engine.stats().waiting < 2:
            time.sleep(0.01)
        full = httpx.post(paths["chat/completions"], json=ASKED, headers=headers)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        for thread in threads:
            thread.join()
        assert [one.status_code for one in found] == [408, 408]
        assert idle(engine)
        many = httpx.post(paths["chat/completions"], json=ASKED | {"n": 3}, headers=headers)
        assert many.status_code == 400


def test_metrics_and_models_say_what_was(server, client):
    client.chat.completions.create(**ASKED, max_tokens=3)
    text = httpx.get(f"{server[0]}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    stats = server[1].stats()
    assert float(values["qwen_moe_jax_generated_tokens_total"]) == stats.generated_tokens
    assert float(values["qwen_moe_jax_pages"]) == stats.pages
    assert float(values["qwen_moe_jax_time_to_first_token_seconds_count"]) >= 1
    answered = 'qwen_moe_jax_requests_total{path="/v1/chat/completions",status="200"}'
    assert float(values[answered]) >= 1
    assert [one.id for one in client.models.list()] == ["abacus"]
    assert client.models.retrieve("abacus").id == "abacus"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def bad_bodies():
    """Name -> (path, body, status or None for any below 500)."""
    chat, text = "chat/completions", "completions"
    broken = [{"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": "{"}}]}]
    half = b'{"model": "abacus", "messages": [{"role": "user", "content": "\\ud800"}]}'
    found = {
        "no JSON": (chat, b"{", 400),
        "not UTF-8": (chat, b'{"model": "\xff"}', 400),
        "half a pair": (chat, half, 400),
        "a list": (chat, b"[]", 400),
        "a number": (chat, b"7", 400),
        "nothing": (chat, b"", 400),
        "not a number": (chat, b'{"model": "abacus", "messages": [], "temperature": NaN}', 400),
        "deep": (chat, b"[" * 100_000, 400),
        "10 MB": (text, json.dumps({"model": "abacus", "prompt": "x" * 10**7}).encode(), 413),
        "long": (text, {"model": "abacus", "prompt": "apple " * 10_000}, 400),
        "no model": (chat, {"messages": CHAT}, 400),
        "other model": (chat, ASKED | {"model": "gpt"}, 404),
        "no messages": (chat, {"model": "abacus"}, 400),
        "prompt in a chat": (chat, ASKED | {"prompt": "x"}, 400),
        "messages in a completion": (text, ASKED, 400),
        "no prompt": (text, {"model": "abacus"}, 400),
        "outside the vocabulary": (text, {"model": "abacus", "prompt": [10**9]}, 400),
        "mixed prompts": (text, {"model": "abacus", "prompt": ["x", [1]]}, 400),
        "echo in a stream": (text, {"model": "abacus", "prompt": "x", "echo": True, "stream": True}, 400),
        "suffix": (text, {"model": "abacus", "prompt": "x", "suffix": "y"}, 400),
        "best of": (text, {"model": "abacus", "prompt": "x", "best_of": 3}, 400),
        "misspelt": (chat, ASKED | {"temprature": 1}, 400),
        "unknown choice": (chat, ASKED | {"tools": [TOOL], "tool_choice": "always"}, 400),
        "choice of nothing": (chat, ASKED | {"tool_choice": "required"}, 400),
        "one tool at a time": (chat, ASKED | {"tools": [TOOL], "parallel_tool_calls": False}, 400),
        "likeliest without logprobs": (chat, ASKED | {"top_logprobs": 3}, 400),
        "usage without stream": (chat, ASKED | {"stream_options": {"include_usage": True}}, 400),
        "two limits": (chat, ASKED | {"max_tokens": 3, "max_completion_tokens": 3}, 400),
        "greedy n": (chat, ASKED | {"n": 2, "temperature": 0}, 400),
        "beyond the context": (chat, ASKED | {"max_tokens": 10**6}, 400),
        "a call without arguments": (chat, ASKED | {"messages": broken}, 400),
    }
    wrong = {
        "temperature": ["hot", -1, 1e9, True, [], {}],
        "top_p": [0, 2, "x", None, [0.5]],
        "top_k": [-5, 1.5, "x"],
        "min_p": [1.0, -0.1, "x"],
        "presence_penalty": ["x", 1e9],
        "frequency_penalty": [[], 1e9],
        "repetition_penalty": [0, "x"],
        "n": [0, -1, 1.5, "2", 10**9],
        "max_tokens": [0, -1, 1.5, "7", 10**30],
        "stop": [5, [5], "", [""], {}],
        "seed": ["x", 1.5, [], True],
        "stream": ["yes", 1],
        "logprobs": ["x", 3],
        "logit_bias": [5, {"x": 1}, {"999999": 1}, {"5": "x"}, {"-1": 1}, {"5": None}],
        "messages": [[], "x", [5], [{}], [{"role": 5}], [{"role": "user", "content": 5}], {"role": "user"}],
        "tools": ["x", [5], [{}], {}],
        "response_format": [
            "json",
            {},
            {"type": "xml"},
            {"type": "json_schema"},
            {"type": "regex", "pattern": "("},
        ],
        "chat_template_kwargs": ["x", [], 5],
        "thinking_budget": [-1, "x"],
        "bad_words": ["x", [5]],
        "min_new_tokens": [-1, "x"],
        "preset": ["fast", 5],
        "stop_token_ids": [["x"], 10**6],
        "user": [],
    }
    for name, values in wrong.items():
        for number, value in enumerate(values):
            status = None if value is None else 400
            found[f"{name} {number}"] = (chat, ASKED | {name: value}, status)
    return found


def test_what_is_wrong_gets_4xx_and_one_sentence(server):
    address, engine = server
    bodies = bad_bodies()
    assert len(bodies) >= 100
    with httpx.Client(timeout=20) as http:
        for name, (path, body, status) in bodies.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = http.post(f"{address}/v1/{path}", content=content)
            if status is None:
                assert response.status_code < 500, name
                continue
            assert response.status_code == status, (name, response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, name
            assert "\n" not in error["message"], name
            assert error["message"].endswith((".", "?")), (name, error["message"])
            assert len(error["message"]) < 600, name
        assert http.get(f"{address}/v1/nowhere").status_code == 404
        wrong = http.get(f"{address}/v1/chat/completions")
        assert (wrong.status_code, set(wrong.json())) == (405, {"error"})
        assert http.post(f"{address}/v1/completions", content=_slow()).status_code == 408
        assert http.post(f"{address}/v1/completions", content=iter([b"x" * 10**6] * 3)).status_code == 413
    assert idle(engine)


def _slow():
    yield b"{"
    time.sleep(3)
    yield b"}"

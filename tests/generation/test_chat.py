"""Chat templates render what transformers renders, in a sandbox, and refuse what is no chat."""

import json

import pytest
from support.problems import CHECKPOINT
from text_files import write_text_files
from transformers import AutoTokenizer

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.generation import template_limits
from qwen_moe_jax.generation.chat import ChatTemplate

USER = {"role": "user", "content": "  How many? <b>é😀</b> \n"}
ASSISTANT = {"role": "assistant", "content": "Forty-two."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "ü<"}}}],
}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
OTHER = {"role": "critic", "content": "is skipped by `continue`"}
CHATS = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, PARTS, CALL, {"role": "tool", "content": "44"}],
    [OTHER, USER],
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds <ü>",
        "parameters": {"type": "object", "properties": {}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_files(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def both(folder):
    return ChatTemplate.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_chat_renders_as_in_transformers(both, chat, thinking, tools):
    ours, theirs = both
    options = {} if thinking is None else {"enable_thinking": thinking}
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=prompt, **options
        )
        got = ours.render(
            chat,
            add_generation_prompt=prompt,
            enable_thinking=thinking,
            **({"tools": tools} if tools else {}),
        )
        assert got == expected


def test_thinking_is_switched_by_the_checkpoints_own_template(both):
    ours, _ = both
    assert ours.render([USER]).endswith("<think>\n")
    assert ours.render([USER], enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_a_template_may_end_a_conversation_with_its_own_reason(both):
    with pytest.raises(InputError, match="refuses these messages: System message must be at the beginning"):
        both[0].render([USER, SYSTEM])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_neither_leaks_python_nor_changes_the_messages(source):
    messages = [dict(USER)]
    try:
        rendered = ChatTemplate(source).render(messages)
    except InputError:
        rendered = ""
    assert "class" not in rendered
    assert "function" not in rendered
    assert messages == [USER]


def test_an_unsafe_template_is_refused():
    with pytest.raises(InputError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([USER])


@pytest.mark.parametrize(
    "source", ["{{ 1 + messages }}", "{{ 1 / 0 }}", "{{ nothing.here }}", "{{ 'a'.index('b') }}"]
)
def test_a_template_that_fails_is_one_clear_error(source):
    with pytest.raises(InputError, match="chat template refuses"):
        ChatTemplate(source).render([USER])


def test_training_marks_render_their_content():
    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert template.render([ASSISTANT, ASSISTANT]) == "Forty-two." * 2


def test_json_keeps_characters_and_key_order_and_takes_python_json_options():
    template = ChatTemplate("{{ x | tojson }}|{{ x | tojson(sort_keys=true, separators=(',', ':')) }}")
    assert template.render([USER], x={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}|{"a":1,"b":"<é>"}'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "one or more messages"),
        ("hello", "one or more messages"),
        (None, "one or more messages"),
        (["hello"], "message 0 is 'hello'"),
        ([USER, {"content": "x"}], "message 1"),
        ([{"role": 3, "content": "x"}], "message 0"),
        ([{"role": "user", "content": 3}], "message 0 has content 3"),
        ([{"role": "user", "content": 5}], "message 0 has content 5"),
        ([{"role": "user", "content": ["x"]}], "message 0 has a part 'x'"),
        ([{"role": "user", "content": [{"type": "image", "url": "u"}]}], "only text is supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text is supported"),
    ],
)
def test_a_malformed_chat_is_a_clear_error(both, messages, message):
    with pytest.raises(InputError, match=message):
        both[0].render(messages)


def test_the_template_file_wins_over_the_tokenizer_config_and_special_tokens_are_given(tmp_path):
    config = {
        "chat_template": "config {{ eos_token }}{{ bos_token }}",
        "eos_token": "<e>",
        "bos_token": {"content": "<b>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "config <e><b>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "file <e>"


def test_of_several_templates_the_default_is_taken(tmp_path):
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": templates}))
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "d"
    file.write_text(json.dumps({"chat_template": templates[:1]}))
    with pytest.raises(CheckpointError, match="none 'default'"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("value", [5, {"default": "d"}, ["d"], [{"name": "default"}], True])
def test_a_damaged_template_entry_is_a_checkpoint_error(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"chat.template"):
        ChatTemplate.from_folder(tmp_path)


def test_a_damaged_template_file_is_a_checkpoint_error(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_text("{% if %}")
    with pytest.raises(CheckpointError, match="does not parse"):
        ChatTemplate.from_folder(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_a_folder_without_template_has_none(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10**10 }}", "makes 10,000,000,000 characters"),
        ("{{ 10 ** 10000000 }}", "numbers of more than 4096 bits"),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "makes",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 'x'|center(1000000000) }}", "makes 1,000,000,000 characters"),
        ("{{ 'x'.zfill(1000000000) }}", "makes 1,000,000,000 characters"),
        ("{{ ('a' * 10000).replace('a', 'b' * 100000) }}", "makes 1,000,000,000 characters"),
        ("{{ '%1000000000d' % 1 }}", "formats text by %"),
        ("{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}", "at most"),
    ],
)
def test_what_a_template_takes_is_bounded_before_it_is_taken(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_template_that_goes_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    for loop in ("{% set x = i * j %}", "{{ '' }}"):
        source = "{% for i in range(99999) %}{% for j in range(99999) %}" + loop + "{% endfor %}{% endfor %}"
        with pytest.raises(InputError, match=r"takes more than 0\.2 seconds"):
            ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_the_last_message_is_left_open_where_it_is_to_be_continued() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    template = ChatTemplate(source + "{% if add_generation_prompt %}<assistant>{% endif %}")
    opened = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert opened == "<user>hi</s>\n<assistant>The answer"
    with pytest.raises(InputError, match="give add_generation_prompt=False"):
        template.render(chat, continue_final_message=True)
    with pytest.raises(InputError, match="content that is not empty"):
        template.render(
            [{"role": "assistant", "content": None}], add_generation_prompt=False, continue_final_message=True
        )


TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}[{{ (t.function if t.function is defined else t).name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if deep %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> QwenMoe:
    """The trained model with a template that knows tools."""
    folder = tmp_path_factory.mktemp("tools")
    for file in CHECKPOINT.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json") and file.is_file():
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return QwenMoe.from_pretrained(folder)


def test_tools_variables_and_an_open_message_reach_the_template_and_the_reply_is_a_message(chatting) -> None:
    assert chatting.tokenizer is not None
    chat = [{"role": "user", "content": "Tom has 2 apples."}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}

    def prompt_of(*messages: dict, **options) -> str:
        run = chatting.run([*chat, *messages], **options)
        return chatting.tokenizer.decode(run.tokens[0], skip_special_tokens=False)

    assert prompt_of(tools=[tool]) == "[look]user: Tom has 2 apples.\nassistant: "
    assert prompt_of(add_generation_prompt=False) == "user: Tom has 2 apples.\n"
    assert prompt_of(chat_template_kwargs={"deep": True}).endswith("assistant: <think>\n")
    half = {"role": "assistant", "content": "The answer"}
    assert prompt_of(half, continue_final_message=True).endswith("assistant: The answer")
    assert prompt_of({"role": "assistant", "content": None}).endswith("assistant: None\nassistant: ")
    plain = chatting.generate(chat, max_new_tokens=6)
    assert plain.messages == [{"role": "assistant", "content": plain.texts[0].strip() or plain.texts[0]}]
    deep = chatting.generate(chat, max_new_tokens=6, chat_template_kwargs={"deep": True})
    assert deep.messages[0]["content"] == ""
    assert deep.messages[0]["reasoning_content"] == deep.texts[0].strip()
    assert chatting.generate("text", max_new_tokens=2).messages is None
    with chatting.engine(max_rows=1) as engine:
        assert engine.submit(chat, max_new_tokens=6, tools=[tool]).result().messages is not None
    assert "".join(piece.text for piece in chatting.stream(chat, max_new_tokens=6)) == plain.texts[0]
    for options, message in (
        ({"tools": "look"}, "tools is a list of functions"),
        ({"tools": [{"type": "function"}]}, "tools is a list of functions"),
        ({"chat_template_kwargs": [1]}, "expected a dict"),
    ):
        with pytest.raises(InputError, match=message):
            chatting.generate(chat, **options)
    with pytest.raises(InputError, match="tools only applies to chat messages"):
        chatting.generate("text", tools=[tool])

"""Chat templates render what transformers renders, in a sandbox, and refuse what is no chat."""

import json

import pytest
from text_files import write_text_files
from transformers import AutoTokenizer

from qwen_moe_jax.errors import CheckpointError, InputError
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
        ([{"role": "user"}], "message 0 has content None"),
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

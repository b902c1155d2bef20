"""Chat messages to prompt text, by the checkpoint's own template in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols

from qwen_moe_jax.errors import CheckpointError, InputError
from qwen_moe_jax.generation.replies import function_of
from qwen_moe_jax.generation.template_limits import BoundedEnvironment, TemplateLimitError
from qwen_moe_jax.generation.tokenizer import read_tokenizer_config


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not jinja's own filter, which escapes HTML characters and sorts the keys
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is its own content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block's statements, in a scope of their own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


# Stands behind the content of a message that is left open; no template changes it.
_MARK = "\u2060continue\u2060"


class ChatTemplate:
    """A Jinja chat template, compiled in a sandbox that neither changes its inputs nor reaches out.

    Attributes:
        source: its text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self.source = source
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template does not parse (line {error.lineno}: {error})."
            ) from None
        self._environment = environment
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """Reads chat_template.jinja, else tokenizer_config.json's chat_template; None when there is neither.

        Raises:
            CheckpointError: the template is no text or does not parse, or none of several is called
                "default".
        """
        config = read_tokenizer_config(folder)
        file = Path(folder) / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 text ({error}).") from None
        if source is None:
            return None
        if not isinstance(source, str):
            if not isinstance(source, list) or not all(isinstance(entry, dict) for entry in source):
                raise CheckpointError(
                    f"tokenizer_config.json has a chat_template of type {type(source).__name__}; expected "
                    "text, or a list of objects with name and template."
                )
            named = {entry.get("name"): entry.get("template") for entry in source}
            if "default" not in named:
                raise CheckpointError(
                    f"tokenizer_config.json has chat templates {sorted(map(str, named))}, none 'default'."
                )
            source = named["default"]
            if not isinstance(source, str):
                raise CheckpointError(
                    f"tokenizer_config.json's default chat template is {source!r}; expected text."
                )
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
        return cls(source, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dicts with "role" and "content" (a string, or a list of {"type": "text"} parts).
            add_generation_prompt: opens the assistant's turn.
            continue_final_message: the last message is left open, to be continued: the prompt ends with its
                content.
            enable_thinking: handed to the template if given; what it does is up to the template.
            **variables: further names for the template, such as `tools`.

        Raises:
            InputError: messages of another form, or the template refuses them.
        """
        check_messages(messages)
        messages = [_with_arguments(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise InputError(
                    "continue_final_message continues the last message, and add_generation_prompt opens "
                    "another one; give add_generation_prompt=False."
                )
            return self._left_open(messages, enable_thinking=enable_thinking, **variables)
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            return self._environment.render(
                self._template,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None} | self._special_tokens | variables,
            )
        except TemplateLimitError as error:
            raise InputError(f"the checkpoint's chat template {error}.") from None
        except RecursionError:
            raise InputError("the checkpoint's chat template calls itself without end.") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InputError(f"the checkpoint's chat template refuses these messages: {error}.") from None

    def _left_open(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text up to the end of the last message's content.

        A mark is put behind the content, so that it is found whatever the template writes there.
        """
        last = messages[-1]
        content = last.get("content")
        if not isinstance(content, str) or not content:
            raise InputError(
                "continue_final_message continues the text of the last message, which has none; expected "
                "content that is not empty."
            )
        marked = [*messages[:-1], {**last, "content": content + _MARK}]
        text = self.render(marked, add_generation_prompt=False, **options)
        before, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise InputError("the chat template does not write the last message, so it cannot be continued.")
        # templates may strip a message; what was given is what is continued
        return before


def template_options(
    *,
    enable_thinking: bool | None = None,
    tools: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    add_generation_prompt: bool = True,
) -> dict[str, Any]:
    """What `ChatTemplate.render` is given beside the messages: those that say something.

    Args:
        enable_thinking: handed to the template.
        tools: functions that the model may call, each a JSON schema in OpenAI's form.
        chat_template_kwargs: further variables of the template.
        continue_final_message: continue the last message instead of opening another one.
        add_generation_prompt: open the assistant's turn.

    Raises:
        InputError: tools or variables of another form.
    """
    found: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        if not isinstance(chat_template_kwargs, Mapping):
            raise InputError(f"chat_template_kwargs is {chat_template_kwargs!r}; expected a dict.")
        found |= chat_template_kwargs
    if enable_thinking is not None:
        found["enable_thinking"] = enable_thinking
    if tools is not None:
        if not isinstance(tools, Sequence) or not all(map(_is_tool, tools)):
            raise InputError(
                "tools is a list of functions, each {'type': 'function', 'function': {'name': ..., "
                "'parameters': {...}}}."
            )
        found["tools"] = list(tools) or None
    if continue_final_message:
        found |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not add_generation_prompt:
        found["add_generation_prompt"] = False
    return found


def _with_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls have objects as arguments, which templates expect; clients send JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return message
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        text = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(text, str):
            try:
                arguments = json.loads(text or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                raise InputError(f"a tool call has the arguments {text!r:.100}; expected a JSON object.")
            call = {**call, "function": {**(function or {}), "arguments": arguments}}
        found.append(call)
    return {**message, "tool_calls": found}


def _is_tool(tool: Any) -> bool:
    function = function_of(tool) if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def check_messages(messages: Any) -> None:
    """Raises InputError unless `messages` is a list of chat messages of text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("a chat is a list of one or more messages, each a dict with 'role' and 'content'.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} is {message!r}; expected a dict with 'role' and 'content'.")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, Sequence):
            raise InputError(f"message {number} has content {content!r}; expected text.")
        for part in content:
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise InputError(
                    f"message {number} has a part {part!r}; expected {{'type': 'text', 'text': ...}}: "
                    "only text is supported."
                )

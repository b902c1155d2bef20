"""Bodies of requests, read strictly: OpenAI's parameters, and this library's options beside them."""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from qwen_moe_jax.engine.rows import LIKELIEST
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.chat import check_messages
from qwen_moe_jax.generation.options import SAMPLING_OPTIONS
from qwen_moe_jax.serving.errors import ApiError, wrong

# Parameters that are options under the same name.
_OPTIONS = (
    *SAMPLING_OPTIONS,
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "response_format",
    "min_new_tokens",
    "bad_words",
    "thinking_budget",
    "stop_token_ids",
    "ignore_eos",
    "draft_tokens",
    "preset",
)
_CHAT_OPTIONS = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt", "enable_thinking")
# Parameters that say something to OpenAI and nothing here.
_NO_MEANING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_COMMON = (
    *_OPTIONS,
    *_NO_MEANING,
    "model",
    "stream",
    "stream_options",
    "n",
    "seed",
    "stop",
    "max_tokens",
    "logit_bias",
    "logprobs",
)
_CHAT = (
    *_COMMON,
    *_CHAT_OPTIONS,
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)
_COMPLETION = (*_COMMON, "prompt", "echo", "best_of", "suffix")
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_MOST_PROMPTS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
        prompts: chats, texts or lists of token ids.
        options: of their generation, as of `Engine.submit`.
        chat: of /v1/chat/completions.
        stream: as events.
        include_usage: of a stream, in an event of its own at the end.
        logprobs: how many of the likeliest tokens are wanted with each one's log-probability; None for no
            log-probabilities.
        echo: give the prompt back before the text.
    """

    prompts: list[Any]
    options: dict[str, Any]
    chat: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool = False

    @property
    def count(self) -> int:
        """Sequences of each prompt."""
        return self.options.get("num_return_sequences", 1)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A body as an object.

    Raises:
        ApiError: 400, it is none.
    """

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        body = json.loads(raw, parse_constant=no_number)
        if b"\\u" in raw:  # half a surrogate pair is no text
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON in UTF-8 ({str(error)[:100]}).") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; expected a JSON object.")
    return body


def parse_chat(body: Mapping[str, Any], model: str, defaults: Mapping[str, Any]) -> Asked:
    """The body of /v1/chat/completions.

    Args:
        body: of the request.
        model: the name that this server serves.
        defaults: the checkpoint's own options.

    Raises:
        ApiError: an unknown parameter, one of another form, or another model.
    """
    _check_names(body, _CHAT, model)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise wrong("messages", messages, "a list of messages")
    try:
        check_messages(messages)
    except InputError as error:
        raise ApiError(400, str(error), parameter="messages") from None
    wanted, likeliest = _typed(body, "logprobs", bool, False), _typed(body, "top_logprobs", int, 0)
    if likeliest and not wanted:
        raise wrong("top_logprobs", likeliest, "logprobs: true beside it")
    options = _options(body, defaults, likeliest)
    for name in _CHAT_OPTIONS:
        if body.get(name) is not None:
            options[name] = body[name]
    for name in ("tools", "tool_choice"):
        if body.get(name) is not None:
            options[name] = body[name]
    if (
        body.get("parallel_tool_calls") is False
        and body.get("tool_choice") in (None, "auto")
        and body.get("tools")
    ):
        raise wrong("parallel_tool_calls", False, "a tool_choice beside it that forces one call, or true")
    # as many as there is room for, if nothing is said
    options["max_new_tokens"] = _one_of(body, "max_completion_tokens", "max_tokens")
    return Asked(
        prompts=[messages],
        options=options,
        chat=True,
        logprobs=likeliest if wanted else None,
        **_common(body),
    )


def parse_completion(body: Mapping[str, Any], model: str, defaults: Mapping[str, Any]) -> Asked:
    """The body of /v1/completions; arguments and errors as of `parse_chat`."""
    _check_names(body, _COMPLETION, model)
    if body.get("suffix"):
        raise wrong("suffix", body["suffix"], "none: text cannot be filled in")
    if body.get("best_of") not in (None, body.get("n", 1)):
        raise wrong("best_of", body["best_of"], "the number of sequences n, or none")
    likeliest = _typed(body, "logprobs", int, None)
    options = _options(body, defaults, likeliest or 0)
    options["max_new_tokens"] = _typed(body, "max_tokens", int, _DEFAULT_COMPLETION_TOKENS)
    asked = Asked(
        prompts=_prompts(body.get("prompt")),
        options=options,
        chat=False,
        logprobs=likeliest,
        echo=_typed(body, "echo", bool, False),
        **_common(body),
    )
    if asked.echo and asked.stream:
        raise wrong("echo", True, "false in a stream")
    if asked.stream and len(asked.prompts) > 1:
        raise wrong("prompt", body["prompt"], "one prompt in a stream")
    return asked


def _check_names(body: Mapping[str, Any], known: tuple[str, ...], model: str) -> None:
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ApiError(400, f"unknown parameter {name[:80]!r}{hint}", parameter=name[:80])
    asked = body.get("model")
    if not isinstance(asked, str):
        raise wrong("model", asked, f"{model!r}")
    if asked != model:
        raise ApiError(
            404,
            f"the model {asked[:80]!r} is not here; this server has {model!r}.",
            parameter="model",
            code="model_not_found",
        )


def _prompts(given: Any) -> list[Any]:
    """The prompts of a completion, each a text or ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(_is_int(token) for token in given):
            return [given]
        if len(given) > _MOST_PROMPTS:
            raise wrong("the number of prompts", len(given), f"at most {_MOST_PROMPTS}")
        if all(isinstance(one, str) for one in given):
            return given
        if all(isinstance(one, list) and one and all(map(_is_int, one)) for one in given):
            return given
    raise wrong("prompt", given, "a text, texts, token ids or lists of token ids, none of them empty")


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    stream = _typed(body, "stream", bool, False)
    more = body.get("stream_options")
    if more is not None and (not stream or not isinstance(more, dict) or set(more) - {"include_usage"}):
        raise wrong("stream_options", more, "{'include_usage': true} beside stream: true")
    include = _typed(more or {}, "include_usage", bool, False)
    return {"stream": stream, "include_usage": include}


def _options(body: Mapping[str, Any], defaults: Mapping[str, Any], likeliest: int) -> dict[str, Any]:
    """Options of generation. What OpenAI's API takes for granted where a request says nothing: tokens are
    drawn, from all of the distribution; a checkpoint's own options come before that."""
    if not 0 <= likeliest <= LIKELIEST:
        raise wrong("the number of likeliest tokens", likeliest, f"0 to {LIKELIEST}")
    found = {name: body[name] for name in _OPTIONS if body.get(name) is not None}
    if found.get("temperature") == 0 and not isinstance(found["temperature"], bool):
        found = {name: value for name, value in found.items() if name not in SAMPLING_OPTIONS}
        found["do_sample"] = False
    elif not defaults.get("do_sample") and "preset" not in found:
        found = {"top_k": -1, "top_p": 1.0, **found, "do_sample": True}
    else:
        found["do_sample"] = True
    count = _typed(body, "n", int, 1)
    if count != 1:
        found["num_return_sequences"] = count
        if not found["do_sample"]:
            raise wrong("n", count, "1 where temperature is 0: all sequences would be equal")
    seed = _typed(body, "seed", int, None)
    found["seed"] = secrets.randbits(32) if seed is None else seed % 2**32
    if body.get("stop") is not None:
        found["stop_strings"] = body["stop"]
    found |= {"top_logprobs": likeliest, "return_logprobs": True}
    if body.get("logit_bias") is not None:
        found["logit_bias"] = _biases(body["logit_bias"])
    return found


def _biases(given: Any) -> dict[int, float]:
    """Token -> bias; JSON has texts as keys."""
    if not isinstance(given, dict) or not all(key.isdecimal() and len(key) < 10 for key in given):
        raise wrong("logit_bias", given, "an object of token ids and numbers")
    return {int(key): value for key, value in given.items()}


def _one_of(body: Mapping[str, Any], first: str, second: str) -> int | None:
    if body.get(first) is not None and body.get(second) is not None:
        raise wrong(second, body[second], f"none beside {first}")
    found = _typed(body, first, int, None)
    return _typed(body, second, int, None) if found is None else found


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits: Callable[[Any], bool] = _is_int if kind is int else lambda x: isinstance(x, kind)
    if not fits(value):
        raise wrong(name, value, {int: "an integer", bool: "true or false"}[kind])
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""The form that a reply must have: a JSON schema, a regular expression or a grammar, through llguidance.

llguidance (Microsoft) compiles all three to one parser and says which tokens may follow in tens of
microseconds, by a lexer made of derivatives and a prefix tree of the vocabulary; vLLM and SGLang use it too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.errors import EngineError, InputError
from qwen_moe_jax.extras import extra_module
from qwen_moe_jax.generation.guides import RowGuide
from qwen_moe_jax.generation.tokenizer import Tokenizer
from qwen_moe_jax.generation.tool_forms import JSON_STYLE, call_grammar

_EXPECTED = (
    "{'type': 'json_schema', 'json_schema': {'schema': {...}}}, {'type': 'json_object'}, "
    "{'type': 'regex', 'pattern': ...}, {'type': 'grammar', 'grammar': ...} (Lark) or {'type': 'text'}"
)
# Forms that stay compiled.
_KEPT = 32


def grammar_of(response_format: Any) -> str | None:
    """A `response_format` in llguidance's own language; None for plain text.

    Raises:
        InputError: another form.
        MissingExtraError: llguidance is not installed.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    matcher = _llguidance().LLMatcher
    if kind == "json_object":
        return matcher.grammar_from_json_schema({"type": "object"}, JSON_STYLE)
    if kind == "json_schema":
        inner = response_format.get("json_schema", response_format)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            try:
                return matcher.grammar_from_json_schema(json.dumps(schema), JSON_STYLE)
            except (TypeError, ValueError) as error:
                raise InputError(f"response_format has a schema that is no JSON: {error}.") from None
    if kind == "tool_call":  # of `tool_choice`
        return matcher.grammar_from_lark(call_grammar(response_format["tools"], xml=response_format["xml"]))
    for name, key in (("regex", "pattern"), ("grammar", "grammar")):
        if kind == name and isinstance(response_format.get(key), str):
            made = matcher.grammar_from_regex if name == "regex" else matcher.grammar_from_lark
            return made(response_format[key])
    raise InputError(f"response_format is {response_format!r:.200}; expected {_EXPECTED}.")


class Forms:
    """Compiled forms of one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Compiles nothing yet.

        Args:
            tokenizer: of the model.
            vocab_size: of the model, which may be padded.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._known: dict[tuple[int, ...], Any] = {}
        self._compiled: dict[tuple[str, tuple[int, ...]], Any] = {}

    def guide(self, grammar: str, end_ids: Sequence[int]) -> "Form":
        """A guide of one sequence.

        Args:
            grammar: of `grammar_of`.
            end_ids: tokens that end the sequence, once the form is complete.

        Raises:
            InputError: the form is not valid, or too complex.
        """
        ends = tuple(end_ids)
        key = grammar, ends
        if key not in self._compiled:
            matcher = _llguidance().LLMatcher(self._vocabulary(ends), grammar, log_level=0)
            if matcher.is_error():
                reason = matcher.get_error().strip().splitlines()[0]
                raise InputError(f"response_format cannot be followed: {reason}.")
            while len(self._compiled) >= _KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = matcher
        return Form(self._compiled[key].deep_copy())

    def _vocabulary(self, ends: tuple[int, ...]) -> Any:
        if ends not in self._known:
            text = self._tokenizer.backend.to_str()
            # without end tokens, one beyond the vocabulary's texts stands for them
            own = list(ends) or [self._tokenizer.eos_token_id or 0]
            self._known[ends] = _llguidance().LLTokenizer(text, n_vocab=self._vocab_size, eos_token=own)
        return self._known[ends]


class Form(RowGuide):
    """Lets a sequence have one form only."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._tokens = 0

    def mask(self, words: np.ndarray) -> None:
        """Tokens that go on in the form.

        Raises:
            EngineError: the form has become too complex to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise EngineError(f"the form cannot be followed: {self._matcher.get_error().strip()}")

    def accept(self, token: int) -> bool:
        """Goes on; returns whether the form is complete and nothing can follow."""
        if not self._matcher.is_stopped():
            self._tokens += self._matcher.consume_token(token)
        return self._matcher.is_stopped()

    def save(self) -> int:
        """See `RowGuide`."""
        return self._tokens

    def restore(self, saved: int) -> None:
        """See `RowGuide`."""
        if self._tokens > saved:
            self._matcher.rollback(self._tokens - saved)
            self._tokens = saved


def _llguidance() -> Any:
    return extra_module("llguidance", "structured")

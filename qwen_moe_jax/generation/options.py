"""What a user may ask of a generation, validated when it is asked."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_moe_jax.engine.rows import LIKELIEST
from qwen_moe_jax.engine.sampling import MOST_BIASES, MOST_ENDS, RowSampling
from qwen_moe_jax.errors import InputError

# What the model cards of Qwen3.5 recommend ("Best Practices", Qwen/Qwen3.5-35B-A3B), by name.
_EVERY_PRESET = {"do_sample": True, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "thinking": _EVERY_PRESET | {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 1.5},
    "thinking-coding": _EVERY_PRESET | {"temperature": 0.6, "top_p": 0.95, "presence_penalty": 0.0},
    "non-thinking": _EVERY_PRESET | {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.5},
    "non-thinking-reasoning": _EVERY_PRESET
    | {"temperature": 1.0, "top_p": 1.0, "top_k": 40, "presence_penalty": 2.0},
}
# Options that only mean something where tokens are drawn.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
# Values beyond these mean "off" or "always" in practice, and overflow float32 when they meet a logit.
SMALLEST = 1e-6
LARGEST = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated.

    Attributes:
        max_new_tokens: most tokens a sequence may get; None for as many as there is room for.
        do_sample: draw tokens at random instead of taking the most likely one.
        temperature: divides the logits (sampling only).
        top_k: keep the k most likely tokens; 0 keeps all (sampling only).
        top_p: keep the most likely tokens that together reach this probability (sampling only).
        min_p: drop tokens less likely than min_p times the most likely one (sampling only).
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the
            prompt or the text so far; 1 is off (Keskar et al., arXiv:1909.05858).
        presence_penalty: subtracted once from the logits of tokens generated so far.
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        min_new_tokens: no end-of-text token before there are so many; stop strings may come earlier.
        logit_bias: token id -> what is added to its logit; -inf bans a token.
        bad_words: texts that are never written, however they would be divided into tokens.
        thinking_budget: tokens after which the end of a reply's thinking is forced; None for no budget.
        response_format: the form that a reply must have, behind its thinking: {"type": "json_schema",
            "json_schema": {"schema": ...}}, {"type": "json_object"}, {"type": "regex", "pattern": ...} or
            {"type": "grammar", "grammar": ...} in llguidance's Lark; None or {"type": "text"} for any. Needs
            the extra `structured`.
        eos_token_id: ids that end a text; None means the checkpoint's own, an empty list none.
        stop_token_ids: further ids that end a text, beside `eos_token_id`.
        ignore_eos: no end-of-text token ends a text, not even the checkpoint's own.
        stop_strings: texts that end a text, wherever token boundaries fall.
        num_return_sequences: samples for each prompt.
        seed: one for all prompts or one for each. A row's sample depends on its own seed, its number
            among the prompt's sequences and its own text only; so equal prompts with equal seeds get
            equal samples.
        return_logprobs: also return each token's log-probability.
        top_logprobs: also return so many of the likeliest tokens in each place, at most 20.
        prompt_logprobs: also return the prompt's log-probabilities, and so many of the likeliest tokens in
            each place, 0 to 20; None for neither.
        draft_tokens: that multi-token prediction drafts at most for a step, no more than the model was loaded
            with; None for so many, 0 for none. It changes the time that a text takes, not the text.
    """

    max_new_tokens: int | None = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 20
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    thinking_budget: int | None = None
    response_format: Mapping[str, Any] | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    stop_strings: str | Sequence[str] | None = None
    num_return_sequences: int = 1
    seed: int | Sequence[int] = 0
    return_logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        if not self.do_sample:
            _check_greedy(self)

    def override(self, **changes: Any) -> "GenerationConfig":
        """A copy with some fields changed; `preset` is a name of `PRESETS`, whose fields others override.

        Raises:
            InputError: a name that is no field (the nearest one is suggested), or a bad value.
        """
        changes = self.expand(changes)
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}."
                raise InputError(f"{name!r} is not a generation option; {hint}")
        return dataclasses.replace(self, **changes)

    @staticmethod
    def expand(changes: Mapping[str, Any]) -> dict[str, Any]:
        """Options with those of a `preset`, which others override.

        Raises:
            InputError: no such preset.
        """
        changes = dict(changes)
        preset = changes.pop("preset", None)
        if preset is None:
            return changes
        if preset not in PRESETS:
            raise InputError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
        return PRESETS[preset] | changes

    @property
    def is_guided(self) -> bool:
        """The host has a say in which tokens are chosen."""
        return bool(self.bad_words) or self.thinking_budget is not None or self.response_format is not None

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """`eos_token_id` as a tuple; None means the checkpoint's own."""
        if self.ignore_eos:
            return ()
        if self.eos_token_id is None:
            return None
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop_strings` as a tuple."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    def row_sampling(self, seed: int, sequence_index: int, end_ids: Sequence[int] = ()) -> RowSampling:
        """How the tokens of one sequence are chosen.

        Args:
            seed: of its prompt.
            sequence_index: its number among the prompt's sequences.
            end_ids: tokens that end it.
        """
        names = {field.name for field in dataclasses.fields(RowSampling)}
        names -= {"seed", "sequence_index", "biases", "ends"}
        values = {name: getattr(self, name) for name in names}
        if self.temperature == 0:  # the most likely token, as without do_sample
            values |= {"do_sample": False, "temperature": 1.0}
        values["top_k"] = max(0, values["top_k"])
        return RowSampling(
            **values,
            seed=seed,
            sequence_index=sequence_index,
            biases=tuple((self.logit_bias or {}).items()),
            ends=tuple(end_ids) if self.min_new_tokens else (),
        )

    def seeds(self, prompts: int) -> list[int]:
        """One seed a prompt.

        Raises:
            InputError: a list of another length.
        """
        if isinstance(self.seed, int):
            return [self.seed] * prompts
        if len(self.seed) != prompts:
            raise InputError(f"seed holds {len(self.seed)} values for {prompts} prompts; give one for each.")
        return list(self.seed)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_list_of(value: Any, accept: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(map(accept, value))


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}; expected {expected}.")


def _check_types(c: GenerationConfig) -> None:
    most = c.max_new_tokens
    _require(most is None or _is_int(most), "max_new_tokens", most, "an integer, or None")
    for name in ("top_k", "num_return_sequences", "min_new_tokens"):
        _require(_is_int(getattr(c, name)), name, getattr(c, name), "an integer")
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        _require(_is_number(getattr(c, name)), name, getattr(c, name), "a number")
    _require(_is_int(c.top_logprobs), "top_logprobs", c.top_logprobs, "an integer")
    inside = c.prompt_logprobs
    _require(inside is None or _is_int(inside), "prompt_logprobs", inside, "an integer, or None")
    drafts = c.draft_tokens
    _require(drafts is None or _is_int(drafts), "draft_tokens", drafts, "an integer, or None")
    budget, words = c.thinking_budget, c.bad_words
    _require(budget is None or _is_int(budget), "thinking_budget", budget, "an integer, or None")
    words_ok = _is_list_of(words, lambda s: isinstance(s, str) and s != "")
    _require(words_ok, "bad_words", words, "a list of texts that are not empty")
    bias, form = c.logit_bias, c.response_format
    bias_ok = bias is None or (
        isinstance(bias, Mapping) and all(map(_is_int, bias)) and all(map(_is_number, bias.values()))
    )
    _require(bias_ok, "logit_bias", bias, "a dict of token ids and numbers, or None")
    _require(form is None or isinstance(form, Mapping), "response_format", form, "a dict, or None")
    stop_ids = c.stop_token_ids
    _require(_is_list_of(stop_ids, _is_int), "stop_token_ids", stop_ids, "a list of token ids")
    for name in ("do_sample", "return_logprobs", "ignore_eos"):
        _require(isinstance(getattr(c, name), bool), name, getattr(c, name), "True or False")
    eos = c.eos_token_id
    eos_ok = eos is None or _is_int(eos) or _is_list_of(eos, _is_int)
    _require(eos_ok, "eos_token_id", eos, "a token id, several, or None")
    stop = c.stop_strings
    stop_ok = stop is None or isinstance(stop, str) or _is_list_of(stop, lambda s: isinstance(s, str))
    _require(stop_ok, "stop_strings", stop, "a string, several, or None")
    _require("" not in c.stops, "stop_strings", stop, "strings that are not empty")
    seed_ok = _is_int(c.seed) or _is_list_of(c.seed, _is_int)
    _require(seed_ok, "seed", c.seed, "an integer, or one for each prompt")
    for seed in [c.seed] if isinstance(c.seed, int) else c.seed:
        _require(0 <= seed < 2**32, "seed", seed, "an integer from 0 to 2^32 - 1")


def _check_ranges(c: GenerationConfig) -> None:
    _require(
        c.max_new_tokens is None or c.max_new_tokens >= 1, "max_new_tokens", c.max_new_tokens, "at least 1"
    )
    _check_guides(c)
    _require(c.num_return_sequences >= 1, "num_return_sequences", c.num_return_sequences, "at least 1")
    span = f"a number from {SMALLEST:g} to {LARGEST:g}"
    hot = c.temperature == 0 or SMALLEST <= c.temperature <= LARGEST
    _require(hot, "temperature", c.temperature, f"0 (the most likely token) or {span}")
    for name in ("top_logprobs", "prompt_logprobs"):
        value = getattr(c, name)
        _require(0 <= (value or 0) <= LIKELIEST, name, value, f"0 to {LIKELIEST}")
    _require(c.top_k >= -1, "top_k", c.top_k, "0 or -1 (keep all) or more")
    _require((c.draft_tokens or 0) >= 0, "draft_tokens", c.draft_tokens, "0 (none) or more")
    _require(0 < c.top_p <= 1, "top_p", c.top_p, "a number above 0 and at most 1")
    _require(0 <= c.min_p < 1, "min_p", c.min_p, "a number from 0 to below 1")
    _require(SMALLEST <= c.repetition_penalty <= LARGEST, "repetition_penalty", c.repetition_penalty, span)
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(c, name)
        _require(abs(value) <= LARGEST, name, value, f"a number from -{LARGEST:g} to {LARGEST:g}")


def _check_guides(c: GenerationConfig) -> None:
    least = c.min_new_tokens
    most = least if c.max_new_tokens is None else c.max_new_tokens
    _require(0 <= least <= most, "min_new_tokens", least, f"0 to max_new_tokens ({c.max_new_tokens})")
    _require((c.thinking_budget or 0) >= 0, "thinking_budget", c.thinking_budget, "0 or more")
    bias = c.logit_bias or {}
    _require(len(bias) <= MOST_BIASES, "the length of logit_bias", len(bias), f"at most {MOST_BIASES}")
    for token, value in bias.items():
        bounded = value == -float("inf") or abs(value) <= LARGEST
        _require(
            bounded, f"logit_bias[{token}]", value, f"-inf, or a number from -{LARGEST:g} to {LARGEST:g}"
        )
    if c.response_format is not None and least:
        raise InputError(
            f"min_new_tokens is {least} and response_format is given, whose reply ends where its form is "
            "complete; give one of the two."
        )


def check_ends(config: GenerationConfig, end_ids: Sequence[int]) -> None:
    """Raises InputError where `min_new_tokens` would have to hold back too many end tokens."""
    if config.min_new_tokens and len(end_ids) > MOST_ENDS:
        raise InputError(
            f"min_new_tokens holds at most {MOST_ENDS} end tokens back, and there are {len(end_ids)}; give "
            "fewer with eos_token_id."
        )


def _check_greedy(c: GenerationConfig) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(c)}
    for name in SAMPLING_OPTIONS:
        if getattr(c, name) not in (
            defaults[name],
            {"temperature": 0, "top_k": -1}.get(name, defaults[name]),
        ):
            raise InputError(
                f"{name} is {getattr(c, name)!r} but do_sample is False, so it would have no effect; "
                "give do_sample=True as well."
            )
    if c.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences is {c.num_return_sequences} but do_sample is False, so all would be "
            "equal; give do_sample=True as well."
        )

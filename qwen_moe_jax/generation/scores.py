"""What is scored: contexts and continuations as token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.engine.scoring import Scored
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A continuation as the model sees it.

    Attributes:
        logprob: natural log of its probability.
        is_greedy: each of its tokens is the most likely one in its place.
        tokens: of the continuation.
        token_logprobs: of each of them.
        top_logprobs: in each place, the likeliest tokens -> log-probability, best first.
    """

    logprob: float
    is_greedy: bool
    tokens: list[int]
    token_logprobs: list[float]
    top_logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, tokens: Sequence[int], scored: Scored) -> "Score":
        """Of what the engine says."""
        return cls(
            logprob=float(scored.logprobs.sum(dtype=np.float64)),
            is_greedy=bool((scored.greedy == np.asarray(tokens)).all()),
            tokens=list(tokens),
            token_logprobs=scored.logprobs.tolist(),
            top_logprobs=scored.likeliest(),
        )


def pairs_of(
    contexts: Any,
    continuations: Any,
    *,
    tokenizer: Tokenizer | None,
    prefix: int | None,
    vocab_size: int,
    longest: int,
) -> list[Pair]:
    """Contexts and continuations as token ids; see `QwenMoe.score`.

    Args:
        contexts, continuations: as there.
        tokenizer: for texts.
        prefix: the token that stands for an empty context; None if there is none.
        vocab_size: ids must lie below it.
        longest: tokens of both together at most, one more than are fed.

    Raises:
        InputError: as there.
    """
    for name, given in (("contexts", contexts), ("continuations", continuations)):
        if not isinstance(given, str) and not hasattr(given, "__len__"):
            raise InputError(f"{name} is {given!r}; expected texts or lists of token ids.")
        if len(given) == 0 and not isinstance(given, str):
            raise InputError(f"{name} is empty; expected texts or lists of token ids.")
    if isinstance(continuations, str) or _is_ids(continuations):
        continuations = [continuations]
    if isinstance(contexts, str) or _is_ids(contexts):
        contexts = [contexts] * len(continuations)
    if len(contexts) != len(continuations):
        raise InputError(
            f"score was given {len(contexts)} contexts and {len(continuations)} continuations; expected as "
            "many of both, or one context."
        )
    return [
        _checked(number, *pair, prefix=prefix, vocab_size=vocab_size, longest=longest)
        for number, pair in enumerate(
            _encoded(number, context, text, tokenizer)
            for number, (context, text) in enumerate(zip(contexts, continuations, strict=True))
        )
    ]


def rolling_windows(tokens: list[int], prefix: int | None, window: int) -> list[Pair]:
    """A text in windows, each of its tokens in one: (context, continuation).

    Args:
        tokens: of the text.
        prefix: the token that the first one is scored behind; None to leave the first one out.
        window: tokens that a prediction sees at most.

    Raises:
        InputError: a text of one token without prefix.
    """
    if prefix is None:
        if len(tokens) < 2:
            raise InputError("the text has one token, and the checkpoint no end-of-text token to begin with.")
        prefix, tokens = tokens[0], tokens[1:]
    found: list[Pair] = [([prefix], tokens[:window])]
    done = len(found[0][1])
    while done < len(tokens):
        count = min(len(tokens) - done, window)
        end = done + count
        fed = tokens[max(0, end - window - 1) : end - 1]
        found.append((fed[: len(fed) - count + 1], tokens[done:end]))
        done = end
    return found


def _encoded(number: int, context: Any, text: Any, tokenizer: Tokenizer | None) -> Pair:
    if isinstance(context, str) and isinstance(text, str):
        if tokenizer is None:
            raise InputError("score was given texts, but this checkpoint has no tokenizer.json; give ids.")
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, text = context[:-spaces], context[-spaces:] + text
        first = list(tokenizer.encode(context)) if context else []
        return first, list(tokenizer.encode(context + text))[len(first) :]
    if _is_ids(context) and _is_ids(text):
        return [int(token) for token in context], [int(token) for token in text]
    raise InputError(
        f"pair {number} is a {type(context).__name__} and a {type(text).__name__}; expected two texts or two "
        "lists of token ids."
    )


def _checked(
    number: int, context: list[int], text: list[int], *, prefix: int | None, vocab_size: int, longest: int
) -> Pair:
    if not text:
        raise InputError(f"continuation {number} is empty; expected at least one token.")
    if not context:
        if prefix is None:
            raise InputError(f"context {number} is empty, and the checkpoint has no end-of-text token.")
        context = [prefix]
    outside = [token for token in (*context, *text) if not 0 <= token < vocab_size]
    if outside:
        raise InputError(f"pair {number} holds id {outside[0]}, outside the vocabulary of {vocab_size}.")
    if len(context) + len(text) > longest + 1:
        raise InputError(
            f"pair {number} has {len(context) + len(text)} tokens, but the context holds {longest}; shorten "
            "the context."
        )
    return context, text


def _is_ids(value: Any) -> bool:
    if hasattr(value, "shape"):
        return np.asarray(value).ndim == 1
    return isinstance(value, (list, tuple)) and all(isinstance(x, (int, np.integer)) for x in value)

"""What generation returns."""

import dataclasses
import html
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts and wall-clock times of one `generate` call, compilation included.

    Attributes:
        prompt_tokens: tokens read, over all prompts.
        cached_prompt_tokens: of these, found in the prefix cache instead of being computed.
        generated_tokens: tokens returned, over all sequences.
        drafted_tokens: drafts of multi-token prediction that were verified.
        accepted_tokens: of these, those that were what the model says.
        prefill_seconds: until the first token of every row was chosen.
        decode_seconds: from there to the end.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOutput:
    """One entry a sequence; the sequences of one prompt stand next to each other.

    Attributes:
        sequences: new tokens only, without padding; an end-of-text token that ended a row is its last.
        texts: the decoded sequences without special tokens and without the stop string, or None when
            the checkpoint has no tokenizer.
        finish_reasons: "stop" (an end-of-text token or a stop string), "length" or, of a request that was
            cancelled, "cancelled".
        logprobs: natural-log probability of each token under the model's own distribution, before
            penalties and filters; None unless asked for.
        messages: of chats, each reply as a message, {"role": "assistant", "content": ...}, with
            "reasoning_content" where it thought and "tool_calls" where it calls tools; None for other
            prompts.
        top_logprobs: of each token, the likeliest ones in its place -> log-probability, best first, under the
            model's own distribution; None unless asked for.
        prompt_logprobs: of each prompt, each token's log-probability after those before it (None for the
            first); None unless asked for.
        prompt_top_logprobs: the same with the likeliest tokens in each place.
        usage: counts and timings.
    """

    sequences: list[list[int]]
    texts: list[str] | None
    finish_reasons: list[str]
    logprobs: list[list[float]] | None
    usage: Usage
    messages: list[dict[str, Any]] | None = None
    top_logprobs: list[list[dict[int, float]]] | None = None
    prompt_logprobs: list[list[float | None]] | None = None
    prompt_top_logprobs: list[list[dict[int, float]]] | None = None

    def _repr_html_(self) -> str:
        shown = self.texts if self.texts is not None else [" ".join(map(str, row)) for row in self.sequences]
        rows = "".join(
            f"<tr><td>{number}</td><td style='text-align:left;white-space:pre-wrap'>{html.escape(text)}</td>"
            f"<td>{len(tokens)}</td><td>{reason}</td></tr>"
            for number, (text, tokens, reason) in enumerate(
                zip(shown, self.sequences, self.finish_reasons, strict=True)
            )
        )
        head = "<tr><th></th><th style='text-align:left'>text</th><th>tokens</th><th>end</th></tr>"
        return f"<table>{head}{rows}</table>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One token of a stream.

    Attributes:
        text: what this token decided of the text; empty while a character or a possible stop string is
            incomplete.
        token_id: the token.
        logprob: as in `GenerationOutput`.
        finish_reason: on the last piece of a sequence "stop" or "length", else None.
        index: number of the sequence among those of its prompt.
        top_logprobs: as in `GenerationOutput`; None unless asked for.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: str | None
    index: int = 0
    top_logprobs: dict[int, float] | None = None

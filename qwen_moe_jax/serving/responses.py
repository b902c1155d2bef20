"""What is sent back: objects and events of OpenAI's API, made of results and pieces."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_moe_jax.generation.replies import Delta, ReplyForm
from qwen_moe_jax.generation.results import GenerationOutput, Piece, Usage
from qwen_moe_jax.generation.tokenizer import Tokenizer
from qwen_moe_jax.serving.protocol import Asked


def usage_of(results: Sequence[Usage]) -> dict[str, Any]:
    """Tokens of a request, over its prompts."""
    prompt = sum(usage.prompt_tokens for usage in results)
    new = sum(usage.generated_tokens for usage in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_prompt_tokens for usage in results)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in results),
            "rejected_prediction_tokens": sum(u.drafted_tokens - u.accepted_tokens for u in results),
        },
    }


class Responses:
    """The objects of one request."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer | None):
        """Gives it a name.

        Args:
            asked: the request.
            model: the name that is served.
            tokenizer: for the texts of tokens.
        """
        self._asked, self._model, self._tokenizer = asked, model, tokenizer
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(
        self, results: Sequence[GenerationOutput], prompts: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """The response in one piece.

        Args:
            results: of each prompt.
            prompts: of each prompt that is echoed, its "text" and, where asked for, "tokens", "logprobs" and
                "likeliest" as of `GenerationOutput`.
        """
        choices = []
        for number, out in enumerate(results):
            for place in range(len(out.sequences)):
                index = number * self._asked.count + place
                echoed = prompts[number] if prompts else None
                choices.append(self._choice(index, out, place, echoed))
        return self._object(choices) | {"usage": usage_of([out.usage for out in results])}

    def _object(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self._asked.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        found = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return found | {"choices": choices}

    def _choice(
        self, index: int, out: GenerationOutput, place: int, echoed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        reason = out.finish_reasons[place]
        assert out.logprobs is not None
        tokens, logprobs = out.sequences[place], out.logprobs[place]
        likeliest = out.top_logprobs[place] if out.top_logprobs else [{}] * len(tokens)
        found: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        wants = self._asked.logprobs is not None
        if self._asked.chat:
            message = (out.messages or [{}])[place]
            found["message"] = message
            if "tool_calls" in message and reason == "stop":
                found["finish_reason"] = "tool_calls"
            if wants:
                found["logprobs"] = self._chat_logprobs(tokens, logprobs, likeliest)
            return found
        found["text"] = (out.texts or [""])[place]
        if echoed is not None:
            found["text"] = echoed["text"] + found["text"]
            if wants:
                tokens = [*echoed["tokens"], *tokens]
                logprobs = [*echoed["logprobs"], *logprobs]
                likeliest = [*echoed["likeliest"], *likeliest]
        if wants:
            found["logprobs"] = self._completion_logprobs(tokens, logprobs, likeliest)
        return found

    # Log-probabilities.

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _bytes(self, token: int) -> list[int]:
        known = [] if self._tokenizer is None else self._tokenizer.token_bytes
        return list(known[token]) if token < len(known) else []

    def _chat_logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], likeliest: Sequence[Mapping[int, float]]
    ) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._text(token), "logprob": logprob, "bytes": self._bytes(token)}

        content = []
        for token, logprob, best in zip(tokens, logprobs, likeliest, strict=True):
            one = entry(token, logprob)
            one["top_logprobs"] = [entry(other, value) for other, value in best.items()]
            content.append(one)
        return {"content": content, "refusal": None}

    def _completion_logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        likeliest: Sequence[Mapping[int, float]],
    ) -> dict[str, Any]:
        texts = [self._text(token) for token in tokens]
        offsets, offset = [], 0
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        tops = None
        if self._asked.logprobs:
            tops = [{self._text(t): v for t, v in best.items()} if best else None for best in likeliest]
        return {
            "tokens": texts,
            "token_logprobs": list(logprobs),
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    # Events of a stream.

    def stream(self, reply: ReplyForm | None) -> "Stream":
        """The events of a request with one prompt."""
        return Stream(self, self._asked, reply)

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """An event."""
        found = self._object(choices, chunk=True)
        return found | {"usage": usage} if self._asked.include_usage else found

    def logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Of the tokens of an event."""
        if self._asked.logprobs is None:
            return None
        tokens, logprobs = [p.token_id for p in pieces], [p.logprob for p in pieces]
        likeliest = [p.top_logprobs or {} for p in pieces]
        if self._asked.chat:
            return self._chat_logprobs(tokens, logprobs, likeliest)
        return self._completion_logprobs(tokens, logprobs, likeliest)


class Stream:
    """Pieces as events."""

    def __init__(self, responses: Responses, asked: Asked, reply: ReplyForm | None):
        self._responses, self._asked = responses, asked
        parsers = [reply.parser() for _ in range(asked.count)] if reply is not None else []
        self._parsers = parsers if asked.chat else []
        self._waiting: list[list[Piece]] = [[] for _ in range(asked.count)]
        self._calls = [0] * asked.count

    def begin(self) -> list[dict[str, Any]]:
        """What says whose the message is."""
        if not self._asked.chat:
            return []
        role = {"role": "assistant", "content": ""}
        choices = [
            {"index": index, "delta": dict(role), "logprobs": None, "finish_reason": None}
            for index in range(self._asked.count)
        ]
        return [self._responses.chunk([choice]) for choice in choices]

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The events that a piece decides."""
        index, waiting = piece.index, self._waiting[piece.index]
        waiting.append(piece)
        reason = piece.finish_reason
        if not self._asked.chat:
            if not piece.text and reason is None:
                return []
            choice = {"index": index, "text": piece.text, "finish_reason": reason}
            return [self._event(choice, index)]
        if not self._parsers:
            deltas = [Delta(content=piece.text)] if piece.text else []
        else:
            parser = self._parsers[index]
            deltas = parser.push(piece.text) if piece.text else []
            deltas += parser.finish() if reason is not None else []
        events = [self._event({"index": index, "delta": self._delta(d, index)}, index) for d in deltas]
        if reason is not None:
            calls = self._calls[index] and reason == "stop"
            last = {"index": index, "delta": {}, "finish_reason": "tool_calls" if calls else reason}
            events.append(self._event(last, index))
        return events

    def _event(self, choice: dict[str, Any], index: int) -> dict[str, Any]:
        pieces, self._waiting[index] = self._waiting[index], []
        found = {"finish_reason": None, **choice, "logprobs": self._responses.logprobs_of(pieces)}
        return self._responses.chunk([found])

    def _delta(self, delta: Delta, index: int) -> dict[str, Any]:
        if delta.call is None:
            return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}
        number, self._calls[index] = self._calls[index], self._calls[index] + 1
        return {"tool_calls": [{"index": number, **delta.call.to_dict()}]}

"""`Generator`: logits and text of a loaded model."""

import dataclasses
import inspect
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.engine.core import Core
from qwen_moe_jax.engine.pools import pool_sizes
from qwen_moe_jax.engine.scoring import Scorer
from qwen_moe_jax.engine.steps import Steps
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.asked import Asked
from qwen_moe_jax.generation.batching import PromptBatch, to_rows
from qwen_moe_jax.generation.chat import ChatTemplate, template_options
from qwen_moe_jax.generation.defaults import with_defaults
from qwen_moe_jax.generation.engine import Engine
from qwen_moe_jax.generation.model import LoadedModel
from qwen_moe_jax.generation.options import GenerationConfig, check_ends
from qwen_moe_jax.generation.replies import ReplyForm
from qwen_moe_jax.generation.requests import Request
from qwen_moe_jax.generation.results import GenerationOutput, Piece, Usage
from qwen_moe_jax.generation.tool_forms import chosen_tools

# Sets of edits whose compiled scoring is kept.
_SCORERS = 4
# Rows that are computed together at most where nobody says how many.
MAX_ROWS = 64


class Generator(LoadedModel):
    """What continues prompts, through an engine."""

    _engine: Engine | None = None
    # Engine with the edits of the latest call that had any, which tell it from others.
    _edited: tuple[tuple[Any, ...], Engine] | None = None

    def logits(self, input_ids: Any, attention_mask: Any = None) -> jax.Array:
        """Next-token logits of every position.

        Args:
            input_ids: integer array [batch, seq], or lists of token ids (ragged rows count as
                right-padded).
            attention_mask: 0/1 like input_ids; pads may stand left or right of a row's tokens.

        Returns:
            float32 [batch, seq, vocab]; zeros at masked positions.

        Raises:
            InputError: as for `generate`.
        """
        if isinstance(input_ids, str) or (
            isinstance(input_ids, list) and input_ids and isinstance(input_ids[0], str)
        ):
            raise InputError("logits takes token ids; encode text with model.tokenizer.encode first.")
        batch = self._rows(input_ids, attention_mask, {})
        self._check_length(batch, 0)
        out = np.zeros((len(batch.rows), batch.width, self.config.vocab_size), np.float32)
        for start, chunk in self.sequence_logits.chunks(batch.rows):
            for index, (row, offset) in enumerate(zip(batch.rows, batch.offsets, strict=True)):
                count = min(len(row) - start, chunk.shape[1])
                if count > 0:
                    out[index, offset + start : offset + start + count] = chunk[index, :count]
        return jnp.asarray(out)

    def generate(
        self,
        prompt: Any,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        edit: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Continues prompts, all of them together, through an engine that the model keeps (see `engine`).

        Args:
            prompt: a text, several texts, chat messages, several chats, an integer array [batch, seq],
                or lists of token ids.
            generation_config: how; see `GenerationConfig`.
            attention_mask: 0/1 like an array prompt; pads may stand left or right of a row's tokens.
            edit: point -> function that replaces its value, as of `QwenMoe.run`; nothing is drafted then.
            **options: fields of `GenerationConfig`; they override `generation_config`. Of chats also
                enable_thinking, tools, chat_template_kwargs, continue_final_message and
                add_generation_prompt, as of `chat.template_options`; with tools, `out.messages` has the calls
                of a reply, and `tool_choice` may say that it has to make one (`tool_forms.chosen_tools`).

        Raises:
            InputError: an empty or malformed prompt, ids outside the vocabulary, a prompt that leaves no
                room in the context, an unknown or contradictory option.
        """
        template, tools = template_of(options, self.chat_template)
        config = self._options(generation_config, options)
        batch = self._rows(prompt, attention_mask, template)
        began = time.perf_counter()
        requests = self._own_engine(edit).start(self._asked(batch, config, tools))
        try:
            found = [request.result() for request in requests]
        finally:  # an error, or Ctrl-C: nothing goes on behind it
            for request in requests:
                request.cancel()
        return self._with_prompts(batch, config, edit, _together(requests, found, began))

    def _with_prompts(
        self,
        batch: PromptBatch,
        config: GenerationConfig,
        edit: Mapping[str, Any] | None,
        out: GenerationOutput,
    ) -> GenerationOutput:
        """The result with what `prompt_logprobs` asks for, from a pass over the prompts."""
        most = config.prompt_logprobs
        if most is None:
            return out
        rows = [row.tolist() for row in batch.rows]
        scored = self._scorer(edit)([row[:1] for row in rows], [row[1:] for row in rows], top=most)
        return dataclasses.replace(
            out,
            prompt_logprobs=[[None, *one.logprobs.tolist()] for one in scored],
            prompt_top_logprobs=[[{}, *one.likeliest()] for one in scored] if most else None,
        )

    def _scorer(self, edit: Mapping[str, Any] | None) -> Scorer:
        """The compiled steps of scoring, with edits; the last few are kept."""
        key = self._passes.key_of(edit)
        if key not in self._scorers:
            while len(self._scorers) >= _SCORERS:
                del self._scorers[next(iter(self._scorers))]
            forward = self._passes.forward(edit) if edit else self._steps.forward.edited({})
            self._scorers[key] = Scorer(forward)
        return self._scorers[key]

    def stream(
        self,
        prompt: Any,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Any = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Continues one prompt, yielding a piece for each token as it is decided.

        The pieces' texts add up to the text that `generate` returns. Arguments and errors are
        `generate`'s; errors come with the call, not with the first piece.
        """
        template, tools = template_of(options, self.chat_template)
        config = self._options(generation_config, options)
        batch = self._rows(prompt, attention_mask, template)
        if config.prompt_logprobs is not None:
            raise InputError("stream gives new tokens only; use generate for prompt_logprobs.")
        if len(batch.rows) != 1 or config.num_return_sequences != 1:
            raise InputError(
                f"stream takes one prompt and one sequence, and was given {len(batch.rows)} prompts with "
                f"num_return_sequences {config.num_return_sequences}; use generate."
            )
        if self.tokenizer is None:
            raise InputError("stream yields text, but this checkpoint has no tokenizer.json; use generate.")
        request = self._own_engine().start(self._asked(batch, config, tools), one_by_one=True)[0]
        return _pieces(request)

    def engine(
        self, max_rows: int = MAX_ROWS, memory: int | None = None, *, prefix_cache: bool = True
    ) -> Engine:
        """An engine of its own pools, for many requests at once; use it with `with`.

        Args:
            max_rows: sequences that are computed together at most.
            memory: bytes of each device for pages and states; None for what it has left. On a CPU with the
                C++ kernels they take memory only as they are written.
            prefix_cache: find the beginnings of prompts that were computed before, and keep them.

        Raises:
            InputError: not a positive number of rows or bytes, or memory that does not hold the states of so
                many rows.
        """
        for name, value in (("max_rows", max_rows), ("memory", memory)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; expected a positive integer.")
        return self._engine_of(self._steps, max_rows, memory, prefix_cache=prefix_cache)

    def _engine_of(
        self, steps: Steps, max_rows: int = MAX_ROWS, memory: int | None = None, *, prefix_cache: bool = True
    ) -> Engine:
        forward, context = steps.forward, self.config.max_position_embeddings
        sizes = pool_sizes(
            forward, max_rows=max_rows, memory=memory, prefix_cache=prefix_cache, context=context
        )

        def make() -> Core:
            return Core(forward, steps, sizes, context=context, prefix_cache=prefix_cache)

        return Engine(self, make)

    def _own_engine(self, edit: Mapping[str, Any] | None = None) -> Engine:
        """The one of `generate` and `stream`, made when it is first needed; one more for the last edits."""
        alone = not self._steps.forward.memory_as_used  # pools take what is left: there is room for one
        if not edit:
            if alone and self._edited is not None:
                self._edited[1].close()
                self._edited = None
            if self._engine is None:
                self._engine = self.engine()
            return self._engine
        if alone and self._engine is not None:
            self._engine.close()
            self._engine = None
        key = self._passes.key_of(edit)
        if self._edited is None or self._edited[0] != key:
            if self._edited is not None:
                self._edited[1].close()
            self._edited = key, self._engine_of(Steps(self._passes.forward(edit)))
        return self._edited[1]

    def _options(self, config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        if config is not None and not isinstance(config, GenerationConfig):
            raise InputError(f"generation_config is a {type(config).__name__}; expected a GenerationConfig.")
        config = with_defaults(self.generation_defaults, config, options)
        most = self.draft_tokens
        if config.draft_tokens is not None and config.draft_tokens > most:
            raise InputError(
                f"draft_tokens is {config.draft_tokens}, and this model drafts at most {most}; load a "
                f"checkpoint with multi-token prediction, with draft_tokens={config.draft_tokens}."
            )
        given = {"end": (*(config.eos_ids or ()), *config.stop_token_ids), "biased": config.logit_bias or ()}
        for name, tokens in given.items():
            for token in tokens:
                if not 0 <= token < self.config.vocab_size:
                    raise InputError(
                        f"the {name} token {token} is outside the vocabulary of {self.config.vocab_size}."
                    )
        if self.tokenizer is None and (config.stops or config.is_guided):
            named = {"stop_strings": config.stops, "bad_words": config.bad_words}
            named |= {"response_format": config.response_format is not None}
            name = next((name for name, value in named.items() if value), "thinking_budget")
            raise InputError(
                f"{name} needs text, but this checkpoint has no tokenizer.json; use options of token ids "
                "(eos_token_id, logit_bias)."
            )
        return config

    def _rows(self, prompt: Any, attention_mask: Any, template_options: dict[str, Any]) -> PromptBatch:
        return to_rows(
            prompt,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            vocab_size=self.config.vocab_size,
            attention_mask=attention_mask,
            template_options=template_options,
        )

    def _check_length(self, batch: PromptBatch, new_tokens: int) -> None:
        longest, context = max(map(len, batch.rows)), self.config.max_position_embeddings
        if longest > context or (new_tokens and longest >= context):
            raise InputError(f"the prompt has {longest} tokens, but the context holds {context}; shorten it.")
        if longest + new_tokens > context:
            raise InputError(
                f"the prompt's {longest} tokens and max_new_tokens {new_tokens} exceed the context of "
                f"{context}; give max_new_tokens at most {context - longest}."
            )

    def asked(self, prompt: Any, config: GenerationConfig | None, options: dict[str, Any]) -> list[Asked]:
        """What an engine takes: prompts of any form that `generate` takes, with their options.

        Raises:
            InputError: as for `generate`.
        """
        template, tools = template_of(options, self.chat_template)
        mask = options.pop("attention_mask", None)
        checked = self._options(config, options)
        if checked.prompt_logprobs is not None:
            raise InputError(
                f"prompt_logprobs is {checked.prompt_logprobs}, which generate gives, and a request to an "
                "engine does not; use generate."
            )
        return self._asked(self._rows(prompt, mask, template), checked, tools)

    def _asked(self, batch: PromptBatch, config: GenerationConfig, tools: Any = None) -> list[Asked]:
        self._check_length(batch, config.max_new_tokens or 1)
        end_ids = self._eos_ids if config.eos_ids is None else config.eos_ids
        end_ids = tuple(dict.fromkeys((*end_ids, *config.stop_token_ids)))
        check_ends(config, end_ids)
        seeds = config.seeds(len(batch.rows))
        drafts = self.draft_tokens if config.draft_tokens is None else config.draft_tokens
        chats = batch.chats or [None] * len(batch.rows)
        return [
            Asked(
                ids=row,
                config=config,
                room=self.config.max_position_embeddings - len(row),
                end_ids=end_ids,
                seed=seed,
                draft_tokens=drafts,
                guides=self._guiding.guides(row, config, end_ids),
                reply=None if chat is None else ReplyForm.behind(chat, tools or ()),
            )
            for row, seed, chat in zip(batch.rows, seeds, chats, strict=True)
        ]


def _together(requests: list[Request], found: list[GenerationOutput], began: float) -> GenerationOutput:
    """Several prompts' results as one."""
    ended = max(request.ended or began for request in requests)
    first = max(request.first_token or ended for request in requests)
    return GenerationOutput(
        sequences=[row for out in found for row in out.sequences],
        texts=None if found[0].texts is None else [text for out in found for text in out.texts or ()],
        messages=None if found[0].messages is None else [m for out in found for m in out.messages or ()],
        top_logprobs=None
        if found[0].top_logprobs is None
        else [row for out in found for row in out.top_logprobs or ()],
        finish_reasons=[reason for out in found for reason in out.finish_reasons],
        logprobs=None if found[0].logprobs is None else [row for out in found for row in out.logprobs or ()],
        usage=Usage(
            prompt_tokens=sum(out.usage.prompt_tokens for out in found),
            cached_prompt_tokens=sum(out.usage.cached_prompt_tokens for out in found),
            generated_tokens=sum(out.usage.generated_tokens for out in found),
            drafted_tokens=sum(out.usage.drafted_tokens for out in found),
            accepted_tokens=sum(out.usage.accepted_tokens for out in found),
            prefill_seconds=first - began,
            decode_seconds=ended - first,
        ),
    )


def template_of(options: dict[str, Any], chat_template: ChatTemplate | None) -> tuple[dict[str, Any], Any]:
    """(what the chat template is given beside the messages, tools), taken out of options; a call that a reply
    has to make becomes its `response_format`.

    Raises:
        InputError: as of `template_options` and `chosen_tools`, or a form beside such a call.
    """
    choice = options.pop("tool_choice", None)
    if choice is not None:
        template_options(tools=options.get("tools"))  # says what is wrong with them
        options["tools"], called = chosen_tools(options.get("tools"), choice)
        if called:
            if options.get("response_format") is not None:
                raise InputError(
                    f"tool_choice is {choice!r} and response_format is given; a reply has one form only."
                )
            xml = chat_template is None or "<function=" in chat_template.source
            options["response_format"] = {"type": "tool_call", "tools": called, "xml": xml}
    names = [name for name in inspect.signature(template_options).parameters if name in options]
    given = {name: options.pop(name) for name in names}
    return template_options(**given), given.get("tools")


def _pieces(request: Request) -> Iterator[Piece]:
    """What a request says; it ends with whoever reads it."""
    try:
        yield from request
    finally:
        request.cancel()

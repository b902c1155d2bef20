"""Guides of sequences, made of what a request asks for."""

import copy
import threading
from collections.abc import Sequence

import numpy as np

from qwen_moe_jax.generation.forms import Forms, grammar_of
from qwen_moe_jax.generation.guides import (
    AfterThinking,
    AllOf,
    BannedWords,
    RowGuide,
    ThinkingBudget,
)
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.replies import opens_thinking
from qwen_moe_jax.generation.tokenizer import Tokenizer

# Lists of banned words whose tokens are kept.
_WORD_LISTS = 16
# Tokens of a prompt whose text says whether it ends with an opened tag.
_TAIL = 16


class Guiding:
    """Makes guides, and keeps what is found out of a vocabulary for the last few forms and words."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        """Finds out nothing yet.

        Args:
            tokenizer: of the model; without one nothing that needs text is asked for.
            vocab_size: of the model.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._forms: Forms | None = None
        self._banned: dict[tuple[str, ...], BannedWords] = {}
        self._lock = threading.Lock()  # requests are submitted from any thread

    def guides(
        self, prompt: np.ndarray, config: GenerationConfig, end_ids: Sequence[int]
    ) -> tuple[RowGuide, ...]:
        """What has a say in the tokens of each sequence of a prompt; empty for nothing.

        Args:
            prompt: int32 [tokens].
            config: what is asked for.
            end_ids: tokens that end a sequence.

        Raises:
            InputError: a form that cannot be followed.
        """
        if self._tokenizer is None or not config.is_guided:
            return ()
        with self._lock:
            return self._made(self._tokenizer, prompt, config, end_ids)

    def _made(
        self,
        tokenizer: Tokenizer,
        prompt: np.ndarray,
        config: GenerationConfig,
        end_ids: Sequence[int],
    ) -> tuple[RowGuide, ...]:
        grammar = grammar_of(config.response_format)
        tail = tokenizer.decode(prompt[-_TAIL:].tolist(), skip_special_tokens=False)
        opened = opens_thinking(tail)
        made = []
        for _ in range(config.num_return_sequences):
            guides: list[RowGuide] = []
            if config.bad_words:
                guides.append(self._banned_words(tokenizer, tuple(config.bad_words)))
            if config.thinking_budget is not None:
                guides.append(ThinkingBudget(tokenizer, config.thinking_budget, opened=opened))
            if grammar is not None:
                self._forms = self._forms or Forms(tokenizer, self._vocab_size)
                form = self._forms.guide(grammar, end_ids)
                guides.append(AfterThinking(form, tokenizer) if opened else form)
            if not guides:  # a form that is plain text
                return ()
            made.append(guides[0] if len(guides) == 1 else AllOf(guides))
        return tuple(made)

    def _banned_words(self, tokenizer: Tokenizer, words: tuple[str, ...]) -> BannedWords:
        if words not in self._banned:
            while len(self._banned) >= _WORD_LISTS:
                del self._banned[next(iter(self._banned))]
            self._banned[words] = BannedWords(tokenizer, words)
        return copy.copy(self._banned[words])

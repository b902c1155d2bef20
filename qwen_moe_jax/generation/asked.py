"""A prompt with its options, as an engine takes it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.formats.cache import PAGE
from qwen_moe_jax.generation.guides import RowGuide
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.generation.replies import ReplyForm
from qwen_moe_jax.generation.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt as ids, and how it is to be continued.

    Attributes:
        ids: int32 [tokens].
        config: checked.
        room: tokens that the context has left behind the prompt.
        end_ids: tokens that end a text.
        seed: of this prompt.
        draft_tokens: that a step verifies at most.
        guides: of each sequence, what has a say in its tokens; empty for none.
        reply: how the reply to a chat is told apart; None for other prompts.
    """

    ids: np.ndarray
    config: GenerationConfig
    room: int
    end_ids: tuple[int, ...]
    seed: int
    draft_tokens: int
    guides: tuple[RowGuide, ...] = ()
    reply: ReplyForm | None = None


class Model(Protocol):
    """What an engine needs to know of its model beside its steps."""

    tokenizer: Tokenizer | None

    def asked(self, prompt: Any, config: GenerationConfig | None, options: dict[str, Any]) -> list[Asked]:
        """Prompts of any form, with their options; one entry a prompt. Raises InputError."""
        ...


def limited(asked: Asked, pages: int) -> Asked:
    """With a number of new tokens: as many as there is room for, if none was given.

    Args:
        asked: a prompt.
        pages: of the engine, on each data rank.
    """
    if asked.config.max_new_tokens is not None:
        return asked
    # the last token is never written
    room = min(asked.room, pages * PAGE - len(asked.ids) + 1)
    new = max(1, asked.config.min_new_tokens, room)
    return dataclasses.replace(asked, config=dataclasses.replace(asked.config, max_new_tokens=new))


def options_of_each(
    options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, prompts: int
) -> Sequence[Mapping[str, Any]]:
    """A mapping for each of some prompts, of one for all of them or one for each.

    Raises:
        InputError: anything else.
    """
    if options is None or isinstance(options, Mapping):
        return [options or {}] * prompts
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise InputError(
            f"options is a {type(options).__name__}; expected a mapping, or one for each prompt."
        )
    if len(options) != prompts:
        raise InputError(f"options holds {len(options)} entries for {prompts} prompts; give one for each.")
    bad = [entry for entry in options if not isinstance(entry, Mapping)]
    if bad:
        raise InputError(f"options holds a {type(bad[0]).__name__}; expected a mapping for each prompt.")
    return options

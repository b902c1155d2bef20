"""From anything a user may call a prompt to rows of token ids, and back to the shape they came in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.generation.chat import ChatTemplate
from qwen_moe_jax.generation.tokenizer import Tokenizer

_FORMS = "a text, texts, chat messages, chats, an integer array [batch, seq] or lists of token ids"


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Rows without padding.

    Attributes:
        rows: one int32 array of token ids a row.
        offsets: where each row begins in the array it came from; 0 unless left-padded.
        width: columns of that array, or the longest row.
        chats: of chats, their texts; None for other prompts.
    """

    rows: list[np.ndarray]
    offsets: list[int]
    width: int
    chats: list[str] | None = None


def to_rows(
    prompt: Any,
    *,
    tokenizer: Tokenizer | None,
    chat_template: ChatTemplate | None,
    vocab_size: int,
    attention_mask: Any = None,
    template_options: Mapping[str, Any] | None = None,
) -> PromptBatch:
    """Token rows of a prompt in any accepted form.

    Args:
        prompt: see the error below for the forms.
        tokenizer: for texts and chats.
        chat_template: for chats.
        vocab_size: ids must lie below it.
        attention_mask: 0/1 like an array prompt; each row's ones stand together.
        template_options: variables for the chat template, such as enable_thinking.

    Raises:
        InputError: an empty or malformed prompt, ids outside the vocabulary, a mask that does not fit,
            or text for a checkpoint without tokenizer or template.
    """
    if _is_chat(prompt) or (isinstance(prompt, list) and prompt and all(map(_is_chat, prompt))):
        chats = [prompt] if _is_chat(prompt) else prompt
        if chat_template is None:
            raise InputError(
                "the prompt is a chat, but this checkpoint has no chat template; give text or ids."
            )
        texts = [chat_template.render(chat, **(template_options or {})) for chat in chats]
        if tokenizer is None:
            raise InputError("the prompt is a chat, but this checkpoint has no tokenizer.json; give ids.")
        batch = _batch([tokenizer.encode(text) for text in texts], vocab_size)
        return dataclasses.replace(batch, chats=texts)
    if template_options:
        raise InputError(
            f"{', '.join(template_options)} only applies to chat messages, and the prompt is none."
        )
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(text, str) for text in prompt):
        if attention_mask is not None:
            raise InputError("attention_mask goes with an integer array; texts need none.")
        if tokenizer is None:
            raise InputError("the prompt is text, but this checkpoint has no tokenizer.json; give token ids.")
        return _batch([tokenizer.encode(text) for text in prompt], vocab_size)
    if hasattr(prompt, "shape"):
        return _from_array(np.asarray(prompt), attention_mask, vocab_size)
    if attention_mask is not None:
        raise InputError("attention_mask goes with an integer array [batch, seq]; ragged lists need none.")
    if isinstance(prompt, (list, tuple)):
        if not prompt:
            raise InputError("the prompt is empty; expected at least one token.")
        if all(_is_id(token) for token in prompt):
            return _batch([prompt], vocab_size)
        if all(
            isinstance(row, (list, tuple)) or (isinstance(row, np.ndarray) and row.ndim) for row in prompt
        ):
            return _batch(prompt, vocab_size)
    raise InputError(f"the prompt is {_describe(prompt)}; expected {_FORMS}.")


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)


def _is_id(token: Any) -> bool:
    return isinstance(token, (int, np.integer)) and not isinstance(token, (bool, np.bool_))


def _describe(prompt: Any) -> str:
    if isinstance(prompt, (list, tuple)):
        return f"a list of {', '.join(sorted({type(entry).__name__ for entry in prompt}))}"
    return f"a {type(prompt).__name__}"


def _batch(rows: Sequence[Any], vocab_size: int) -> PromptBatch:
    arrays = []
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"prompt {number} is empty; expected at least one token.")
        if not all(_is_id(token) for token in row):
            raise InputError(f"prompt {number} holds {_describe(list(row))}; expected token ids.")
        arrays.append(_check_ids(np.asarray(row), vocab_size))
    return PromptBatch(arrays, [0] * len(arrays), max(map(len, arrays)))


def _check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} is outside the vocabulary; expected 0 to {vocab_size - 1}.")
    return ids.astype(np.int32)


def _from_array(ids: np.ndarray, attention_mask: Any, vocab_size: int) -> PromptBatch:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"the prompt is an array of {ids.dtype} and shape {list(ids.shape)}; expected integers "
            "[batch, seq]."
        )
    if 0 in ids.shape:
        raise InputError(f"the prompt has shape {list(ids.shape)}; expected at least one row and one token.")
    if attention_mask is None:
        return PromptBatch([_check_ids(row, vocab_size) for row in ids], [0] * len(ids), ids.shape[1])
    try:
        mask = np.asarray(attention_mask)
    except ValueError:
        raise InputError("attention_mask is ragged; expected an array like the ids'.") from None
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}; expected the ids' {list(ids.shape)}.")
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask holds values other than 0 and 1.")
    rows, offsets = [], []
    for number, (row, ones) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        places = np.flatnonzero(ones)
        if not len(places):
            raise InputError(f"attention_mask masks out all of row {number}; expected at least one token.")
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            raise InputError(f"attention_mask of row {number} has a hole; pads may only stand left or right.")
        rows.append(_check_ids(row[first : last + 1], vocab_size))
        offsets.append(first)
    return PromptBatch(rows, offsets, ids.shape[1])

"""From logits to tokens: penalties, filters and the draw, as pure functions on [batch, vocab].

Order as in transformers: repetition, presence and frequency penalties on the raw logits; then biases and what
may not be chosen at all; then, when sampling, temperature, top-k, top-p (Holtzman et al., arXiv:1904.09751)
and min-p (Nguyen et al., arXiv:2407.01082). All values are traced, so that changing them recompiles nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What a row's history holds for a token that occurs in the prompt, beside how often it was generated.
IN_PROMPT = 1 << 30
# Tokens of a row that have a bias, at most, and end tokens that `min_new_tokens` holds back.
MOST_BIASES = 320
MOST_ENDS = 8
# A banned token's logit: below every other one, but above what a mask of allowed tokens leaves out, so that a
# token which is banned and the only one allowed is still chosen.
_BANNED = -1e30
_NO_TOKEN = 2**31 - 1  # beyond every vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How one row's tokens are chosen; meanings as in `GenerationConfig`.

    Attributes:
        do_sample: draw, instead of taking the most likely token.
        seed: of the row's prompt.
        sequence_index: the row's number among the sequences of its prompt.
        biases: (token, what is added to its logit), at most MOST_BIASES; -inf bans it.
        ends: tokens that are banned until there are `min_new_tokens`, at most MOST_ENDS.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sequence_index: int = 0
    biases: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()

    @property
    def filters(self) -> bool:
        """Some of top-k, top-p and min-p is on."""
        return self.do_sample and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Some penalty is on, so that tokens have to be counted."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def adjusts(self) -> bool:
        """Some token has a bias, or may not come yet."""
        return bool(self.biases) or self.min_new_tokens > 0

    @property
    def greedy(self) -> bool:
        """The most likely token as the model has it."""
        return not self.do_sample and not self.penalises and not self.adjusts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """`RowSampling` as arrays, one entry a row."""

    do_sample: jax.Array  # [batch] bool
    filters: jax.Array  # [batch] bool
    penalises: jax.Array  # [batch] bool
    adjusts: jax.Array  # [batch] bool
    seed: jax.Array  # [batch] uint32
    sequence_index: jax.Array  # [batch] uint32

    temperature: jax.Array  # [batch] float32
    top_k: jax.Array  # [batch] int32, 0 keeps all
    top_p: jax.Array  # [batch] float32
    min_p: jax.Array  # [batch] float32
    repetition_penalty: jax.Array  # [batch] float32
    presence_penalty: jax.Array  # [batch] float32
    frequency_penalty: jax.Array  # [batch] float32
    min_new_tokens: jax.Array  # [batch] int32
    biased: jax.Array  # [batch, MOST_BIASES] int32, beyond the vocabulary where there are fewer
    bias: jax.Array  # [batch, MOST_BIASES] float32
    ends: jax.Array  # [batch, MOST_ENDS] int32, beyond the vocabulary where there are fewer

    @classmethod
    def of(cls, rows: Sequence[RowSampling]) -> "SamplingParams":
        """Of rows in order, as arrays of the host."""
        dtypes: dict[str, Any] = {"seed": np.uint32, "sequence_index": np.uint32, "top_k": np.int32}
        dtypes |= dict.fromkeys(("do_sample", "filters", "penalises", "adjusts"), np.bool_)
        dtypes["min_new_tokens"] = np.int32
        values: dict[str, Any] = {
            "biased": np.full((len(rows), MOST_BIASES), _NO_TOKEN, np.int32),
            "bias": np.zeros((len(rows), MOST_BIASES), np.float32),
            "ends": np.full((len(rows), MOST_ENDS), _NO_TOKEN, np.int32),
        }
        for index, row in enumerate(rows):
            for place, (token, bias) in enumerate(row.biases):
                values["biased"][index, place], values["bias"][index, place] = token, bias
            values["ends"][index, : len(row.ends)] = row.ends
        for field in dataclasses.fields(cls):
            if field.name in values:
                continue
            listed = [getattr(row, field.name) for row in rows]
            if field.name == "top_k":  # any k above the vocabulary keeps all
                listed = [min(k, 2**31 - 1) for k in listed]
            values[field.name] = np.asarray(listed, dtypes.get(field.name, np.float32))
        return cls(**values)


def history(vocab: int, prompt: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """What penalties know of a row: int32 [vocab], how often each token was generated, and IN_PROMPT more for
    one that occurs in the prompt."""
    counts = np.bincount(generated, minlength=vocab).astype(np.int32)
    counts[prompt] |= IN_PROMPT
    return counts


def apply_penalties(logits: jax.Array, seen: jax.Array, params: SamplingParams) -> jax.Array:
    """Makes tokens that occurred less likely.

    Args:
        logits: float32 [batch, vocab].
        seen: int32 [batch, vocab], each row's `history`.
        params: repetition penalty acts on prompt and generated tokens, the others on generated ones.
    """
    generated = seen & (IN_PROMPT - 1)
    penalty = params.repetition_penalty[:, None]
    repeated = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(seen > 0, repeated, logits)
    logits = logits - params.presence_penalty[:, None] * (generated > 0)
    return logits - params.frequency_penalty[:, None] * generated


def adjust_logits(logits: jax.Array, params: SamplingParams, step: jax.Array) -> jax.Array:
    """Adds biases, and holds end tokens back.

    Args:
        logits: float32 [batch, vocab].
        params: one value a row.
        step: int32 [batch], tokens that each row has.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, params.biased].add(params.bias, mode="drop")
    early = jnp.where((step < params.min_new_tokens)[:, None], params.ends, _NO_TOKEN)
    logits = logits.at[rows, early].set(_BANNED, mode="drop")
    return jnp.maximum(logits, _BANNED)


def unpack_mask(words: jax.Array, vocab: int) -> jax.Array:
    """uint32 [batch, vocab / 32, rounded up], a bit a token, the lowest first -> bool [batch, vocab]."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :vocab].astype(bool)


def mask_words(vocab: int) -> int:
    """Words of a mask of tokens, as of `unpack_mask`."""
    return -(-vocab // 32)


def scale_logits(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Divides by the temperature."""
    return logits / params.temperature[:, None]


def filter_logits(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Temperature, then -inf outside the support that top-k, top-p and min-p leave.

    Each filter sees what the one before left. One sort decides them all: in descending order every
    filter keeps a first part. Tokens as likely as the last of the top k are kept with it; among tokens
    of equal probability at the edge of top-p, those with the larger ids are kept (transformers leaves
    the choice among them to a sort that is not stable).

    Args:
        logits: float32 [batch, vocab].
        params: one value a row.
    """
    vocab = logits.shape[-1]
    logits = scale_logits(logits, params)
    order = jnp.argsort(logits, axis=-1, stable=True)[:, ::-1]  # descending, larger ids first
    ranked = jnp.take_along_axis(logits, order, axis=-1)

    last = jnp.clip(jnp.where(params.top_k > 0, params.top_k, vocab), 1, vocab) - 1
    threshold = jnp.take_along_axis(ranked, last[:, None], axis=-1)
    ranked = jnp.where(ranked < threshold, -jnp.inf, ranked)

    probabilities = jax.nn.softmax(ranked, axis=-1)
    # Mass of this token and all less likely ones; summed from the small end, as the reference does.
    tail = jnp.cumsum(probabilities[:, ::-1], axis=-1)[:, ::-1]
    off = params.top_p[:, None] >= 1
    keep = off | (tail > 1 - params.top_p[:, None])
    keep = keep.at[:, 0].set(True)  # at least one token stays
    ranked = jnp.where(keep, ranked, -jnp.inf)

    probabilities = jax.nn.softmax(ranked, axis=-1)
    keep = probabilities >= params.min_p[:, None] * probabilities[:, :1]
    ranked = jnp.where(keep.at[:, 0].set(True), ranked, -jnp.inf)
    # Back to the tokens' places by a scatter: a second sort would take a hundred times as long.
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(ranked).at[rows, order].set(ranked, unique_indices=True)


def sample(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token a row, drawn from softmax(logits) by the Gumbel-max trick.

    Args:
        logits: float32 [batch, vocab].
        keys: [batch] PRNG keys; a row uses its own only.

    Returns:
        int32 [batch].
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def row_keys(seeds: jax.Array, sequence_index: jax.Array) -> jax.Array:
    """A PRNG key a row, from its prompt's seed and its number among the prompt's sequences ([batch] each)."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(
        seeds, sequence_index
    )


def step_keys(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The key of each row's next token, from how many it has ([batch] each)."""
    return jax.vmap(jax.random.fold_in)(keys, step)


def choose_tokens(
    logits: jax.Array,
    params: SamplingParams,
    step: jax.Array,
    seen: jax.Array,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """The next token of every row. Filters and penalties cost nothing while no row asks for them.

    Args:
        logits: float32 [batch, vocab].
        params: one value a row.
        step: int32 [batch], tokens that each row has; with its seed and number it decides the draw.
        seen: int32 [batch, vocab], each row's `history`.
        allowed: uint32 [batch, words], the mask of tokens that may be chosen (`unpack_mask`); None for all.

    Returns:
        int32 [batch].
    """
    raw = logits
    logits = lax.cond(params.penalises.any(), lambda: apply_penalties(raw, seen, params), lambda: raw)
    penalised = logits
    logits = lax.cond(params.adjusts.any(), lambda: adjust_logits(penalised, params, step), lambda: penalised)
    if allowed is not None:
        logits = jnp.where(unpack_mask(allowed, logits.shape[-1]), logits, -jnp.inf)

    def drawn() -> jax.Array:
        shaped = lax.cond(
            params.filters.any(), lambda: filter_logits(logits, params), lambda: scale_logits(logits, params)
        )
        keys = step_keys(row_keys(params.seed, params.sequence_index), step)
        return jnp.where(params.do_sample, sample(shaped, keys), most_likely(logits))

    return lax.cond(params.do_sample.any(), drawn, lambda: most_likely(logits))


def most_likely(logits: jax.Array) -> jax.Array:
    """[batch, vocab] -> int32 [batch], of equals the first."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The tokens with the largest logits [batch, vocab], best first: (int32 [batch, count], log-probabilities
    float32 [batch, count])."""
    values, tokens = lax.top_k(logits, count)
    return tokens.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each row's token under softmax(logits): [batch, vocab], int32 [batch] -> float32 [batch]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

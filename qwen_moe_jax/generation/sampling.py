"""From logits to tokens: penalties, filters and the draw, as pure functions on [batch, vocab].

Order as in transformers: repetition, presence and frequency penalties on the raw logits; then, when
sampling, temperature, top-k, top-p (Holtzman et al., arXiv:1904.09751) and min-p (Nguyen et al.,
arXiv:2407.01082). All values are traced, so that changing them recompiles nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.generation.options import GenerationConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """One value a row; meanings as in `GenerationConfig`."""

    temperature: jax.Array  # [batch] float32
    top_k: jax.Array  # [batch] int32, 0 keeps all
    top_p: jax.Array  # [batch] float32
    min_p: jax.Array  # [batch] float32
    repetition_penalty: jax.Array  # [batch] float32
    presence_penalty: jax.Array  # [batch] float32
    frequency_penalty: jax.Array  # [batch] float32

    @classmethod
    def of(cls, config: GenerationConfig, batch: int) -> "SamplingParams":
        """The same values for every row."""
        values: dict[str, Any] = {
            f.name: np.full(batch, getattr(config, f.name), np.float32)
            for f in dataclasses.fields(cls)
            if f.name != "top_k"
        }
        # any k above the vocabulary keeps all
        values["top_k"] = np.full(batch, min(config.top_k, np.iinfo(np.int32).max), np.int32)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """What has to be computed at all; part of the compiled program.

    Attributes:
        do_sample: draw, instead of taking the most likely token.
        needs_filter: some of top-k, top-p, min-p is on.
        needs_penalties: some penalty is on, so tokens have to be counted.
    """

    do_sample: bool
    needs_filter: bool
    needs_penalties: bool

    @classmethod
    def of(cls, config: GenerationConfig) -> "SamplingPlan":
        """What `config` needs."""
        return cls(
            do_sample=config.do_sample,
            needs_filter=config.do_sample and (config.top_k > 0 or config.top_p < 1 or config.min_p > 0),
            needs_penalties=config.repetition_penalty != 1
            or config.presence_penalty != 0
            or config.frequency_penalty != 0,
        )


def apply_penalties(
    logits: jax.Array, prompt_mask: jax.Array, generated_counts: jax.Array, params: SamplingParams
) -> jax.Array:
    """Makes tokens that occurred less likely.

    Args:
        logits: float32 [batch, vocab].
        prompt_mask: bool [batch, vocab], tokens that occur in the prompt.
        generated_counts: int32 [batch, vocab], how often each was generated.
        params: repetition penalty acts on prompt and generated tokens, the others on generated ones.
    """
    penalty = params.repetition_penalty[:, None]
    repeated = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(prompt_mask | (generated_counts > 0), repeated, logits)
    logits = logits - params.presence_penalty[:, None] * (generated_counts > 0)
    return logits - params.frequency_penalty[:, None] * generated_counts


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
    plan: SamplingPlan,
    keys: jax.Array,
    prompt_mask: jax.Array | None,
    generated_counts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The next token of every row.

    Args:
        logits: float32 [batch, vocab].
        params: one value a row.
        plan: what to compute.
        keys: [batch] PRNG keys.
        prompt_mask, generated_counts: as in `apply_penalties`; None when the plan needs none.

    Returns:
        (tokens int32 [batch], their log-probabilities float32 [batch] under softmax(logits), that is
        before penalties and filters).
    """
    shaped = logits
    if plan.needs_penalties:
        assert prompt_mask is not None
        assert generated_counts is not None
        shaped = apply_penalties(shaped, prompt_mask, generated_counts, params)
    if plan.do_sample:
        shaped = filter_logits(shaped, params) if plan.needs_filter else scale_logits(shaped, params)
        tokens = sample(shaped, keys)
    else:
        tokens = jnp.argmax(shaped, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)

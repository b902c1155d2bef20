"""Edits that experiments often make; any function of a point's value and its tokens is one.

An edit is called while the model is traced, as `edit(value, tokens)` with jax arrays [batch, seq, ...] and
`model.taps.Tokens`, or as `edit(value)` where it takes one argument, and gives the value that takes its
place. Of a prompt it sees a chunk at a time and while decoding one token of each row: `tokens.positions`
says which.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.taps import Edit, Routing, Tokens

Positions = int | Sequence[int] | None


def as_edit(name: str, function: Any) -> Edit:
    """A function of one or two arguments as an edit.

    Raises:
        InputError: no such function.
    """
    if not callable(function):
        raise InputError(f"the edit of {name} is {function!r}; expected a function of the point's value.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return lambda value, tokens: function(value)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    if len(needed) == 2:
        return function
    if len(needed) == 1:
        return lambda value, tokens: function(value)
    raise InputError(
        f"the edit of {name} takes {len(needed)} arguments; expected one, the point's value, or two, "
        f"the value "
        "and its tokens."
    )


def _at(tokens: Tokens, positions: Positions, value: jax.Array) -> jax.Array:
    """Which tokens are meant, with dimensions of one behind them, as the value has."""
    if positions is None:
        chosen = tokens.valid
    else:
        wanted = np.atleast_1d(np.asarray(positions, np.int32))
        chosen = (tokens.positions[..., None] == wanted).any(axis=-1) & tokens.valid
    return chosen.reshape(*chosen.shape, *[1] * (value.ndim - 2))


def add(vector: Any, positions: Positions = None) -> Edit:
    """Adds a vector to the value of each token, or of those at some positions: steering."""

    def edit(value: jax.Array, tokens: Tokens) -> jax.Array:
        return jnp.where(_at(tokens, positions, value), value + jnp.asarray(vector, value.dtype), value)

    return edit


def scale(factor: float, positions: Positions = None) -> Edit:
    """Multiplies the value; `scale(8)` of a shared expert counts it as often as 8 ranks that each add it."""

    def edit(value: jax.Array, tokens: Tokens) -> jax.Array:
        return jnp.where(_at(tokens, positions, value), value * factor, value)

    return edit


def patch(captured: Any, positions: Positions = None) -> Edit:
    """Takes the values that another run captured, at some of their positions or all.

    Args:
        captured: [batch, position, ...], or [position, ...] for every row; an `experiments.LabelledArray` or
            any array. Positions beyond it stay.
        positions: None for all that it has.
    """
    given = np.asarray(captured)
    if not np.issubdtype(given.dtype, np.floating) or given.ndim < 2:
        raise InputError(
            f"patch was given {given.dtype} of shape {list(given.shape)}; expected captured numbers, [batch, "
            "position, ...] or [position, ...]."
        )

    def edit(value: jax.Array, tokens: Tokens) -> jax.Array:
        stored = jnp.asarray(np.nan_to_num(given))
        if stored.ndim == value.ndim - 1:
            stored = stored[None]
        place = jnp.clip(tokens.positions, 0, stored.shape[1] - 1)
        rows = jnp.broadcast_to(stored, (value.shape[0], *stored.shape[1:]))
        taken = jnp.take_along_axis(rows, place.reshape(*place.shape, *[1] * (value.ndim - 2)), axis=1)
        here = _at(tokens, positions, value)
        inside = (tokens.positions < stored.shape[1]).reshape(here.shape)
        return jnp.where(here & inside, taken.astype(value.dtype), value)

    return edit


def ablate_experts(experts: int | Sequence[int]) -> Edit:
    """Of the point `router_logits`: nobody chooses these experts, and the next best take their places."""
    gone = np.atleast_1d(np.asarray(experts, np.int32))

    def edit(value: jax.Array, tokens: Tokens) -> jax.Array:
        return value.at[..., gone].set(-jnp.inf)

    return edit


def force_experts(experts: Sequence[int]) -> Callable[[Routing, Tokens], Routing]:
    """Of the point `router`: every token goes to these experts, as many as it chooses, with equal weights."""
    forced = np.asarray(experts, np.int32)

    def edit(value: Routing, tokens: Tokens) -> Routing:
        ids = jnp.broadcast_to(jnp.asarray(forced), value.ids.shape)
        return Routing(ids=ids, weights=jnp.full(value.weights.shape, 1 / len(forced), value.weights.dtype))

    return edit

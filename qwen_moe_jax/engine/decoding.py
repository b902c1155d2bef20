"""Decoding on the device: a loop of forward passes, each giving every row one token, or some with drafts.

A row whose drafts are worth it is *verified*: one pass over its token and the drafts behind it gives the
logits of each. Its tokens are chosen from these one after the other, exactly as without drafts, until a draft
is not what was chosen. So drafts decide how many tokens a pass gives and never which ones: also where tokens
are drawn, since a row's random numbers depend on its seed and step only. Drafts are drawn with the same
numbers (Daliri, Musco & Suresh, arXiv:2408.07978). So the distribution is that of sampling, as with the
rejection sampling of Leviathan et al. (arXiv:2211.17192), and beyond that every single sample is the one
without drafts. What rejected drafts would leave behind is never written, or lies behind the row's length,
where nothing reads it.

What is known of rows is computed on the data rank that they lie on, inside of `Forward.by_row`: only tokens
and log-probabilities are exchanged, all at once at the end. The functions given to it see one rank's arrays.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.engine.drafting import draft_cost
from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.row_updates import (
    Given,
    Said,
    border_places,
    count_drafts,
    drafting,
    drawn,
    enter,
    fed,
    last_pair,
    leave,
    redrafted,
    running,
    take,
    take_next,
)
from qwen_moe_jax.engine.rows import BLOCK_STEPS, Block, Entries, Layers, Roster, RowStates, States
from qwen_moe_jax.formats.cache import HybridCache, Placement, states_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a forward pass changes."""

    step: jax.Array
    layers: Layers
    snapshots: States
    rows: RowStates
    seen: jax.Array | None
    said: Said


def decode(
    model: Forward,
    params,
    *,
    layers: Layers,
    snapshots: States,
    states: RowStates,
    seen: jax.Array | None,
    roster: Roster,
    entries: Entries,
    tables,
    capacity,
    steps,
    only: str | None = None,
) -> tuple[Layers, States, RowStates, jax.Array | None, Block]:
    """See `Steps.decode`; `only` "decode" or "verify" leaves out the passes of the other kind."""
    start, table, room = model.by_row(enter, states, roster, entries, tables, capacity)
    given = Given(roster, table, room, start.emitted)
    most = BLOCK_STEPS * (model.draft_tokens + 1)
    count = roster.slots.shape[0]
    said = Said(jnp.zeros((count, most, 2), jnp.int32), *(jnp.zeros(count, jnp.int32) for _ in range(2)))
    carry = _Carry(jnp.int32(0), layers, snapshots, start, seen, model.by_row(lambda x: x, said))

    def goes_on(carry: _Carry) -> jax.Array:
        return (carry.step < steps) & running(carry.rows, given).any()

    one_token = partial(_one_token, model, params, given)
    verified = partial(_verified, model, params, given)
    if only == "verify":
        carry = lax.while_loop(goes_on, verified, carry)
    elif only == "decode" or not model.draft_tokens:
        carry = lax.while_loop(goes_on, one_token, carry)
    else:

        def drafts(carry: _Carry) -> jax.Array:
            return drafting(carry.rows, given).any()

        def either(carry: _Carry) -> _Carry:
            carry = lax.while_loop(lambda c: goes_on(c) & drafts(c), verified, carry)
            return lax.while_loop(lambda c: goes_on(c) & ~drafts(c), one_token, carry)

        carry = lax.while_loop(goes_on, either, carry)

    def together(said: Said, rows: RowStates, before: jax.Array) -> jax.Array:
        numbers = jnp.stack([rows.emitted - before, said.drafted, said.accepted], axis=1)
        return jnp.concatenate([said.found.reshape(len(before), -1), numbers], axis=1)

    whole = model.everywhere(model.by_row(together, carry.said, carry.rows, start.emitted))
    found = whole[:, :-3].reshape(-1, most, 2)
    block = Block(
        tokens=found[..., 0],
        logprobs=lax.bitcast_convert_type(found[..., 1], jnp.float32),
        count=whole[:, -3],
        drafted=whole[:, -2],
        accepted=whole[:, -1],
    )
    after = model.by_row(leave, states, carry.rows, roster)
    return carry.layers, carry.snapshots, after, carry.seen, block


# One pass.


def _one_token(model: Forward, params, given: Given, carry: _Carry) -> _Carry:
    """A token of every row, without drafts."""
    rows, roster = carry.rows, given.roster
    own = len(carry.layers) - (model.drafter is not None)
    placed = Placement(tables=given.table, slots=roster.slots, length=rows.length)
    # a finished row feeds a pad: its caches stand still
    tokens, valid = rows.token[:, None], running(rows, given)[:, None]
    hidden, cache = model.hidden(params, tokens, valid, HybridCache(carry.layers[:own], placed))
    logits = model.logits(params, hidden)
    with jax.named_scope("sampling"):
        after, seen, said, chosen = model.by_row(take, logits, rows, given, carry.seen, carry.said)
    layers = cache.layers
    if model.drafter is not None:
        drafter = HybridCache(carry.layers[own:], placed)
        layers += model.remember(params, hidden, chosen, valid, drafter).layers
    snapshots = _keep_at_borders(model, carry.snapshots, layers, rows, after, roster)
    return _Carry(carry.step + 1, layers, snapshots, after, seen, said)


def _verified(model: Forward, params, given: Given, carry: _Carry) -> _Carry:
    """The drafts of every row that has some, and new ones."""
    rows, roster = carry.rows, given.roster
    placed = Placement(tables=given.table, slots=roster.slots, length=rows.length)
    if model.exact:
        hidden, layers, after, seen, said, chosen = _one_by_one(model, params, given, carry)
        counts = after.length - rows.length
    else:
        tokens, valid = model.by_row(fed, rows, given)
        hidden, looked = model.look(params, tokens, valid, HybridCache(carry.layers[:-1], placed))
        logits = model.logits(params, hidden)
        with jax.named_scope("sampling"):
            after, seen, said, chosen = model.by_row(take, logits, rows, given, carry.seen, carry.said)
        counts = after.length - rows.length
        layers = model.accept(params, looked, counts, roster.slots, carry.layers[:-1])
    snapshots = _keep_at_borders(model, carry.snapshots, layers, rows, after, roster)
    # Of all but the last pair that stays only the keys are wanted: what they predict is known.
    before, last, hidden_last, token = model.by_row(last_pair, hidden, chosen, counts)
    drafter = HybridCache(carry.layers[-1:], placed)
    drafter = model.remember(params, hidden, chosen, before, drafter)

    def one_draft(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, token, drafts, drafter = carry
        hidden, drafter = model.draft(params, hidden, token, last, drafter)
        logits = model.logits(params, hidden)
        with jax.named_scope("sampling"):
            drafts, token = model.by_row(drawn, number, logits, drafts, after, roster, seen)
        return hidden, token, drafts, drafter

    blank = model.by_row(lambda rows: jnp.zeros_like(rows.drafts.tokens), after)
    begin = hidden_last, token, blank, drafter
    _, _, drafts, drafter = lax.fori_loop(0, model.draft_tokens, one_draft, begin)
    cost = draft_cost(model.kernels)
    after = model.by_row(partial(redrafted, cost=cost), rows, after, given, drafts)
    return _Carry(carry.step + 1, layers + drafter.layers, snapshots, after, seen, said)


def _one_by_one(model: Forward, params, given: Given, carry: _Carry) -> tuple[Any, ...]:
    """Verifies drafts by as many passes over one token as hold, since a sum over one token of several may
    differ in its last bits.

    Returns:
        (hidden states [rows, k + 1, hidden], pools, rows, seen, said, tokens [rows, k + 1] int32).
    """
    begin, most = carry.rows, model.draft_tokens + 1

    def one_more(place: jax.Array, before: tuple[Any, ...]) -> tuple[Any, ...]:
        every_hidden, layers, rows, seen, said, every_token, alive = before
        placed = Placement(tables=given.table, slots=given.roster.slots, length=rows.length)
        tokens, valid = rows.token[:, None], alive[:, None]
        hidden, cache = model.hidden(params, tokens, valid, HybridCache(layers, placed))
        logits = model.logits(params, hidden)
        with jax.named_scope("sampling"):
            rows, seen, said, chosen, alive = model.by_row(
                take_next, place, logits, begin, rows, given, seen, said, alive
            )
        every_hidden, every_token = model.by_row(_put, place, (every_hidden, every_token), (hidden, chosen))
        return every_hidden, cache.layers, rows, seen, said, every_token, alive

    def blank(rows: RowStates) -> tuple[jax.Array, jax.Array]:
        width, compute = model.decoder.config.hidden_size, model.decoder.dtypes.compute
        count = len(rows.token)
        return jnp.zeros((count, most, width), compute), jnp.zeros((count, most), jnp.int32)

    every_hidden, every_token = model.by_row(blank, begin)
    alive = model.by_row(running, begin, given)
    start = every_hidden, carry.layers[:-1], begin, carry.seen, carry.said, every_token, alive
    *found, _ = lax.fori_loop(0, most, one_more, start)
    every_hidden, layers, rows, seen, said, every_token = found
    said = model.by_row(count_drafts, begin, rows, given, said)
    return every_hidden, layers, rows, seen, said, every_token


def _put(place: jax.Array, every: Any, one: Any) -> Any:
    """Arrays [rows, tokens, ...] with those [rows, 1, ...] at a token's place."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, place, axis=1), every, one)


def _keep_at_borders(
    model: Forward, snapshots: States, layers: Layers, rows: RowStates, after: RowStates, roster: Roster
) -> States:
    """Keeps the states of rows that have come to the border of a page."""
    if not snapshots:
        return snapshots
    places = model.by_row(border_places, rows, after, roster)
    return model.move_states(snapshots, states_of(layers), places, roster.slots)

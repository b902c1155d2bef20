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

from qwen_moe_jax.engine.drafting import Drafts, after_step, after_token, no_drafts, worth_of
from qwen_moe_jax.engine.forward import Forward
from qwen_moe_jax.engine.plan import BORDERS
from qwen_moe_jax.engine.rows import (
    BLOCK_STEPS,
    NO_PLACE,
    Block,
    Entries,
    Layers,
    Roster,
    RowStates,
    States,
)
from qwen_moe_jax.engine.sampling import choose_tokens, log_probabilities, most_likely
from qwen_moe_jax.formats.cache import PAGE, HybridCache, Placement, states_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Said:
    """What a call has said so far."""

    found: jax.Array  # int32 [rows, most, 2]: token, and its log-probability's bits
    drafted: jax.Array  # int32 [rows]
    accepted: jax.Array  # int32 [rows]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a forward pass changes."""

    step: jax.Array
    layers: Layers
    snapshots: States
    rows: RowStates
    seen: jax.Array | None
    said: _Said


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Given:
    """What stays the same in a call."""

    roster: Roster
    table: jax.Array  # int32 [rows, width]
    capacity: jax.Array  # int32 [rows], tokens that a row has pages for
    before: jax.Array  # int32 [rows], emitted before the call


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
) -> tuple[Layers, States, RowStates, jax.Array | None, Block]:
    """See `Steps.decode`."""
    start, table, room = model.by_row(
        partial(_enter, worth=worth_of(model.kernels)), states, roster, entries, tables, capacity
    )
    given = _Given(roster, table, room, start.emitted)
    most = BLOCK_STEPS * (model.draft_tokens + 1)
    count = roster.slots.shape[0]
    said = _Said(jnp.zeros((count, most, 2), jnp.int32), *(jnp.zeros(count, jnp.int32) for _ in range(2)))
    carry = _Carry(jnp.int32(0), layers, snapshots, start, seen, model.by_row(lambda x: x, said))

    def goes_on(carry: _Carry) -> jax.Array:
        return (carry.step < steps) & _running(carry.rows, given).any()

    one_token = partial(_one_token, model, params, given)
    if not model.draft_tokens:
        carry = lax.while_loop(goes_on, one_token, carry)
    else:
        verified = partial(_verified, model, params, given)

        def drafts(carry: _Carry) -> jax.Array:
            return _drafts(carry.rows, given).any()

        def either(carry: _Carry) -> _Carry:
            carry = lax.while_loop(lambda c: goes_on(c) & drafts(c), verified, carry)
            return lax.while_loop(lambda c: goes_on(c) & ~drafts(c), one_token, carry)

        carry = lax.while_loop(goes_on, either, carry)

    def together(said: _Said, rows: RowStates, before: jax.Array) -> jax.Array:
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
    after = model.by_row(_leave, states, carry.rows, roster)
    return carry.layers, carry.snapshots, after, carry.seen, block


# One pass.


def _one_token(model: Forward, params, given: _Given, carry: _Carry) -> _Carry:
    """A token of every row, without drafts."""
    rows, roster = carry.rows, given.roster
    own = len(carry.layers) - (model.drafter is not None)
    placed = Placement(tables=given.table, slots=roster.slots, length=rows.length)
    # a finished row feeds a pad: its caches stand still
    tokens, running = rows.token[:, None], _running(rows, given)[:, None]
    hidden, cache = model.hidden(params, tokens, running, HybridCache(carry.layers[:own], placed))
    logits = model.logits(params, hidden)
    with jax.named_scope("sampling"):
        after, seen, said, chosen = model.by_row(_take, logits, rows, given, carry.seen, carry.said)
    layers = cache.layers
    if model.drafter is not None:
        drafter = HybridCache(carry.layers[own:], placed)
        layers += model.remember(params, hidden, chosen, running, drafter).layers
    snapshots = _keep_at_borders(model, carry.snapshots, layers, rows, after, roster)
    return _Carry(carry.step + 1, layers, snapshots, after, seen, said)


def _verified(model: Forward, params, given: _Given, carry: _Carry) -> _Carry:
    """The drafts of every row that has some, and new ones."""
    rows, roster = carry.rows, given.roster
    placed = Placement(tables=given.table, slots=roster.slots, length=rows.length)
    tokens, valid = model.by_row(_fed, rows, given)
    hidden, looked = model.look(params, tokens, valid, HybridCache(carry.layers[:-1], placed))
    logits = model.logits(params, hidden)
    with jax.named_scope("sampling"):
        after, seen, said, chosen = model.by_row(_take, logits, rows, given, carry.seen, carry.said)
    counts = after.length - rows.length
    layers = model.accept(params, looked, counts, roster.slots, carry.layers[:-1])
    snapshots = _keep_at_borders(model, carry.snapshots, layers, rows, after, roster)
    # Of all but the last pair that stays only the keys are wanted: what they predict is known.
    before, last, hidden_last, token = model.by_row(_last_pair, hidden, chosen, counts)
    drafter = HybridCache(carry.layers[-1:], placed)
    drafter = model.remember(params, hidden, chosen, before, drafter)

    def one_draft(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, token, drafts, drafter = carry
        hidden, drafter = model.draft(params, hidden, token, last, drafter)
        logits = model.logits(params, hidden)
        with jax.named_scope("sampling"):
            drafts, token = model.by_row(_drawn, number, logits, drafts, after, roster, seen)
        return hidden, token, drafts, drafter

    blank = model.by_row(lambda rows: jnp.zeros_like(rows.drafts.tokens), after)
    begin = hidden_last, token, blank, drafter
    _, _, drafts, drafter = lax.fori_loop(0, model.draft_tokens, one_draft, begin)
    worth = worth_of(model.kernels)
    after = model.by_row(partial(_redrafted, worth=worth), rows, after, given, drafts)
    return _Carry(carry.step + 1, layers + drafter.layers, snapshots, after, seen, said)


def _keep_at_borders(
    model: Forward, snapshots: States, layers: Layers, rows: RowStates, after: RowStates, roster: Roster
) -> States:
    """Keeps the states of rows that have come to the border of a page."""
    if not snapshots:
        return snapshots
    places = model.by_row(_border_places, rows, after, roster)
    return model.move_states(snapshots, states_of(layers), places, roster.slots)


# Of rows, on their own data rank.


def _running(rows: RowStates, given: _Given) -> jax.Array:
    """Rows that have not ended, and have a page for their next token."""
    return ~rows.finished & (rows.length < given.capacity)


def _drafts(rows: RowStates, given: _Given) -> jax.Array:
    """Rows that make drafts, or are about to begin with it."""
    assert rows.drafts is not None
    return _running(rows, given) & (rows.drafts.rest == 0) & (given.roster.draft_limit > 0)


def _used(rows: RowStates, given: _Given) -> jax.Array:
    """How many drafts a row's next pass verifies: so many that none is beyond its limit, and that it ends at
    the border of a page at the latest, where its states may have to be kept."""
    assert rows.drafts is not None
    most = jnp.minimum(rows.drafts.count, given.roster.draft_limit)
    most = jnp.minimum(most, given.roster.limit - rows.emitted - 1)
    most = jnp.minimum(most, PAGE - 1 - rows.length % PAGE)
    return jnp.where(_drafts(rows, given), jnp.maximum(most, 0), 0)


def _fed(rows: RowStates, given: _Given) -> tuple[jax.Array, jax.Array]:
    """Tokens of a pass that verifies, int32 [rows, k + 1], and which of them there are."""
    assert rows.drafts is not None
    tokens = jnp.concatenate([rows.token[:, None], rows.drafts.tokens], axis=1)
    fed = jnp.where(_running(rows, given), 1 + _used(rows, given), 0)
    return tokens, jnp.arange(tokens.shape[1]) < fed[:, None]


def _enter(
    states: RowStates,
    roster: Roster,
    entries: Entries,
    tables: jax.Array,
    capacity: jax.Array,
    *,
    worth: float,
) -> tuple[RowStates, jax.Array, jax.Array]:
    """The rows of a step out of their slots, or as the host says; their tables and capacities."""
    held = roster.slots < states.token.shape[0]

    def of_row(kept: jax.Array, given: jax.Array) -> jax.Array:
        begins = entries.begins.reshape(-1, *[1] * (kept.ndim - 1))
        return jnp.where(begins, given, kept.at[roster.slots].get(mode="clip"))

    drafts = states.drafts
    if drafts is not None:
        fresh = no_drafts(held.shape[0], drafts.tokens.shape[1], worth)
        drafts = jax.tree.map(lambda kept, new: of_row(kept, jnp.asarray(new)), drafts, fresh)
    rows = RowStates(
        token=of_row(states.token, entries.token),
        length=jnp.where(held, of_row(states.length, entries.length), 0),
        emitted=of_row(states.emitted, entries.emitted),
        finished=of_row(states.finished, jnp.zeros_like(held)) | ~held,
        drafts=drafts,
    )
    return rows, tables.at[roster.slots].get(mode="clip"), capacity.at[roster.slots].get(mode="clip")


def _take(
    logits: jax.Array, rows: RowStates, given: _Given, seen: jax.Array | None, said: _Said
) -> tuple[RowStates, jax.Array | None, _Said, jax.Array]:
    """Chooses tokens one after the other, as far as the tokens that were fed are those that were chosen.

    Args:
        logits: float32 [rows, tokens, vocab].

    Returns:
        (rows, seen and what is said after them; the tokens int32 [rows, tokens], of which a row's first ones
        are taken).
    """
    tokens = logits.shape[1]
    alive, chosen = _running(rows, given), []
    used = _used(rows, given) if tokens > 1 else jnp.zeros_like(rows.length)
    begin = rows
    for place in range(tokens):
        rows, seen, said, token = _choose(logits[:, place], rows, given, seen, said, alive)
        chosen.append(token)
        if place + 1 < tokens:
            assert begin.drafts is not None
            held = (place < used) & (token == begin.drafts.tokens[:, place])
            alive = alive & held & ~rows.finished
    emitted = rows.emitted - begin.emitted
    drafts = rows.drafts
    if drafts is not None and tokens == 1:
        rows = dataclasses.replace(rows, drafts=after_token(drafts, emitted))
    said = dataclasses.replace(
        said, drafted=said.drafted + used, accepted=said.accepted + jnp.where(used > 0, emitted - 1, 0)
    )
    return rows, seen, said, jnp.stack(chosen, axis=1)


def _choose(
    logits: jax.Array,
    rows: RowStates,
    given: _Given,
    seen: jax.Array | None,
    said: _Said,
    alive: jax.Array,
) -> tuple[RowStates, jax.Array | None, _Said, jax.Array]:
    """The next token of the rows that are alive; `logits` [rows, vocab]."""
    roster, counted = given.roster, alive.astype(jnp.int32)
    if seen is None:
        chosen = most_likely(logits)
    else:
        own = seen.at[roster.slots].get(mode="clip")
        chosen = choose_tokens(logits, roster.sampling, rows.emitted, own)
        seen = seen.at[roster.slots, chosen].add(counted, mode="drop")
    bits = lax.bitcast_convert_type(log_probabilities(logits, chosen), jnp.int32)
    place = jnp.where(alive, rows.emitted - given.before, said.found.shape[1])
    found = said.found.at[jnp.arange(len(place)), place].set(jnp.stack([chosen, bits], axis=1), mode="drop")
    emitted = rows.emitted + counted
    ends = (chosen[:, None] == roster.end_ids).any(axis=1) | (emitted >= roster.limit)
    rows = dataclasses.replace(
        rows,
        token=jnp.where(alive, chosen, rows.token),
        length=rows.length + counted,
        emitted=emitted,
        finished=rows.finished | (alive & ends),
    )
    return rows, seen, dataclasses.replace(said, found=found), chosen


def _last_pair(
    hidden: jax.Array, tokens: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of the first `counts` hidden states [rows, tokens, hidden] and the tokens behind them [rows, tokens]:
    (which of them stand before the last one, bool [rows, tokens]; whether there is a last one, bool [rows,
    1]; its hidden state [rows, 1, hidden]; its token [rows, 1])."""
    before = jnp.arange(tokens.shape[1]) < counts[:, None] - 1
    place = jnp.maximum(counts - 1, 0)[:, None]
    return (
        before,
        (counts > 0)[:, None],
        jnp.take_along_axis(hidden, place[..., None], axis=1),
        jnp.take_along_axis(tokens, place, axis=1),
    )


def _drawn(
    number: jax.Array,
    logits: jax.Array,
    drafts: jax.Array,
    rows: RowStates,
    roster: Roster,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A draft of every row, chosen as its token will be; `logits` [rows, 1, vocab]."""
    if seen is None:
        token = most_likely(logits[:, 0])
    else:
        own = seen.at[roster.slots].get(mode="clip")
        token = choose_tokens(logits[:, 0], roster.sampling, rows.emitted + number, own)
    return lax.dynamic_update_slice_in_dim(drafts, token[:, None], number, axis=1), token[:, None]


def _redrafted(
    before: RowStates, rows: RowStates, given: _Given, tokens: jax.Array, *, worth: float
) -> RowStates:
    """The rows with their new drafts, where they go on making any."""
    assert before.drafts is not None
    emitted = rows.emitted - before.emitted
    used = _used(before, given)
    verified = _drafts(before, given)
    drafts = after_step(before.drafts, used, emitted, worth)
    rested = after_token(before.drafts, emitted)  # those that rest beside others that are verified
    count = jnp.where(drafts.rest == 0, tokens.shape[1], 0)
    drafts = dataclasses.replace(drafts, tokens=tokens, count=count)
    rested = dataclasses.replace(rested, tokens=tokens, count=jnp.where(rested.rest == 0, tokens.shape[1], 0))
    moved = emitted > 0

    def of_row(kept: jax.Array, drafting: jax.Array, resting: jax.Array) -> jax.Array:
        def wide(mask: jax.Array) -> jax.Array:
            return mask.reshape(-1, *[1] * (kept.ndim - 1))

        return jnp.where(wide(moved), jnp.where(wide(verified), drafting, resting), kept)

    chosen: Drafts = jax.tree.map(of_row, before.drafts, drafts, rested)
    return dataclasses.replace(rows, drafts=chosen)


def _border_places(before: RowStates, rows: RowStates, roster: Roster) -> jax.Array:
    """Where each row's states go: to its place if it has come to the border of a page, else nowhere."""
    passed = (rows.length > before.length) & (rows.length % PAGE == 0)
    turn = rows.length // PAGE % BORDERS
    return jnp.where(passed, jnp.take_along_axis(roster.places, turn[:, None], axis=1)[:, 0], NO_PLACE)


def _leave(states: RowStates, rows: RowStates, roster: Roster) -> RowStates:
    """The rows of a step back into their slots."""
    return jax.tree.map(lambda kept, value: kept.at[roster.slots].set(value, mode="drop"), states, rows)

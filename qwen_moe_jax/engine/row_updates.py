"""What a forward pass changes of the rows of a step, as functions of the arrays of one data rank.

`decoding.py` runs them inside of `Forward.by_row`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qwen_moe_jax.engine.drafting import Drafts, after_step, after_token, no_drafts
from qwen_moe_jax.engine.plan import BORDERS
from qwen_moe_jax.engine.rows import NO_PLACE, Entries, Roster, RowStates
from qwen_moe_jax.engine.sampling import choose_tokens, log_probabilities, most_likely
from qwen_moe_jax.formats.cache import PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Said:
    """What a call has said so far."""

    found: jax.Array  # int32 [rows, most, 2]: token, and its log-probability's bits
    drafted: jax.Array  # int32 [rows]
    accepted: jax.Array  # int32 [rows]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What stays the same in a call."""

    roster: Roster
    table: jax.Array  # int32 [rows, width]
    capacity: jax.Array  # int32 [rows], tokens that a row has pages for
    before: jax.Array  # int32 [rows], emitted before the call


def running(rows: RowStates, given: Given) -> jax.Array:
    """Rows that have not ended, and have a page for their next token."""
    return ~rows.finished & (rows.length < given.capacity)


def drafting(rows: RowStates, given: Given) -> jax.Array:
    """Rows that make drafts, or are about to begin with it."""
    assert rows.drafts is not None
    return running(rows, given) & (rows.drafts.rest == 0) & (given.roster.draft_limit > 0)


def _used(rows: RowStates, given: Given) -> jax.Array:
    """How many drafts a row's next pass verifies: so many that none is beyond its limit, and that it ends at
    the border of a page at the latest, where its states may have to be kept."""
    assert rows.drafts is not None
    most = jnp.minimum(rows.drafts.count, given.roster.draft_limit)
    most = jnp.minimum(most, given.roster.limit - rows.emitted - 1)
    most = jnp.minimum(most, PAGE - 1 - rows.length % PAGE)
    return jnp.where(drafting(rows, given), jnp.maximum(most, 0), 0)


def fed(rows: RowStates, given: Given) -> tuple[jax.Array, jax.Array]:
    """Tokens of a pass that verifies, int32 [rows, k + 1], and which of them there are."""
    assert rows.drafts is not None
    tokens = jnp.concatenate([rows.token[:, None], rows.drafts.tokens], axis=1)
    count = jnp.where(running(rows, given), 1 + _used(rows, given), 0)
    return tokens, jnp.arange(tokens.shape[1]) < count[:, None]


def enter(
    states: RowStates,
    roster: Roster,
    entries: Entries,
    tables: jax.Array,
    capacity: jax.Array,
) -> tuple[RowStates, jax.Array, jax.Array]:
    """The rows of a step out of their slots, or as the host says; their tables and capacities."""
    held = roster.slots < states.token.shape[0]

    def of_row(kept: jax.Array, given: jax.Array) -> jax.Array:
        begins = entries.begins.reshape(-1, *[1] * (kept.ndim - 1))
        return jnp.where(begins, given, kept.at[roster.slots].get(mode="clip"))

    drafts = states.drafts
    if drafts is not None:
        fresh = no_drafts(held.shape[0], drafts.tokens.shape[1])
        drafts = jax.tree.map(lambda kept, new: of_row(kept, jnp.asarray(new)), drafts, fresh)
    rows = RowStates(
        token=of_row(states.token, entries.token),
        length=jnp.where(held, of_row(states.length, entries.length), 0),
        emitted=of_row(states.emitted, entries.emitted),
        finished=of_row(states.finished, jnp.zeros_like(held)) | ~held,
        drafts=drafts,
    )
    return rows, tables.at[roster.slots].get(mode="clip"), capacity.at[roster.slots].get(mode="clip")


def take(
    logits: jax.Array,
    rows: RowStates,
    given: Given,
    seen: jax.Array | None,
    said: Said,
    allowed: jax.Array | None = None,
) -> tuple[RowStates, jax.Array | None, Said, jax.Array]:
    """Chooses tokens one after the other, as far as the tokens that were fed are those that were chosen.

    Args:
        logits: float32 [rows, tokens, vocab].
        rows, given, seen, said: before.
        allowed: uint32 [rows, tokens, words], which tokens may be chosen behind each; None for all.

    Returns:
        (rows, seen and what is said after them; the tokens int32 [rows, tokens], of which a row's first ones
        are taken).
    """
    tokens = logits.shape[1]
    alive, chosen, begin = running(rows, given), [], rows
    for place in range(tokens):
        one = logits[:, place : place + 1]
        mask = None if allowed is None else allowed[:, place]
        if tokens == 1:
            rows, seen, said, token = _choose(one[:, 0], rows, given, seen, said, alive, mask)
            token = token[:, None]
        else:
            rows, seen, said, token, alive = take_next(
                jnp.int32(place), one, begin, rows, given, seen, said, alive, mask
            )
        chosen.append(token)
    if tokens > 1:
        said = count_drafts(begin, rows, given, said)
    elif rows.drafts is not None:
        rows = dataclasses.replace(rows, drafts=after_token(rows.drafts, rows.emitted - begin.emitted))
    return rows, seen, said, jnp.concatenate(chosen, axis=1)


def take_next(
    place: jax.Array,
    logits: jax.Array,
    begin: RowStates,
    rows: RowStates,
    given: Given,
    seen: jax.Array | None,
    said: Said,
    alive: jax.Array,
    allowed: jax.Array | None = None,
) -> tuple[RowStates, jax.Array | None, Said, jax.Array, jax.Array]:
    """Chooses the token behind one of a pass that verifies.

    Args:
        place: of the token in the pass.
        logits: float32 [rows, 1, vocab], behind it.
        begin: the rows before the pass.
        rows, seen, said: after the tokens before it.
        alive: bool [rows], whose tokens were all as drafted so far.
        allowed: uint32 [rows, words], which tokens may be chosen; None for all.

    Returns:
        (rows, seen and what is said after it; the token int32 [rows, 1]; which rows are still alive).
    """
    assert begin.drafts is not None
    rows, seen, said, token = _choose(logits[:, 0], rows, given, seen, said, alive, allowed)
    drafts = begin.drafts.tokens
    draft = jnp.take(drafts, jnp.minimum(place, drafts.shape[1] - 1), axis=1)
    alive = alive & (place < _used(begin, given)) & (token == draft) & ~rows.finished
    return rows, seen, said, token[:, None], alive


def count_drafts(begin: RowStates, rows: RowStates, given: Given, said: Said) -> Said:
    """What is said, with the drafts that a pass from `begin` to `rows` has verified."""
    used, emitted = _used(begin, given), rows.emitted - begin.emitted
    accepted = said.accepted + jnp.where(used > 0, emitted - 1, 0)
    return dataclasses.replace(said, drafted=said.drafted + used, accepted=accepted)


def _choose(
    logits: jax.Array,
    rows: RowStates,
    given: Given,
    seen: jax.Array | None,
    said: Said,
    alive: jax.Array,
    allowed: jax.Array | None,
) -> tuple[RowStates, jax.Array | None, Said, jax.Array]:
    """The next token of the rows that are alive; `logits` [rows, vocab]."""
    roster, counted = given.roster, alive.astype(jnp.int32)
    if seen is None:
        chosen = most_likely(logits)
    else:
        own = seen.at[roster.slots].get(mode="clip")
        chosen = choose_tokens(logits, roster.sampling, rows.emitted, own, allowed)
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


def last_pair(
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


def drawn(
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


def redrafted(
    before: RowStates, rows: RowStates, given: Given, tokens: jax.Array, *, cost: float
) -> RowStates:
    """The rows with their new drafts, where they go on making any."""
    assert before.drafts is not None
    emitted = rows.emitted - before.emitted
    used = _used(before, given)
    verified = drafting(before, given)
    drafts = after_step(before.drafts, used, emitted, cost)
    rested = after_token(before.drafts, emitted)  # those that rest beside others that are verified
    count = jnp.where(drafts.rest == 0, tokens.shape[1], 0)
    drafts = dataclasses.replace(drafts, tokens=tokens, count=count)
    rested = dataclasses.replace(rested, tokens=tokens, count=jnp.where(rested.rest == 0, tokens.shape[1], 0))
    moved = emitted > 0

    def of_row(kept: jax.Array, verifying: jax.Array, resting: jax.Array) -> jax.Array:
        def wide(mask: jax.Array) -> jax.Array:
            return mask.reshape(-1, *[1] * (kept.ndim - 1))

        return jnp.where(wide(moved), jnp.where(wide(verified), verifying, resting), kept)

    chosen: Drafts = jax.tree.map(of_row, before.drafts, drafts, rested)
    return dataclasses.replace(rows, drafts=chosen)


def border_places(before: RowStates, rows: RowStates, roster: Roster) -> jax.Array:
    """Where each row's states go: to its place if it has come to the border of a page, else nowhere."""
    passed = (rows.length > before.length) & (rows.length % PAGE == 0)
    turn = rows.length // PAGE % BORDERS
    return jnp.where(passed, jnp.take_along_axis(roster.places, turn[:, None], axis=1)[:, 0], NO_PLACE)


def leave(states: RowStates, rows: RowStates, roster: Roster) -> RowStates:
    """The rows of a step back into their slots."""
    return jax.tree.map(lambda kept, value: kept.at[roster.slots].set(value, mode="drop"), states, rows)

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
from qwen_moe_jax.engine.rows import (
    BLOCK_STEPS,
    LIKELIEST,
    Block,
    Layers,
    Roster,
    RowStates,
    States,
    StepRows,
)
from qwen_moe_jax.engine.sampling import likeliest
from qwen_moe_jax.formats.cache import HybridCache, KVCache, LookedAt, Placement, states_of


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
    told: StepRows,
    steps,
    only: str | None = None,
) -> tuple[Layers, States, RowStates, jax.Array | None, Block]:
    """See `Steps.decode`; `only` "decode" or "verify" leaves out the passes of the other kind."""
    start, given = _entered(model, states, told)
    most = BLOCK_STEPS * (model.draft_tokens + 1)
    said = model.by_row(partial(_nothing_said, most=most), told.roster.slots)
    carry = _Carry(jnp.int32(0), layers, snapshots, start, seen, said)

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

    block = _block(model, carry, given, most)
    after = model.by_row(leave, states, carry.rows, told.roster)
    return carry.layers, carry.snapshots, after, carry.seen, block


def _entered(model: Forward, states: RowStates, told: StepRows) -> tuple[RowStates, Given]:
    """The rows of a step, and what stays the same in it."""
    rows, table, room = model.by_row(enter, states, told.roster, told.entries, told.tables, told.capacity)
    return rows, Given(told.roster, table, room, rows.emitted)


def forward_pass(
    model: Forward, params, *, layers: Layers, states: RowStates, told: StepRows
) -> tuple[Layers, "Pass"]:
    """See `Steps.forward_pass`."""
    rows, given = _entered(model, states, told)
    return _pass(model, params, given, rows, layers, verify=_guided_verify(model))


def choose(
    model: Forward,
    params,
    *,
    layers: Layers,
    snapshots: States,
    states: RowStates,
    seen: jax.Array,
    passed: "Pass",
    allowed,
    likeliest_asked,
) -> tuple[Layers, States, RowStates, jax.Array, Block]:
    """See `Steps.choose`."""
    given = passed.given
    most = passed.logits.shape[1]
    said = model.by_row(partial(_nothing_said, most=most), given.roster.slots)
    carry = _Carry(jnp.int32(0), layers, snapshots, passed.rows, seen, said)
    carry = _chosen(model, params, passed, carry, allowed)
    block = _block(model, carry, given, most)
    count = min(LIKELIEST, passed.logits.shape[2])

    def found() -> tuple[jax.Array, jax.Array]:
        return model.by_row(partial(_likeliest, count=count), passed.logits)

    def nothing() -> tuple[jax.Array, jax.Array]:
        return model.by_row(partial(_no_likeliest, count=count), passed.logits)

    tokens, logprobs = lax.cond(likeliest_asked, found, nothing)
    block = dataclasses.replace(
        block, likeliest=model.everywhere(tokens), likeliest_logprobs=model.everywhere(logprobs)
    )
    after = model.by_row(leave, states, carry.rows, given.roster)
    assert carry.seen is not None
    return carry.layers, carry.snapshots, after, carry.seen, block


def _guided_verify(model: Forward) -> bool:
    """Whether guided steps verify drafts: with `exact` that would take a choice between each two tokens."""
    return bool(model.draft_tokens) and not model.exact


def _likeliest(logits: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    tokens, logprobs = likeliest(logits.reshape(-1, logits.shape[-1]), count)
    shape = (*logits.shape[:2], count)
    return tokens.reshape(shape), logprobs.reshape(shape)


def _no_likeliest(logits: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    shape = (*logits.shape[:2], count)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def _nothing_said(slots: jax.Array, *, most: int) -> Said:
    count = slots.shape[0]
    return Said(jnp.zeros((count, most, 2), jnp.int32), *(jnp.zeros(count, jnp.int32) for _ in range(2)))


def _block(model: Forward, carry: _Carry, given: Given, most: int) -> Block:
    """What was emitted, on every device."""

    def together(said: Said, rows: RowStates, before: jax.Array) -> jax.Array:
        numbers = jnp.stack([rows.emitted - before, said.drafted, said.accepted], axis=1)
        drafts = [] if rows.drafts is None else [rows.drafts.tokens]
        return jnp.concatenate([said.found.reshape(len(before), -1), *drafts, numbers], axis=1)

    whole = model.everywhere(model.by_row(together, carry.said, carry.rows, given.before))
    found = whole[:, : 2 * most].reshape(-1, most, 2)
    return Block(
        tokens=found[..., 0],
        logprobs=lax.bitcast_convert_type(found[..., 1], jnp.float32),
        drafts=whole[:, 2 * most : -3] if model.draft_tokens else None,
        count=whole[:, -3],
        drafted=whole[:, -2],
        accepted=whole[:, -1],
    )


# One pass, in two halves.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass over the next tokens of rows says, before anything is chosen."""

    rows: RowStates  # before it
    given: Given
    hidden: jax.Array  # [rows, tokens, hidden]
    logits: jax.Array  # float32 [rows, tokens, vocab]
    # of a pass that verifies: what each recurrent layer has looked at, None for attention
    looked: tuple[LookedAt | None, ...] | None


def _pass(
    model: Forward, params, given: Given, rows: RowStates, layers: Layers, *, verify: bool
) -> tuple[Layers, Pass]:
    """The first half: logits behind the token of every row, and its drafts where they are verified.

    Returns:
        (pools: the keys of all these tokens are written; the recurrent states after the token, but not yet
        where drafts are verified; the pass).
    """
    own = len(layers) - (model.drafter is not None)
    cache = HybridCache(layers[:own], _placed(given, rows))
    if verify:
        tokens, valid = model.by_row(fed, rows, given)
        hidden, all_looked = model.look(params, tokens, valid, cache)
        pairs = list(zip(all_looked, layers[:own], strict=True))
        looked = tuple(None if isinstance(one, KVCache) else one for one, _ in pairs)
        after = tuple(one if isinstance(one, KVCache) else before for one, before in pairs)
    else:
        # a finished row feeds a pad: its caches stand still
        tokens, valid = rows.token[:, None], running(rows, given)[:, None]
        hidden, cache = model.hidden(params, tokens, valid, cache)
        looked, after = None, cache.layers
    logits = model.logits(params, hidden)
    return after + layers[own:], Pass(rows, given, hidden, logits, looked)


def _chosen(model: Forward, params, passed: Pass, carry: _Carry, allowed: jax.Array | None = None) -> _Carry:
    """The second half: tokens, and what they change."""
    rows, given, layers = passed.rows, passed.given, carry.layers
    with jax.named_scope("sampling"):
        after, seen, said, chosen = model.by_row(
            take, passed.logits, rows, given, carry.seen, carry.said, allowed
        )
    if passed.looked is None:
        if model.drafter is not None:
            drafter = HybridCache(layers[-1:], _placed(given, rows))
            valid = model.by_row(running, rows, given)[:, None]
            drafter = model.remember(params, passed.hidden, chosen, valid, drafter)
            layers = layers[:-1] + drafter.layers
        snapshots = _keep_at_borders(model, carry.snapshots, layers, rows, after, given.roster)
        return _Carry(carry.step + 1, layers, snapshots, after, seen, said)
    counts = after.length - rows.length
    pairs = zip(passed.looked, layers[:-1], strict=True)
    looked: Any = tuple(before if one is None else one for one, before in pairs)
    written = model.accept(params, looked, counts, given.roster.slots, layers[:-1])
    carry = _Carry(carry.step, written + layers[-1:], carry.snapshots, rows, seen, said)
    return _drafted(model, params, given, carry, after, passed.hidden, chosen)


def _placed(given: Given, rows: RowStates) -> Placement:
    return Placement(tables=given.table, slots=given.roster.slots, length=rows.length)


def _one_token(model: Forward, params, given: Given, carry: _Carry) -> _Carry:
    """A token of every row, without drafts."""
    layers, passed = _pass(model, params, given, carry.rows, carry.layers, verify=False)
    return _chosen(model, params, passed, dataclasses.replace(carry, layers=layers))


def _verified(model: Forward, params, given: Given, carry: _Carry) -> _Carry:
    """The drafts of every row that has some, and new ones."""
    if not model.exact:
        layers, passed = _pass(model, params, given, carry.rows, carry.layers, verify=True)
        return _chosen(model, params, passed, dataclasses.replace(carry, layers=layers))
    hidden, layers, after, seen, said, chosen = _one_by_one(model, params, given, carry)
    carry = dataclasses.replace(carry, layers=layers + carry.layers[-1:], seen=seen, said=said)
    return _drafted(model, params, given, carry, after, hidden, chosen)


def _drafted(
    model: Forward,
    params,
    given: Given,
    carry: _Carry,
    after: RowStates,
    hidden: jax.Array,
    chosen: jax.Array,
) -> _Carry:
    """New drafts behind a pass that has verified some.

    Args:
        carry: with the rows before the pass, and all else after it.
        after: the rows after it.
        hidden: [rows, tokens, hidden], of the pass.
        chosen: int32 [rows, tokens].
    """
    rows, roster, layers = carry.rows, given.roster, carry.layers
    counts = after.length - rows.length
    snapshots = _keep_at_borders(model, carry.snapshots, layers[:-1], rows, after, roster)
    # Of all but the last pair that stays only the keys are wanted: what they predict is known.
    before, last, hidden_last, token = model.by_row(last_pair, hidden, chosen, counts)
    drafter = HybridCache(layers[-1:], _placed(given, rows))
    drafter = model.remember(params, hidden, chosen, before, drafter)

    def one_draft(number: jax.Array, carried: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, token, drafts, drafter = carried
        hidden, drafter = model.draft(params, hidden, token, last, drafter)
        logits = model.logits(params, hidden)
        with jax.named_scope("sampling"):
            drafts, token = model.by_row(drawn, number, logits, drafts, after, roster, carry.seen)
        return hidden, token, drafts, drafter

    blank = model.by_row(lambda rows: jnp.zeros_like(rows.drafts.tokens), after)
    begin = hidden_last, token, blank, drafter
    _, _, drafts, drafter = lax.fori_loop(0, model.draft_tokens, one_draft, begin)
    cost = draft_cost(model.kernels)
    after = model.by_row(partial(redrafted, cost=cost), rows, after, given, drafts)
    return _Carry(carry.step + 1, layers[:-1] + drafter.layers, snapshots, after, carry.seen, carry.said)


def _one_by_one(model: Forward, params, given: Given, carry: _Carry) -> tuple[Any, ...]:
    """Verifies drafts by as many passes over one token as hold, since a sum over one token of several may
    differ in its last bits.

    Returns:
        (hidden states [rows, k + 1, hidden], pools, rows, seen, said, tokens [rows, k + 1] int32).
    """
    begin, most = carry.rows, model.draft_tokens + 1

    def one_more(place: jax.Array, before: tuple[Any, ...]) -> tuple[Any, ...]:
        every_hidden, layers, rows, seen, said, every_token, alive = before
        tokens, valid = rows.token[:, None], alive[:, None]
        hidden, cache = model.hidden(params, tokens, valid, HybridCache(layers, _placed(given, rows)))
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

"""The least work of a step that verifies drafts and makes new ones, and what it gives by how often they hold.

Such a step (`engine/decoding.py`) is one pass of the model over a row's token and its k drafts, with logits
of all of them, and k passes of multi-token prediction over one token each, with logits too. That recurrent
states are read twice there, and written once, is not least work and not counted.
"""

import dataclasses

from qwen_moe_jax.aot.minimum import Collective, Roofline, Work, collective_bytes, least_work, roofline
from qwen_moe_jax.devices import Device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout

DRAFTER = "drafter"
# Of the table in a plan.
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftEstimate:
    """A step that verifies so many drafts of every row, at best.

    Attributes:
        drafts: of a row and step.
        roofline: of the step; its tokens are those where all drafts hold.
        tokens_per_second: probability that a draft holds -> new tokens of the whole mesh, at most.
    """

    drafts: int
    roofline: Roofline
    tokens_per_second: dict[float, float]


def draft_estimates(
    layout: Layout, policy: DtypePolicy, device: Device, *, batch: int, context: int, most: int
) -> tuple[DraftEstimate, ...]:
    """What 1 to `most` drafts a step give; the rest as of `verify_work`."""
    found = []
    for drafts in range(1, most + 1):
        work = verify_work(layout, policy, batch=batch, drafts=drafts, context=context)
        exchanged = verify_collectives(layout, policy, batch=batch, drafts=drafts)
        bound = roofline(work, device, collectives=exchanged)
        rates = {a: batch * expected_tokens(a, drafts) / bound.seconds for a in ACCEPTANCES}
        found.append(DraftEstimate(drafts=drafts, roofline=bound, tokens_per_second=rates))
    return tuple(found)


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a row gets from a step on average, where each draft behind one that held holds with this
    probability: 1 + a + a^2 + ... + a^k (Leviathan et al., arXiv:2211.17192, equation 1).

    Raises:
        InputError: a probability that is none.
    """
    if not 0 <= acceptance <= 1:
        raise InputError(f"acceptance is {acceptance!r}; expected a probability, 0 to 1.")
    return float(sum(acceptance**i for i in range(drafts + 1)))


def verify_work(layout: Layout, policy: DtypePolicy, *, batch: int, drafts: int, context: int) -> Work:
    """The least work of a step that verifies `drafts` drafts of every row; the rest as of `least_work`.

    The drafter's is one part, "drafter". Tokens are those of a step whose drafts all hold.
    """
    target = least_work(layout, policy, batch=batch, tokens=drafts + 1, context=context)
    one = least_work(_drafter(layout), policy, batch=batch, tokens=1, context=context + drafts)
    rows, hidden = layout.local_rows(batch), layout.config.hidden_size
    fc = 2 * hidden * hidden  # weights, whole on every rank
    flops = dict(target.flops)
    flops["lm_head"] *= drafts + 1
    flops[DRAFTER] = drafts * (one.total_flops + 2 * rows * fc)
    moved = dict(target.bytes)
    moved[DRAFTER] = drafts * (one.total_bytes + fc * policy.matrix.itemsize)
    return Work(bytes=moved, flops=flops, tokens=target.tokens)


def verify_collectives(
    layout: Layout, policy: DtypePolicy, *, batch: int, drafts: int
) -> tuple[Collective, ...]:
    """The exchanges of such a step; arguments as of `verify_work`."""
    target = collective_bytes(layout, policy, batch=batch, tokens=drafts + 1)
    found = [
        dataclasses.replace(one, bytes=one.bytes * (drafts + 1)) if one.what == "logits" else one
        for one in target
    ]
    # the embedding of what follows all tokens, for the drafter's keys
    found += [dataclasses.replace(one, what=DRAFTER) for one in target if one.what == "embedding"]
    for one in collective_bytes(_drafter(layout), policy, batch=batch, tokens=1):
        found.append(dataclasses.replace(one, what=DRAFTER, count=one.count * drafts))
    return tuple(found)


def _drafter(layout: Layout) -> Layout:
    """The layout of a model whose only layer is the drafter's."""
    return dataclasses.replace(layout, config=layout.config.with_layers((layout.config.mtp_kind,)))

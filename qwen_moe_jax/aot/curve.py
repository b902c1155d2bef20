"""Tokens a second and GPU against tokens a second and user, over batches and layouts, by the time model."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from qwen_moe_jax.aot.assumptions import Assumptions
from qwen_moe_jax.aot.times import DECODING, READING, Serving, TimeModel
from qwen_moe_jax.devices import Device
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import DATA, EXPERT, TENSOR

# Rows of the whole mesh; beyond, a row is slower than anybody reads.
MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The layout that gives the most with a batch.

    Attributes:
        data, expert, tensor: sizes of the mesh.
        attention, expert_dispatch: as of `Layout`.
        serving: without drafts.
        drafting: with them, or None.
    """

    data: int
    expert: int
    tensor: int
    attention: str
    expert_dispatch: str
    serving: Serving
    drafting: Serving | None

    @property
    def best(self) -> Serving:
        """Of both what gives more."""
        return max((one for one in (self.serving, self.drafting) if one), key=lambda one: one.gpu_rate)

    def to_dict(self) -> dict[str, Any]:
        """All of it, and what follows of it, as JSON has it."""
        found = dataclasses.asdict(self)
        for name in ("serving", "drafting"):
            serving: Serving | None = getattr(self, name)
            if serving is not None:
                found[name] |= {key: getattr(serving, key) for key in _RATES}
                found[name]["step"] |= {"seconds": serving.step.seconds, "bound": serving.step.bound}
        return found


_RATES = ("seconds_a_token", "user_rate", "gpu_rate", "total_gpu_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of which none gives less of both than another, fewest rows first; `str()` is a table.

    Attributes:
        context: tokens of each request when it ends.
        prompt, reply: tokens of it that are read, and decoded.
        drafts: a row and step, 0 for none.
        acceptance: probability that a draft behind one that held holds.
        device: that there are `count` of.
        count: devices.
        assumptions: about them.
        points: of the curve.
    """

    context: int
    prompt: int
    reply: int
    drafts: int
    acceptance: float
    device: Device
    count: int
    assumptions: Assumptions
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; of the device its name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        assumptions = dataclasses.asdict(self.assumptions)
        assumptions["links"] = {str(ranks): share for ranks, share in self.assumptions.links.items()}
        points = [point.to_dict() for point in self.points]
        return found | {"device": self.device.name, "assumptions": assumptions, "points": points}

    def __str__(self) -> str:
        if not self.points:
            return "No layout has room for a single such request, so that there is no curve."
        asked = f"decoding rows of {self.context:,} tokens"
        if self.prompt:
            asked = f"prompts of {self.prompt:,} and replies of {self.reply:,} tokens"
        head = f"{'batch':>6} {'data':>4} {'expert':>6} {'tensor':>6}  {'attention':<9}  {'dispatch':<10}"
        head += f"{'prompt':>10}{'step':>10}  {'bound by':<9}{'a user':>8}{'a GPU':>9}"
        if self.drafts:
            head += f"{'drafting':>12}{'a user':>8}{'a GPU':>9}"
        lines = [
            f"Tokens/s a GPU against tokens/s a user, {asked}. A model, not a measurement.",
            head,
            *map(self._line, self.points),
        ]
        if self.drafts:
            lines.append(
                f"Drafting: {self.drafts} drafts a step, each of which holds at {self.acceptance:.0%} behind "
                "one that held."
            )
        return "\n".join([*lines, *self._assumed()])

    def _line(self, point: Point) -> str:
        one = point.serving
        attention = point.attention if point.expert > 1 else "-"
        dispatch = point.expert_dispatch if point.expert > 1 else "-"
        line = f"{one.batch:>6,} {point.data:>4} {point.expert:>6} {point.tensor:>6}  {attention:<9}  "
        line += f"{dispatch:<10}{_ms(one.prompt_seconds):>10}{_ms(one.step.seconds):>10}  "
        line += f"{one.step.bound:<9}{one.user_rate:>8,.1f}{one.gpu_rate:>9,.0f}"
        if point.drafting is not None:
            with_drafts = point.drafting
            line += f"{_ms(with_drafts.step.seconds):>12}{with_drafts.user_rate:>8,.1f}"
            line += f"{with_drafts.gpu_rate:>9,.0f}"
        return line

    def _assumed(self) -> list[str]:
        given = self.assumptions
        shares = ", ".join(f"{share:.0%} among {ranks}" for ranks, share in sorted(given.links.items()))
        latency = sorted({f"{1e6 * seconds:.3g}" for seconds in given.latency.values()})
        return [
            f"Assumed (sources: aot/assumptions.py): memory at {given.memory:.0%} and bfloat16 products "
            f"at {given.flops.get('bfloat16', 1):.0%} of the data sheet; for each kernel "
            f"{1e6 * given.launch:.3g} us of the host and {1e6 * given.gap:.3g} us of the device; "
            f"{' or '.join(latency)} us a collective, links at {shares}.",
            "Prompts are read in turn with decoding, all requests are alike, and rates count tokens of "
            "replies.",
        ]


def rate_curve(
    layouts: Iterable[tuple[Layout, int]],
    policy: DtypePolicy,
    device: Device,
    assumptions: Assumptions,
    *,
    context: int,
    prompt: int = 0,
    drafts: int = 0,
    acceptance: float = 0.8,
) -> Curve:
    """The best layout of each batch, 1, 2, 4, ... rows, as far as one has room for it.

    Args:
        layouts: of a model on as many devices each, with the rows of the whole mesh that each has room for.
        policy: dtypes.
        device: that there are as many of as a layout has.
        assumptions: about them.
        context: tokens of each request when it ends.
        prompt: of these, that are read before the rest is decoded; 0 means one more token of a full row.
        drafts: a row and step; 0 for none.
        acceptance: probability that a draft behind one that held holds.

    Raises:
        InputError: a size or probability that is none.
    """
    layouts = list(layouts)
    room = [rows for _, rows in layouts]
    reply = context - prompt if prompt else 1
    found: list[Point] = []
    models = [TimeModel(layout, policy, device, assumptions, DECODING, READING) for layout, _ in layouts]
    reading = [model.prompt(prompt) if most else 0 for model, most in zip(models, room, strict=True)]
    batch = 1
    while batch <= min(MOST_ROWS, max(room, default=0)):
        asked = {"batch": batch, "context": context, "prompt": prompt, "reply": reply}
        points = [
            _point(model, asked | {"prompt_seconds": seconds}, drafts, acceptance)
            for model, most, seconds in zip(models, room, reading, strict=True)
            if most >= batch
        ]
        found.append(max(points, key=lambda point: point.best.gpu_rate))
        batch *= 2
    return Curve(
        context=context,
        prompt=prompt,
        reply=reply,
        drafts=drafts,
        acceptance=acceptance,
        device=device,
        count=layouts[0][0].mesh.size if layouts else 0,
        assumptions=assumptions,
        points=tuple(point for point in found if not any(_beats(other, point) for other in found)),
    )


def _point(model: TimeModel, asked: dict[str, Any], drafts: int, acceptance: float) -> Point:
    layout, sizes = model.layout, model.layout.mesh.shape
    drafting = model.serve(**asked, drafts=drafts, acceptance=acceptance) if drafts else None
    return Point(
        data=sizes[DATA],
        expert=sizes[EXPERT],
        tensor=sizes[TENSOR],
        attention=layout.attention,
        expert_dispatch=layout.expert_dispatch,
        serving=model.serve(**asked),
        drafting=drafting,
    )


def _beats(one: Point, other: Point) -> bool:
    """Whether it gives no less to a user and a GPU, and more to one of them."""
    a = one.best.user_rate, one.best.gpu_rate
    b = other.best.user_rate, other.best.gpu_rate
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"

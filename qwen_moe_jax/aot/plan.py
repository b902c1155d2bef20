"""Which layout to serve a model with on so many devices: what fits, and how fast it can be at best.

Every way of dividing the devices into data x expert x tensor is checked against the devices' memory
(`parallel/memory.py`), and a decode step's least time is calculated (`minimum.py`). Nothing is compiled or
measured: the order is that of upper bounds, so layouts that are close are to be measured.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from qwen_moe_jax.aot.assumptions import assumptions_for
from qwen_moe_jax.aot.curve import Curve, rate_curve
from qwen_moe_jax.aot.drafting import DraftEstimate, draft_estimates
from qwen_moe_jax.aot.minimum import Roofline, collective_bytes, least_work, roofline
from qwen_moe_jax.checkpoint.inspect import size_in_words
from qwen_moe_jax.checkpoint.layout import count_parameters, parameter_forms, parameter_shapes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.devices import Device
from qwen_moe_jax.engine.drafting import check_drafts
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout, frugal_mode
from qwen_moe_jax.parallel.memory import USABLE, holding
from qwen_moe_jax.parallel.mesh import DATA, EXPERT, TENSOR, abstract_mesh
from qwen_moe_jax.schemes.presets import DTYPES, dtype_of, of_dtype

# Of activations and caches, and of the matrices that are not quantised.
_BFLOAT16 = jnp.dtype(jnp.bfloat16)
_POLICY = DtypePolicy(compute=_BFLOAT16, matrix=_BFLOAT16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A layout, what a device of it holds, and how fast it is at best.

    Attributes:
        data, expert, tensor: sizes of the mesh.
        attention, expert_dispatch, shared_expert: as of `Layout`.
        weights: bytes of a device.
        caches: bytes of a device, for the rows of the batch that it has.
        over: bytes of both beyond what is usable; 0 where the layout fits.
        largest_batch: rows of the whole mesh that fit, of the plan's context; 0 where not even one a device.
        roofline: of a decode step with the plan's batch.
        collectives: how many it has, each of which takes its time to begin, which is not in the bound.
    """

    data: int
    expert: int
    tensor: int
    attention: str
    expert_dispatch: str
    shared_expert: str
    weights: int
    caches: int
    over: int
    largest_batch: int
    roofline: Roofline
    collectives: int

    @property
    def fits(self) -> bool:
        """Whether weights and caches do."""
        return self.over == 0

    def to_dict(self) -> dict[str, Any]:
        """All of it, and what follows of it, as JSON has it."""
        found: dict[str, Any] = dataclasses.asdict(self)
        found["fits"] = self.fits
        for name in ("seconds", "bound", "tokens_per_second"):
            found["roofline"][name] = getattr(self.roofline, name)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The best layouts, and those that come closest to fitting; `str()` is a table.

    Attributes:
        parameters: of the model.
        device: that there are `count` of.
        count: devices.
        batch: rows of the whole mesh.
        context: tokens of each row, with the one that the step gives.
        dtype: of the layers' matrices in memory, a key of `schemes.presets.DTYPES`.
        fitting: the best layouts that fit, those with the most tokens a second at best first.
        too_large: the best that do not, those with the largest batch first, then those with the least over.
        considered: how many layouts there are.
        fit: how many of them fit.
        drafts: of the best layout that fits, what 1, 2, ... drafts a row and step give; () without drafts.
        formats: of the best layout, dtype of the layers' matrices -> what it would be with that.
        curve: tokens a second and GPU against tokens a second and user, by the time model, or None.
    """

    parameters: int
    device: Device
    count: int
    batch: int
    context: int
    dtype: str
    fitting: tuple[Option, ...]
    too_large: tuple[Option, ...]
    considered: int
    fit: int
    drafts: tuple[DraftEstimate, ...] = ()
    formats: dict[str, Option] = dataclasses.field(default_factory=dict)
    curve: Curve | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it; of the device its name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = {name: [option.to_dict() for option in found[name]] for name in ("fitting", "too_large")}
        drafts = [dataclasses.asdict(one) for one in self.drafts]
        formats = {dtype: option.to_dict() for dtype, option in self.formats.items()}
        modelled = None if self.curve is None else self.curve.to_dict()
        others = {"drafts": drafts, "formats": formats, "curve": modelled}
        return found | options | {"device": self.device.name} | others

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [
            f"{self.parameters / 1e9:.1f} billion parameters in {self.dtype} on {self.count} x "
            f"{self.device.name}, a batch of {self.batch:,} with {self.context:,} tokens each: {self.fit} of "
            f"{self.considered} layouts fit"
        ]
        if self.fitting:
            lines += [
                f"{_HEADER}{'step':>11}  {'bound by':<9}{'tokens/s':>9}{'collectives':>13}",
                *(
                    f"{_columns(option)}{_milliseconds(option.roofline.seconds):>11}  "
                    f"{option.roofline.bound:<9}{option.roofline.tokens_per_second:>9,.0f}"
                    f"{option.collectives:>13}"
                    for option in self.fitting
                ),
                "A step is of decode, with even routing. These are bounds: a real program takes longer, and "
                "each collective takes its time to begin.",
            ]
        if self.formats:
            lines += self._formats()
        if self.drafts:
            lines += self._drafts()
        if self.too_large:
            lines += [
                "do not fit:",
                f"{_HEADER}{'too much':>11}",
                *(f"{_columns(option)}{size_in_words(option.over):>11}" for option in self.too_large),
            ]
        if self.curve is not None:
            lines.append(str(self.curve))
        return "\n".join([*lines, self._memory()])

    def _formats(self) -> list[str]:
        lines = [
            "The first layout by format of the layers' matrices (int4, mxfp4: the routed experts', if any):",
            f"{'format':<10}{'weights':>11}{'largest batch':>15}{'step':>11}{'tokens/s':>10}",
        ]
        for dtype, option in self.formats.items():
            step, rate = option.roofline.seconds, option.roofline.tokens_per_second
            lines.append(
                f"{dtype:<10}{size_in_words(option.weights):>11}{option.largest_batch:>15,}"
                f"{_milliseconds(step):>11}{rate:>10,.0f}" + ("" if option.fits else "  does not fit")
            )
        return lines

    def _drafts(self) -> list[str]:
        plain = self.fitting[0].roofline
        rates = list(self.drafts[0].tokens_per_second)
        lines = [
            "With multi-token prediction, first layout; tokens/s by how often a draft holds behind one "
            "that held (and over no drafts):",
            f"{'drafts':>6}{'step':>12}" + "".join(f"{f'{rate:.0%}':>17}" for rate in rates),
            f"{0:>6}{_milliseconds(plain.seconds):>12}{plain.tokens_per_second:>11,.0f}",
        ]
        for one in self.drafts:
            lines.append(
                f"{one.drafts:>6}{_milliseconds(one.roofline.seconds):>12}"
                + "".join(
                    f"{found:>11,.0f} {f'({found / plain.tokens_per_second:.2f})':>5}"
                    for found in one.tokens_per_second.values()
                )
            )
        return lines

    def _memory(self) -> str:
        said = (
            f"{self.device.name}: {size_in_words(self.device.memory)}, {USABLE:.0%} of it for weights and "
            "caches, the rest for programs and their temporaries."
        )
        if self.fitting:
            return said
        if any(option.largest_batch for option in self.too_large):
            return f"{said} The batch is too large for every layout: give a smaller one, or more devices."
        return (
            f"{said} The weights and a single sequence are too large for every layout: give more devices"
            + (", or float8 or mxfp4." if self.dtype == "bfloat16" else ".")
        )


_HEADER = (
    f"{'data':>4} {'expert':>6} {'tensor':>6}  {'attention':<9}  {'dispatch':<10}"
    f"{'weights':>11}{'caches':>11}{'largest batch':>15}"
)


def _columns(option: Option) -> str:
    attention = option.attention if option.expert > 1 else "-"
    dispatch = option.expert_dispatch if option.expert > 1 else "-"
    return (
        f"{option.data:>4} {option.expert:>6} {option.tensor:>6}  {attention:<9}  {dispatch:<10}"
        f"{size_in_words(option.weights):>11}{size_in_words(option.caches):>11}{option.largest_batch:>15,}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"


def plan(
    config: ModelConfig,
    device: Device,
    count: int,
    *,
    batch: int,
    context: int,
    dtype: str | None = None,
    shared_expert: str = "auto",
    draft_tokens: int = 0,
    top: int = 5,
    curve: bool = False,
    prompt: int = 0,
    acceptance: float = 0.8,
    assume: Mapping[str, Any] | None = None,
) -> Plan:
    """The best layouts of a model on so many devices, for decoding a batch.

    Args:
        config: of the model; `qwen_moe_jax.configs` has the released ones.
        device: of `devices.py`; all are equal and reach each other by its links.
        count: devices, all of which are used.
        batch: rows that are decoded together.
        context: tokens of each row, with the one that a step gives; caches have room for exactly those.
        dtype: of the layers' matrices, a key of `schemes.presets.DTYPES`; None means as the configuration
            says.
        shared_expert: as of `Layout`, but "auto" is "sharded", which reads and holds the least.
        draft_tokens: with multi-token prediction of one layer, and estimates of 1 to so many drafts a step.
        top: how many layouts that fit, and how many that do not, are given.
        curve: model times with latencies, and give tokens a second and GPU against those a user gets,
            whatever `batch` is.
        prompt: tokens of the context that are read before the rest is decoded, for the curve; 0 means that
            nothing is read, and that rows have the whole context.
        acceptance: probability that a draft behind one that held holds, for the curve.
        assume: what the curve assumes otherwise, as of `Assumptions.changed`.

    Raises:
        InputError: a number or dtype that is none, a context that the model does not have, or a curve of a
            device that nothing is known of.
    """
    quantization = config.quantization if dtype is None else of_dtype(dtype, experts=config.num_experts)
    dtype = dtype_of(quantization) if dtype is None else dtype
    for name, number in (("count", count), ("batch", batch), ("context", context), ("top", top)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is {number!r}; expected a positive integer.")
    if context > config.max_position_embeddings:
        raise InputError(
            f"context is {context}; expected at most the model's {config.max_position_embeddings} tokens."
        )
    check_drafts(draft_tokens)
    config = dataclasses.replace(config, quantization=quantization)
    if isinstance(prompt, bool) or not isinstance(prompt, int) or not 0 <= prompt < context:
        raise InputError(f"prompt is {prompt!r}; expected 0 to fewer than the context's {context} tokens.")
    assumptions = assumptions_for(device).changed(assume or {}) if curve else None
    mode = frugal_mode(config) if shared_expert == "auto" else shared_expert
    layouts = list(_layouts(config, count, mode))
    options = [_option(layout, device, batch, context, drafter=bool(draft_tokens)) for layout in layouts]
    fitting = [option for option in options if option.fits]
    # sorting is stable, and simpler layouts come first
    fitting.sort(key=lambda option: (-option.roofline.tokens_per_second, -option.largest_batch))
    too_large = sorted(
        (option for option in options if not option.fits),
        key=lambda option: (-option.largest_batch, option.over),
    )
    drafts: tuple[DraftEstimate, ...] = ()
    formats: dict[str, Option] = {}
    if fitting:
        best = next(one for one, option in zip(layouts, options, strict=True) if option is fitting[0])
        for each in DTYPES:
            other = dataclasses.replace(config, quantization=of_dtype(each, experts=config.num_experts))
            layout = dataclasses.replace(best, config=other)
            formats[each] = (
                fitting[0]
                if each == dtype
                else _option(layout, device, batch, context, drafter=bool(draft_tokens))
            )
    if fitting and draft_tokens:
        drafts = draft_estimates(best, _POLICY, device, batch=batch, context=context - 1, most=draft_tokens)
    modelled = None
    if assumptions is not None:
        modelled = rate_curve(
            zip(layouts, (option.largest_batch for option in options), strict=True),
            _POLICY,
            device,
            assumptions,
            context=context,
            prompt=prompt,
            drafts=draft_tokens,
            acceptance=acceptance,
        )
    return Plan(
        parameters=count_parameters(parameter_shapes(config), parameter_forms(config)),
        device=device,
        count=count,
        batch=batch,
        context=context,
        dtype=dtype,
        fitting=tuple(fitting[:top]),
        too_large=tuple(too_large[:top]),
        considered=len(options),
        fit=len(fitting),
        drafts=drafts,
        formats=formats,
        curve=modelled,
    )


def _layouts(config: ModelConfig, count: int, shared_expert: str) -> Iterator[Layout]:
    """All that differ, except those that leave a rank without experts or without a part of each."""
    for data, expert, tensor in _factors(count):
        mesh = abstract_mesh(data, expert, tensor)
        # one rank with all experts exchanges nothing, and has no other ranks to be anything to attention
        choices = [("tensor", "psum")]
        if expert > 1:
            choices += [("data", "psum")]
        if expert > 1 and config.num_experts:
            choices += [("tensor", "all_to_all"), ("data", "all_to_all")]
        for attention, dispatch in choices:
            layout = Layout(config, mesh, attention, shared_expert, dispatch, ragged=True)
            axes = ("expert", "inner") if config.num_experts else ("dense_inner",)
            if all(_all_hold_some(layout, axis) for axis in axes):
                yield layout


def _factors(count: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, expert, tensor) whose product is `count`."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data in divisors:
        for expert in divisors:
            if count % (data * expert) == 0:
                yield data, expert, count // (data * expert)


def _all_hold_some(layout: Layout, axis: str) -> bool:
    section = layout.splits[axis].sections[0]
    return max(section.starts) < section.units


def _option(layout: Layout, device: Device, batch: int, context: int, *, drafter: bool) -> Option:
    held = holding(layout, _POLICY, drafter=drafter)
    weights = sum(held.weights.values())
    caches = layout.local_rows(batch) * held.sequence(context)
    work = least_work(layout, _POLICY, batch=batch, tokens=1, context=context - 1)
    collectives = collective_bytes(layout, _POLICY, batch=batch, tokens=1)
    sizes = layout.mesh.shape
    return Option(
        data=sizes[DATA],
        expert=sizes[EXPERT],
        tensor=sizes[TENSOR],
        attention=layout.attention,
        expert_dispatch=layout.expert_dispatch,
        shared_expert=layout.shared_expert,
        weights=weights,
        caches=caches,
        over=max(0, caches - held.free(device)),
        largest_batch=layout.batch_multiple * held.rows(device, context),
        roofline=roofline(work, device, collectives=collectives),
        collectives=sum(collective.count for collective in collectives),
    )

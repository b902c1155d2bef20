"""A model of how long steps take, with latencies: of decode, of prefill, of both in turn, and with drafts.

A step reads and computes what it has to at least (`minimum.py`), and what this library's programs do beside
(`Program`, counted in compiled ones), at what devices reach of their data sheets (`assumptions.py`):

    device = max(bytes / bandwidth, FLOPs / peak) + kernels x gap + each collective's time
    host   = kernels x launch
    step   = max(device, host), since the host runs ahead

With shares of one, no latencies and no program that is the bound of `minimum.roofline`. It is a model and no
measurement: experts are chosen evenly, nothing is hidden behind a collective, all of a step is as good as the
microbenchmark it is compared with, and a host that drives several devices from one process starts kernels on
each as fast as on one. `benchmarks/README.md` has it beside published results.
"""

import dataclasses
from collections.abc import Iterable

from qwen_moe_jax.aot.assumptions import Assumptions
from qwen_moe_jax.aot.drafting import expected_tokens, verify_collectives, verify_work
from qwen_moe_jax.aot.minimum import Collective, Work, collective_bytes, least_work
from qwen_moe_jax.config import FULL_ATTENTION, LINEAR_ATTENTION
from qwen_moe_jax.devices import Device
from qwen_moe_jax.errors import InputError
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import Layout
from qwen_moe_jax.parallel.mesh import DATA

_FLOAT32 = 4
# Of the engine on a GPU (`engine/shapes.py`): one row of a data rank in a prefill step.
CHUNK = 4096
# Both AMD architectures choose alike.
_TABLE = Kernels("gfx950")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a compiled step does beside its least work.

    Attributes:
        linear, full: kernels of a layer of either kind, with its experts.
        gathered: how many fewer they are with so few tokens that experts are gathered (`kernels/table.py`).
        step: kernels beside the layers.
        draft: of an application of multi-token prediction, with its logits.
        passes: arrays of [tokens, hidden] in float32 that a layer reads or writes in memory.
        chain: cycles that each token of a row adds to the delta rule of a linear layer, whose chunks wait for
            one another on one compute unit.
    """

    linear: float = 0
    full: float = 0
    gathered: float = 0
    step: float = 0
    draft: float = 0
    passes: float = 0
    chain: float = 0

    def kernels(self, layout: Layout, batch: int, tokens: int = 1, drafts: int = 0) -> float:
        """Of a step of so many tokens for each row of the mesh's batch, and so many drafts."""
        config = layout.config
        linear, full = map(config.layer_types.count, (LINEAR_ATTENTION, FULL_ATTENTION))
        slots = -(-batch // layout.mesh.shape[DATA]) * tokens * config.num_experts_per_tok
        amount = slots / config.num_experts if config.num_experts else 0
        few = amount > 0 and _TABLE.pick("experts", "bfloat16", amount) == "pallas_gathered"
        a_layer = -self.gathered if few else 0
        found = linear * (self.linear + a_layer) + full * (self.full + a_layer)
        return found + self.step + drafts * self.draft

    def activations(self, layout: Layout, batch: int, tokens: int) -> float:
        """Bytes that a device reads and writes beside weights, caches and states.

        Half of the passes are of token mixers, half of MLPs; where ranks of the expert axis have rows of
        their own, experts meet those of all.
        """
        config, own = layout.config, layout.local_rows(batch)
        group = layout.group_rows(batch) if config.num_experts else own
        a_pass = _FLOAT32 * config.hidden_size * config.num_hidden_layers * tokens
        return self.passes * a_pass * (own + group) / 2

    def chain_cycles(self, layout: Layout, tokens: int) -> float:
        """Of the linear layers, one after the other, for so many tokens a row."""
        return self.chain * tokens * layout.config.layer_types.count(LINEAR_ATTENTION)


# Counted in programs compiled for MI355X (jax 0.10.2, `launches.py`), the 397B in FP8, EP 8, 8,192 tokens a
# row: `qwen-moe-jax compile 397b --device mi355x --count 8 --context 8192 --layers N --dtype fp8 --batch B
# --program P`. decode: B 64 has 324 kernels with 4 layers and 606 with 8, B 1 188 with 4 (bfloat16, B 64:
# 303); verify with --draft-tokens 3, B 64: 633; prefill of 4,096 tokens has 220 with 4 layers and 494 with 8,
# the last one's attention and experts being dropped. How many belong to a layer of either kind is by their
# names. Of a layer's 70 in decode 28 are a binary search of seven steps (`kernels/tiles.py`). passes: bytes
# moved over the least without those of attention, in benchmarks/README.md, "Compiled for AMD GPUs": 35 to 47
# in decode of 64 rows, 15 in prefill of 1 x 4,096 and of 8 x 1,024 tokens (rows divided). chain: matrix
# instructions alone (`kernels/delta_chunks.py`), at the clock's highest, so a lower bound.
DECODING = Program(linear=70, full=71, gathered=34, step=42, draft=103, passes=40)
READING = Program(linear=68, full=71, step=8, passes=15, chain=392)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """How long a step takes by the model.

    Attributes:
        memory_seconds: to read and write.
        flop_seconds: of the products.
        exchange_seconds: of the collectives.
        gap_seconds: between kernels.
        chain_seconds: of loops whose turns wait for one another, which leave most of the device idle.
        launch_seconds: of the host.
        tokens: new ones of the whole mesh.
    """

    memory_seconds: float
    flop_seconds: float
    exchange_seconds: float
    gap_seconds: float
    launch_seconds: float
    tokens: int
    chain_seconds: float = 0

    @property
    def device_seconds(self) -> float:
        """Of the device alone."""
        waits = self.exchange_seconds + self.gap_seconds + self.chain_seconds
        return max(self.memory_seconds, self.flop_seconds) + waits

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.device_seconds, self.launch_seconds)

    @property
    def bound(self) -> str:
        """What takes the most of it: "launches" of the host, or of the device "memory", "FLOPs", "links",
        "gaps" or "chain"."""
        if self.launch_seconds > self.device_seconds:
            return "launches"
        shares = {
            "memory": self.memory_seconds,
            "FLOPs": self.flop_seconds,
            "links": self.exchange_seconds,
            "gaps": self.gap_seconds,
            "chain": self.chain_seconds,
        }
        return max(shares, key=lambda name: shares[name])

    @property
    def tokens_per_second(self) -> float:
        """New tokens of the whole mesh."""
        return self.tokens / self.seconds


def step_time(
    work: Work,
    collectives: Iterable[Collective],
    device: Device,
    assumptions: Assumptions,
    *,
    kernels: float = 0,
    activations: float = 0,
    chain: float = 0,
    dtype: str = "bfloat16",
) -> StepTime:
    """The model itself.

    Args:
        work: the least of a step, from `minimum.py` or `drafting.py`.
        collectives: of it.
        device: that has the work.
        assumptions: about it.
        kernels: that it starts.
        activations: bytes that it reads and writes beside the least.
        chain: cycles in which most of the device waits.
        dtype: of the products; this library's are bfloat16 with float8 matrices, too.

    Raises:
        InputError: nothing is assumed of that dtype.
    """
    if dtype not in assumptions.flops or dtype not in device.peak_flops:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(assumptions.flops)}.")
    return StepTime(
        memory_seconds=(work.total_bytes + activations) / (assumptions.memory * device.bandwidth),
        flop_seconds=work.total_flops / (assumptions.flops[dtype] * device.peak_flops[dtype]),
        exchange_seconds=sum(assumptions.collective_seconds(one, device) for one in collectives),
        gap_seconds=kernels * assumptions.gap,
        launch_seconds=kernels * assumptions.launch,
        chain_seconds=chain / (device.clock_ghz * 1e9),
        tokens=work.tokens,
    )


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """A layout on devices, with what is assumed of them, and the times of its steps.

    Attributes:
        layout: of the model.
        policy: dtypes.
        device: that there are as many of as the mesh has.
        assumptions: about them.
        decoding: what a step of decoding, or one that verifies drafts, does beside the least.
        reading: what a step of prefill does.
    """

    layout: Layout
    policy: DtypePolicy
    device: Device
    assumptions: Assumptions
    decoding: Program
    reading: Program

    def decode(self, batch: int, context: int, drafts: int = 0) -> StepTime:
        """A step that gives every row of the mesh's batch a token, or verifies and makes drafts.

        Args:
            batch: rows of the whole mesh.
            context: tokens a row before.
            drafts: of a row.
        """
        if drafts:
            work = verify_work(self.layout, self.policy, batch=batch, drafts=drafts, context=context)
            exchanged = verify_collectives(self.layout, self.policy, batch=batch, drafts=drafts)
        else:
            work = least_work(self.layout, self.policy, batch=batch, tokens=1, context=context)
            exchanged = collective_bytes(self.layout, self.policy, batch=batch, tokens=1)
        return self._time(work, exchanged, self.decoding, batch, drafts + 1, drafts)

    def prefill(self, tokens: int, context: int = 0) -> StepTime:
        """A chunk of a prompt on each data rank.

        Args:
            tokens: of the chunk.
            context: tokens of the prompt before it.
        """
        batch = self.layout.batch_multiple
        work = least_work(self.layout, self.policy, batch=batch, tokens=tokens, context=context)
        exchanged = collective_bytes(self.layout, self.policy, batch=batch, tokens=tokens)
        return self._time(work, exchanged, self.reading, batch, tokens, 0)

    def prompt(self, tokens: int, chunk: int = CHUNK, before: int = 0) -> float:
        """Seconds of a whole prompt on each data rank, chunk by chunk, behind `before` tokens; 0 of none.

        Raises:
            InputError: a chunk of nothing.
        """
        if chunk < 1:
            raise InputError(f"chunk is {chunk!r}; expected a positive number of tokens.")
        starts = range(0, tokens, chunk)
        return sum(self.prefill(min(chunk, tokens - start), before + start).seconds for start in starts)

    def mixed(self, batch: int, context: int, chunk: int = CHUNK) -> float:
        """Seconds from one token of a running row to the next while prompts are read.

        Steps of prefill and decode take turns (`engine/scheduler.py`), so it is one of each; a chunk stands
        for any, with half of the row's tokens before it.
        """
        return self.prefill(chunk, context // 2).seconds + self.decode(batch, context).seconds

    def serve(
        self,
        batch: int,
        *,
        context: int,
        prompt: int,
        reply: int,
        drafts: int = 0,
        acceptance: float = 1.0,
        prompt_seconds: float | None = None,
    ) -> "Serving":
        """So many requests at a time, each followed by another of the same kind.

        Args:
            batch: requests of the whole mesh.
            context: tokens of each when it ends; what is neither prompt nor reply was in the caches before.
            prompt: tokens of each that are read.
            reply: tokens of each that are decoded.
            drafts: a row and step.
            acceptance: probability that a draft behind one that held holds.
            prompt_seconds: what `prompt` gives, where it is known.

        Raises:
            InputError: a size that is none, or a probability that is none.
        """
        sizes = {"batch": (batch, 1), "prompt": (prompt, 0), "reply": (reply, 1), "context": (context, 1)}
        for name, (number, least) in sizes.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputError(f"{name} is {number!r}; expected a whole number, {least} or more.")
        if context < prompt + reply:
            raise InputError(f"context is {context}; expected at least prompt and reply, {prompt + reply}.")
        if prompt_seconds is None:
            prompt_seconds = self.prompt(prompt, before=context - prompt - reply)
        return Serving(
            batch=batch,
            prompt=prompt,
            reply=reply,
            devices=self.layout.mesh.size,
            step=self.decode(batch, context - reply + reply // 2, drafts),
            tokens_a_step=expected_tokens(acceptance, drafts),
            prompt_seconds=prompt_seconds,
            prompts_at_once=self.layout.batch_multiple,
        )

    def _time(
        self,
        work: Work,
        exchanged: Iterable[Collective],
        program: Program,
        batch: int,
        tokens: int,
        drafts: int,
    ) -> StepTime:
        return step_time(
            work,
            exchanged,
            self.device,
            self.assumptions,
            kernels=program.kernels(self.layout, batch, tokens, drafts),
            activations=program.activations(self.layout, batch, tokens),
            chain=program.chain_cycles(self.layout, tokens),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What requests of one kind get, and what the devices give.

    Attributes:
        batch: requests at a time.
        prompt, reply: tokens of each.
        devices: of the mesh.
        step: that decodes, with half of each reply behind it.
        tokens_a_step: that a row gets of it on average.
        prompt_seconds: to read a prompt on each data rank, during which nobody decodes.
        prompts_at_once: data ranks.
    """

    batch: int
    prompt: int
    reply: int
    devices: int
    step: StepTime
    tokens_a_step: float
    prompt_seconds: float
    prompts_at_once: int

    @property
    def seconds_a_token(self) -> float:
        """Between two tokens of a row on average. While a row gets its reply, each of the others ends once,
        and the prompt that follows it is read."""
        reading = self.batch / self.prompts_at_once * self.prompt_seconds
        return self.step.seconds / self.tokens_a_step + reading / self.reply

    @property
    def user_rate(self) -> float:
        """Tokens a second that a request gets."""
        return 1 / self.seconds_a_token

    @property
    def gpu_rate(self) -> float:
        """Tokens of replies a second and device."""
        return self.batch * self.user_rate / self.devices

    @property
    def total_gpu_rate(self) -> float:
        """Tokens of prompts and replies a second and device, as InferenceX counts
        (SemiAnalysisAI/InferenceX, utils/process_result.py, `tput_per_gpu`)."""
        return self.gpu_rate * (self.prompt + self.reply) / self.reply

"""What compiling for described devices gives: numbers for people and for machines."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.aot.hlo import CollectiveOperation
from qwen_moe_jax.aot.minimum import Roofline, Work
from qwen_moe_jax.checkpoint.inspect import size_in_words
from qwen_moe_jax.devices import Device
from qwen_moe_jax.formats.cache import PAGE, pages_for

# Of a device's memory, what a process is to be given (XLA_PYTHON_CLIENT_MEM_FRACTION); see
# docs/guides/amd.md.
FRACTION = 0.95
_TOP = 8  # operations named in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One compiled program on one device.

    Attributes:
        program: "prefill" (one chunk) or "decode" (one step).
        tokens: a row.
        arguments: bytes of weights, caches and inputs, as the compiler counts them.
        results: bytes, those that take over an argument's memory among them.
        donated: bytes of results that do.
        temporaries: bytes beside arguments and results.
        code: bytes of the executable.
        collectives: of a call.
        custom_calls: what XLA does not see into, and how often.
        kernels: that a call starts, copies and the custom calls among them, collectives not.
        flops: of a call: XLA's count and what this library's kernels say of themselves.
        traffic: bytes that a call reads and writes in memory, counted operation by operation.
        traffic_by_part: the same, by the model's parts; "other" is between them.
        operations: the operations that move the most: place in the program -> bytes.
        least: what no program can do without.
        roofline: of the least work: an upper bound of the speed.
        lower_seconds, compile_seconds: on this machine.
    """

    program: str
    tokens: int
    arguments: int
    results: int
    donated: int
    temporaries: int
    code: int
    collectives: tuple[CollectiveOperation, ...]
    custom_calls: Mapping[str, float]
    kernels: float
    flops: float
    traffic: float
    traffic_by_part: Mapping[str, float]
    operations: Mapping[str, float]
    least: Work
    roofline: Roofline
    lower_seconds: float
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes while it runs: arguments, temporaries, and results that have memory of their own."""
        return self.arguments + self.temporaries + self.results - self.donated

    @property
    def traffic_ratio(self) -> float:
        """Bytes moved over the least."""
        return self.traffic / self.least.total_bytes

    @property
    def flops_ratio(self) -> float:
        """FLOPs over the least."""
        return self.flops / self.least.total_flops

    def lines(self) -> list[str]:
        """For people."""
        bound = self.roofline
        lines = [
            f"{self.program}, {self.tokens} token{'s' if self.tokens > 1 else ''} a row: compiled in "
            f"{self.compile_seconds:.1f} s after {self.lower_seconds:.1f} s of tracing",
            f"  memory         {size_in_words(self.arguments)} of arguments, {size_in_words(self.donated)} "
            f"of them updated in place, {size_in_words(self.temporaries)} of temporaries",
            f"  bytes moved    {size_in_words(int(self.traffic))}, {self.traffic_ratio:.2f} x the least "
            f"({size_in_words(int(self.least.total_bytes))})",
            *(
                f"    {part:<17}{size_in_words(int(count))}"
                for part, count in self.traffic_by_part.items()
                if count >= self.traffic / 1000
            ),
            f"  FLOPs          {self.flops / 1e9:,.4g} G, {self.flops_ratio:.2f} x the least "
            f"({self.least.total_flops / 1e9:,.4g} G)",
            f"  at best        {bound.seconds * 1e3:.3g} ms, {bound.tokens_per_second:,.0f} tokens/s of the "
            f"mesh, bound by {bound.bound} (an upper bound of the speed, not a prediction)",
        ]
        for one in self.collectives:
            lines.append(
                f"  {one.count:>4.0f} x {one.kind} of {size_in_words(int(one.bytes))} among {one.group}"
            )
        calls = ", ".join(f"{count:.0f} x {name}" for name, count in self.custom_calls.items())
        return [*lines, f"  custom calls   {calls or 'none'}", f"  kernels        {self.kernels:,.0f}"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = dataclasses.asdict(self)
        found |= {name: getattr(self, name) for name in ("peak", "traffic_ratio", "flops_ratio")}
        for name in ("seconds", "bound", "tokens_per_second"):
            found["roofline"][name] = getattr(self.roofline, name)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """A deployment, compiled; `str()` is the printed report.

    Attributes:
        model: as it was asked for.
        device: that it is compiled for.
        count: devices.
        layout: in words.
        dtype: of the layers' matrices, "bfloat16" or "float8".
        batch: rows of the whole mesh.
        context: tokens a row.
        capacity: tokens that the caches have room for.
        weights: component -> bytes of a device.
        kv: bytes of keys and values of a device.
        state: bytes of recurrent state of a device.
        row: bytes of a device that another row of the batch takes.
        batch_multiple: rows of the whole mesh for each of a device.
        kernels: the table of implementations, in words.
        programs: what was compiled.
        versions: of the compiler.
    """

    model: str
    device: Device
    count: int
    layout: str
    dtype: str
    batch: int
    context: int
    capacity: int
    weights: Mapping[str, int]
    kv: int
    state: int
    row: int
    batch_multiple: int
    kernels: tuple[str, ...]
    programs: tuple[ProgramReport, ...]
    versions: Mapping[str, str]

    @property
    def usable(self) -> int:
        """Bytes of a device that a process is given."""
        return int(FRACTION * self.device.memory)

    @property
    def peak(self) -> int:
        """Bytes of a device while the largest program runs."""
        return max(program.peak for program in self.programs)

    @property
    def over(self) -> int:
        """Bytes too many; 0 where it fits."""
        return max(0, self.peak - self.usable)

    @property
    def fits(self) -> bool:
        """Whether all programs do."""
        return self.over == 0

    @property
    def largest_batch(self) -> int:
        """Rows of the whole mesh that fit with the temporaries of this batch; 0 where none do."""
        rows = -(-self.batch // self.batch_multiple)
        free = self.usable - (self.peak - rows * self.row)
        return max(0, free // self.row) * self.batch_multiple

    def __str__(self) -> str:
        weights = ", ".join(f"{part} {size_in_words(n)}" for part, n in self.weights.items())
        if self.fits:
            verdict = f"fits, with {size_in_words(self.usable - self.peak)} to spare"
        else:
            verdict = f"does not fit: {size_in_words(self.over)} too much"
        return "\n".join(
            [
                f"{self.model} in {self.dtype} on {self.count} x {self.device.name} ({self.device.arch}), "
                f"compiled, not run",
                f"{self.layout}",
                f"batch {self.batch} with {self.context} tokens each "
                f"({pages_for(self.context)} pages of {PAGE})",
                "a device holds",
                f"  weights        {size_in_words(sum(self.weights.values()))}: {weights}",
                f"  keys, values   {size_in_words(self.kv)}",
                f"  state          {size_in_words(self.state)}",
                f"  temporaries    {size_in_words(max(p.temporaries for p in self.programs))}",
                f"  in all         {size_in_words(self.peak)} of {size_in_words(self.usable)} "
                f"({FRACTION:.0%} of its memory): {verdict}; largest batch {self.largest_batch:,}",
                "implementations",
                *self.kernels,
                *(line for program in self.programs for line in program.lines()),
                "compiled through XLA's ROCm backend against an assumed device description "
                f"(jax {self.versions['jax']}, jaxlib {self.versions['jaxlib']}); nothing was run",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, and what follows of it, as JSON has it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"device": self.device.name, "arch": self.device.arch, "memory": self.device.memory}
        found |= {name: getattr(self, name) for name in ("usable", "peak", "over", "fits", "largest_batch")}
        found["programs"] = {program.program: program.to_dict() for program in self.programs}
        return found

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)


def largest_operations(by_operation: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The operations that move the most, by their place in the traced program."""
    ranked = sorted(by_operation.items(), key=lambda item: -item[1])[:_TOP]
    return {f"{place or 'unnamed'} ({opcode})": count for (place, opcode), count in ranked}

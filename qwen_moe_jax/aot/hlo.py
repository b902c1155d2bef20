"""Reading the text of optimised HLO: computations, instructions, shapes, collectives, kernels.

Only what reports and tests ask of a compiled program is read. Names and attributes are XLA's
(https://openxla.org/xla/operation_semantics).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import Any

from qwen_moe_jax.kernels.launch import COST, KernelCost

_ITEM = {"pred": 1, "token": 0, "opaque": 0, "tuple": 0}
# A dimension of at most so many elements is written "<=8".
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_STRING = re.compile(_QUOTED)
_STRING_OR_PARENTHESIS = re.compile(_QUOTED + r"|[()]")
_OP_NAME = re.compile(r"\bop_name=" + _QUOTED)
_METADATA = re.compile(r"\bserialized_metadata = " + _QUOTED)
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They name memory, or wait; where they run a computation, that is what works.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async",
    "async-update",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its dtype as XLA writes it ("bf16") and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Of its elements."""
        return prod(self.dims) * item_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: of its result.
        opcode: as XLA writes it.
        shapes: of the result; several for a tuple.
        operands: names, in order.
        rest: the text behind the operands: attributes, metadata, backend_config.
        root: it is its computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def kind(self) -> str:
        """The opcode of what runs, also where this only starts it: "all-reduce" of "all-reduce-start"."""
        return self.opcode.removesuffix("-start")

    @property
    def results(self) -> tuple[Shape, ...]:
        """What it writes: of an asynchronous start without the operands and tokens that it hands on."""
        if self.kind == self.opcode or self.kind == "all-reduce":
            return self.shapes
        if self.kind == "copy":
            return self.shapes[:1]
        count = len(self.operands)
        return self.shapes[count : 2 * count] if self.kind in COLLECTIVES else self.shapes[count:]

    @property
    def bytes(self) -> float:
        """Of the results."""
        return sum(shape.bytes for shape in self.results)

    @property
    def elements(self) -> int:
        """Of the first result; several have as many each, but for a tuple."""
        return prod(self.shapes[0].dims) if self.shapes else 0

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = _OP_NAME.search(self.rest)
        return re.sub(r"\\(.)", r"\1", found.group(1)) if found else ""

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found.group(1) if found else None

    @property
    def free(self) -> bool:
        """It moves and computes nothing itself."""
        return self.kind in FREE or self.opcode.endswith("-done")

    @cached_property
    def attributes(self) -> str:
        """The text behind the operands without what is quoted, where any text may be."""
        return _STRING.sub('""', self.rest)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute ("calls", "body", "condition") names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations that a conditional chooses from."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return tuple(_NAME.findall(found.group(1)))
        both = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in both if name)

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.rest)
        return int(found.group(1)) if found else None

    @property
    def kernel_cost(self) -> KernelCost | None:
        """What a kernel of this library said of itself when it was launched (`kernels/launch.py`)."""
        found = _METADATA.search(self.rest)
        if found is None:
            return None
        # MLIR writes a backslash twice, and other bytes that need it as one and two hexadecimal digits
        text = re.sub(
            rb"\\(\\|[0-9A-Fa-f]{2})",
            lambda m: m.group(1) if m.group(1) == b"\\" else bytes.fromhex(m.group(1).decode()),
            found.group(1).encode(),
        )
        cost = json.loads(text).get(COST)
        return None if cost is None else KernelCost(**json.loads(cost))


class Module:
    """A parsed program.

    Attributes:
        computations: name -> its instructions, in order.
        entry: name of the computation that a call of the program runs.
        aliased: results that take over an argument's memory.
        devices: that it is compiled for.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        first = text.partition("\n")[0]
        self.aliased = len(re.findall(r"\{[\d, ]*\}: \(\d+,", first))
        self.devices = prod(int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", first))
        current: list[Instruction] | None = None
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header.group(2), [])
                if header.group(1):
                    self.entry = header.group(2)
            elif current is not None and (instruction := _parse(line)) is not None:
                current.append(instruction)

    @cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Computation -> name -> instruction."""
        return {name: {i.name: i for i in found} for name, found in self.computations.items()}

    def executed(
        self,
        computation: str | None = None,
        times: float = 1,
        cost: Callable[[str, Instruction], float] | None = None,
    ) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, how often it runs) of what a call of the program executes.

        The insides of fusions are not executed one by one, and are left out. A loop of unknown length counts
        once, and so does its condition, which one of known length does without. Of a conditional's branches
        the one that costs the most counts, for one of them runs, and any may.

        Args:
            computation: to start from, the entry if not given.
            times: that it runs.
            cost: of one run of an instruction of a computation, by which branches compare; the bytes of its
                result if not given.
        """
        name = computation or self.entry
        cost = cost or _result_bytes
        for instruction in self.computations[name]:
            yield name, instruction, times
            if instruction.kind == "conditional":
                ran = [list(self.executed(branch, times, cost)) for branch in instruction.branches]
                yield from max(ran, key=lambda branch: sum(cost(c, i) * n for c, i, n in branch), default=[])
            for callee, runs in _runs(instruction):
                yield from self.executed(callee, times * runs, cost)

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that a fusion joins; of another instruction it alone."""
        called = instruction.called("calls") if instruction.kind == "fusion" else None
        return [instruction] if called is None else self.computations[called]

    def instructions(self) -> Iterator[Instruction]:
        """All of them, also inside fusions."""
        for found in self.computations.values():
            yield from found


@dataclasses.dataclass(frozen=True)
class CollectiveOperation:
    """Collectives of one kind and size.

    Attributes:
        kind: one of `COLLECTIVES`.
        group: devices that exchange with each other.
        bytes: of one's result on a device.
        count: how many a call of the program executes.
    """

    kind: str
    group: int
    bytes: float
    count: float


def collectives(module: Module) -> list[CollectiveOperation]:
    """What a call of the program exchanges, alike ones counted together.

    Of a conditional's branches the one that exchanges the most bytes counts.
    """

    def key(one: Instruction) -> tuple[str, int, float] | None:
        return (one.kind, _group_size(one, module), one.bytes) if one.kind in COLLECTIVES else None

    def cost(_: str, instruction: Instruction) -> float:
        return sum(one.bytes for one in module.inside(instruction) if one.kind in COLLECTIVES)

    found = _counted(module, key, cost)
    return [CollectiveOperation(kind, group, size, count) for (kind, group, size), count in found.items()]


def custom_calls(module: Module) -> dict[str, float]:
    """Target, and for a kernel of this library its name -> how many a call of the program executes.

    Of a conditional's branches the one with the most calls counts.
    """

    def key(one: Instruction) -> str | None:
        if one.kind != "custom-call":
            return None
        return one.target if one.kernel_cost is None else kernel_name(one)

    def cost(_: str, instruction: Instruction) -> float:
        return sum(one.kind == "custom-call" for one in module.inside(instruction))

    return _counted(module, key, cost)


def _counted(
    module: Module, key: Callable[[Instruction], Any], cost: Callable[[str, Instruction], float]
) -> dict[Any, float]:
    """How often what has a key is executed, on its own or in a fusion."""
    found: dict[Any, float] = {}
    for _, instruction, times in module.executed(cost=cost):
        for one in module.inside(instruction):
            if (name := key(one)) is not None:
                found[name] = found.get(name, 0) + times
    return found


def kernel_name(instruction: Instruction) -> str:
    """What a kernel was launched as: the part of its place in the program before `pallas_call`."""
    parts = instruction.op_name.split("/")
    return parts[-2] if len(parts) > 1 else instruction.name


def item_bytes(dtype: str) -> float:
    """Bytes of one element of a dtype as XLA writes it."""
    if dtype in _ITEM:
        return _ITEM[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits.group(1)) / 8 if bits else 0


def _result_bytes(_: str, instruction: Instruction) -> float:
    return 0 if instruction.free else instruction.bytes


def _runs(instruction: Instruction) -> list[tuple[str, float]]:
    """Computations that an instruction runs, but for a conditional's, and how often each."""
    if instruction.kind == "while":
        trips = instruction.trips
        wanted = [("body", 1 if trips is None else trips)]
        wanted += [("condition", 1)] if trips is None else []
    elif instruction.kind in ("call", "async"):
        wanted = [("to_apply", 1), ("calls", 1)]
    else:
        return []
    return [(callee, runs) for name, runs in wanted if (callee := instruction.called(name)) is not None]


def _group_size(collective: Instruction, module: Module) -> int:
    text = collective.attributes
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if iota:
        return int(iota.group(2))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return _chain(dict(re.findall(r"(\d+),(\d+)", pairs.group(1))))
    return module.devices  # no groups: all of them


def _chain(target: Mapping[str, str]) -> int:
    """Devices of the longest ring or chain of a permutation."""
    longest = 1
    for start in target:
        seen, at = {start}, target[start]
        while at not in seen:
            seen.add(at)
            at = target.get(at, at)
        longest = max(longest, len(seen))
    return longest


def _parse(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    text = line[head.end() :]
    end = _closing(text, 0) if text.startswith("(") else _type_end(text)
    shapes = tuple(
        Shape(dtype, tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d))
        for dtype, dims in _SHAPE.findall(text[:end])
    )
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        return None
    close = _closing(text, opcode.end() - 1)
    operands = tuple(_NAME.findall(text[opcode.end() : close - 1]))
    if opcode.group(1) in ("parameter", "constant"):
        operands = (text[opcode.end() : close - 1],)
    return Instruction(head.group(2), opcode.group(1), shapes, operands, text[close:], bool(head.group(1)))


def _type_end(text: str) -> int:
    """Where a plain type ends: before the blank in front of the opcode."""
    return max(text.find(" "), 0)


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`; one in a string closes nothing."""
    depth = 0
    for found in _STRING_OR_PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.end()
    return len(text)

"""Reading the text of optimised HLO: computations, instructions, shapes, collectives, kernels.

Only what reports and tests ask of a compiled program is read. Names and attributes are XLA's
(https://openxla.org/xla/operation_semantics).
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from functools import cached_property
from math import prod

from qwen_moe_jax.kernels.launch import COST, KernelCost

_ITEM = {"pred": 1, "token": 0, "opaque": 0, "tuple": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


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
    def bytes(self) -> float:
        """Of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found.group(1) if found else None

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute ("calls", "body", "condition") names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations that a conditional chooses from."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
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
        found = re.search(r'serialized_metadata = "((?:[^"\\]|\\.)*)"', self.rest)
        if found is None:
            return None
        # MLIR writes a character that needs it as a backslash and two hexadecimal digits
        text = re.sub(
            r"\\([0-9A-F]{2})", lambda m: chr(int(m.group(1), 16)), found.group(1).replace("\\\\", "\\5C")
        )
        cost = json.loads(text).get(COST)
        return None if cost is None else KernelCost(**json.loads(cost))


class Module:
    """A parsed program.

    Attributes:
        computations: name -> its instructions, in order.
        entry: name of the computation that a call of the program runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.aliased = len(re.findall(r"\{[\d, ]*\}: \(\d+,", text.partition("\n")[0]))
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
        self, computation: str | None = None, times: float = 1
    ) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, how often it runs) of what a call of the program executes.

        The insides of fusions are not executed one by one, and are left out. A loop of unknown length counts
        once; of a conditional's branches each one counts, as the most that can run.
        """
        name = computation or self.entry
        for instruction in self.computations[name]:
            yield name, instruction, times
            if instruction.opcode == "while":
                body = instruction.called("body")
                assert body is not None
                yield from self.executed(body, times * (instruction.trips or 1))
            elif instruction.opcode == "conditional":
                for branch in instruction.branches:
                    yield from self.executed(branch, times)
            elif instruction.opcode in ("call", "async-start"):
                callee = instruction.called("to_apply") or instruction.called("calls")
                if callee is not None:
                    yield from self.executed(callee, times)

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
    """What a call of the program exchanges, alike ones counted together."""
    found: dict[tuple[str, int, float], float] = {}
    for _, instruction, times in module.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            shapes = instruction.shapes
            # an asynchronous one's result is (operands, results, ...), but for an all-reduce
            if instruction.opcode.endswith("-start") and len(shapes) > 1:
                shapes = shapes[1:2]
            key = kind, _group_size(instruction.rest), sum(s.bytes for s in shapes)
            found[key] = found.get(key, 0) + times
    return [CollectiveOperation(*key, count) for key, count in found.items()]


def custom_calls(module: Module) -> dict[str, float]:
    """Target, and for a kernel of this library its name -> how many a call of the program executes."""
    found: dict[str, float] = {}
    for _, instruction, times in module.executed():
        if instruction.opcode == "custom-call" and instruction.target:
            name = instruction.target if instruction.kernel_cost is None else kernel_name(instruction)
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


def _group_size(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    return int(iota.group(2)) if iota else 1


def _parse(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    text = line[head.end() :]
    end = _closing(text, 0) if text.startswith("(") else _type_end(text)
    shapes = tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
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
    return text.index(" ")


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place + 1
    return len(text)

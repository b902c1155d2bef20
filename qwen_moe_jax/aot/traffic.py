"""Bytes that a compiled program reads and writes in a device's memory, operation by operation.

Every operation that XLA leaves in the optimised program is a kernel, which reads its operands from memory and
writes its result there; a fusion keeps what is between. XLA's own count takes a fusion that updates a few
rows of a cache in place for one that rewrites the cache; here

- what is sliced or gathered counts as the slice, where nothing else reads the whole;
- an update in place (of a slice, or a scatter) counts what is written, and not the rest;
- a kernel of this library counts what it says of itself;
- a loop counts as often as it runs, once if the compiler does not know (so that a decode loop is one step);
- a collective counts the local reads and writes, not what goes over links.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

from qwen_moe_jax.aot.hlo import Instruction, Module, Shape

# They name memory, or wait.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async-start",
    "async-update",
    "async-done",
}
_SLICES = {"dynamic-slice", "slice", "gather"}
# What a read of a part of an array may pass through on its way to the slice.
_VIEWS = {"bitcast", "reshape", "copy", "convert", "transpose"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a call of the program moves.

    Attributes:
        by_operation: (place in the traced program, opcode) -> bytes.
        kernel_flops: that this library's kernels say they do, which XLA does not see.
        unknown_loops: loops that were counted once because their length is not known.
    """

    by_operation: Mapping[tuple[str, str], float]
    kernel_flops: float
    unknown_loops: int

    @property
    def bytes(self) -> float:
        """All of it."""
        return sum(self.by_operation.values())

    def by_part(self) -> dict[str, float]:
        """Bytes by the model's named part, largest first; "other" has none."""
        parts: dict[str, float] = defaultdict(float)
        for (place, _), count in self.by_operation.items():
            parts[part_of(place)] += count
        return dict(sorted(parts.items(), key=lambda item: -item[1]))


# Scopes that the model names (`jax.named_scope`), by which a program's operations are told apart.
PARTS = (
    "embedding",
    "gated_delta_net",
    "gated_attention",
    "router",
    "experts",
    "shared_expert",
    "lm_head",
    "sampling",
)


def part_of(place: str) -> str:
    """The innermost part of the model that an operation comes from."""
    found = [scope for scope in place.split("/") if scope in PARTS]
    return found[-1] if found else "other"


def traffic(module: Module) -> Traffic:
    """Counts a program."""
    bytes_of: dict[tuple[str, str], float] = defaultdict(float)
    kernel_flops, unknown = 0.0, 0
    for computation, instruction, times in module.executed():
        if instruction.opcode == "while" and instruction.trips is None:
            unknown += 1
        cost = instruction.kernel_cost if instruction.opcode == "custom-call" else None
        if cost is not None:
            kernel_flops += times * cost.flops
            moved = cost.bytes
        else:
            moved = _moved(module, computation, instruction)
        if moved:
            bytes_of[instruction.op_name, instruction.opcode] += times * moved
    return Traffic(bytes_of, kernel_flops, unknown)


def _moved(module: Module, computation: str, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    names = module.by_name[computation]
    sizes = [names[name].bytes if name in names else 0 for name in instruction.operands]
    if opcode == "fusion":
        inside = instruction.called("calls")
        assert inside is not None
        return _fusion_bytes(module, inside, instruction)
    if opcode in _SLICES:
        return 2 * instruction.bytes
    if opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if opcode == "scatter":
        return 2 * sizes[-1]
    if opcode.endswith("-start"):
        # (operands, results): what it reads and what it writes
        return instruction.bytes if len(instruction.shapes) > 1 else instruction.bytes + sum(sizes)
    return instruction.bytes + sum(sizes)


def _fusion_bytes(module: Module, inside: str, fusion: Instruction) -> float:
    instructions = module.computations[inside]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in instructions:
        for operand in instruction.operands:
            users[operand].append(instruction)
    read = 0.0
    for instruction in instructions:
        if instruction.opcode == "parameter":
            read += min(instruction.bytes, _read_of(instruction, users))
    root = next(instruction for instruction in instructions if instruction.root)
    results = [root.name] if root.opcode != "tuple" else list(root.operands)
    names = module.by_name[inside]
    written = sum(_written_of(names, names[name]) for name in results if name in names)
    return read + written


def _read_of(value: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Bytes that are read of a value whose memory is outside: its slices, if it is only sliced."""
    total = 0.0
    for user in users[value.name]:
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += _elements(user.shapes) * value.bytes / max(_elements(value.shapes), 1)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == value.name:
            continue  # updated in place
        elif user.opcode in _VIEWS and _elements(user.shapes) == _elements(value.shapes):
            total += _read_of(user, users) * value.bytes / max(user.bytes, 1)
        elif user.opcode == "tuple":
            continue
        else:
            return value.bytes
    return total


def _written_of(names: Mapping[str, Instruction], result: Instruction) -> float:
    """Bytes that are written of a fusion's result: an update in place writes the update alone."""
    seen = result
    while seen.opcode in _VIEWS and seen.operands and seen.operands[0] in names:
        seen = names[seen.operands[0]]
    if seen.opcode == "dynamic-update-slice" and seen.operands[1] in names:
        return names[seen.operands[1]].bytes
    if seen.opcode == "scatter" and seen.operands[-1] in names:
        return names[seen.operands[-1]].bytes
    if result.opcode == "parameter":
        return 0
    return result.bytes


def _elements(shapes: tuple[Shape, ...]) -> int:
    total = 0
    for shape in shapes:
        count = 1
        for size in shape.dims:
            count *= size
        total += count
    return total

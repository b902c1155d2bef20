"""Bytes that a compiled program reads and writes in a device's memory, operation by operation.

Every operation that XLA leaves in the optimised program is a kernel, which reads its operands from memory and
writes its result there; a fusion keeps what is between, and computes only the elements that something asks
for. XLA's own count takes a fusion that updates a few rows of a cache in place for one that rewrites the
cache; here

- of an operand counts what the results take of it, once: of what is sliced or gathered, also after other
  arithmetic, the slices, where nothing takes the whole;
- an update in place (of a slice, or a scatter) counts what is written, and not the rest;
- a kernel of this library counts what it says of itself;
- a loop counts as often as it runs, once if the compiler does not know (so that a decode loop is one step);
- of a conditional's branches the one that moves the most counts;
- a collective counts the local reads and writes, not what goes over links.

That is what a device moves whose caches hold all that one operation reads twice, as the tiles of a matrix
product are, and nothing from one operation to the next. A sort counts as one pass.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from qwen_moe_jax.aot.hlo import COLLECTIVES, Instruction, Module

_SLICES = {"dynamic-slice", "slice", "gather"}
# What may be asked of them, they ask for all of their operands.
_WHOLE = {
    "dot",
    "scaled-dot",
    "ragged-dot",
    "convolution",
    "sort",
    "topk",
    "reduce-window",
    "select-and-scatter",
    "scatter",
    "fft",
    "cholesky",
    "triangular-solve",
    "rng-bit-generator",
    "custom-call",
    "fusion",
    "call",
    *COLLECTIVES,
}
# They ask for as large a share of their operands as is asked of them, however the sizes compare.
_SAME_SHARE = {"bitcast", "bitcast-convert", "reshape", "reduce", "concatenate", "get-tuple-element"}
# An element of the result need not come from that place of the operand, even where they have the same shape.
_MOVING = {"bitcast", "transpose", "reverse", "pad", "dynamic-update-slice", *_SLICES}
# What else says where it comes from.
_PLACES = re.compile(r"\b(?:slice|dimensions|padding)=(?:\{[^}]*\}|\S+)")

# What is asked of a value: region -> share of the value. A region is the path of slices and views that lead
# to it, so that what two users take of the same region counts once. () is all of the value.
_Regions = dict[tuple[str, ...], float]


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
    "dense_mlp",
    "lm_head",
    "sampling",
)
OTHER = "other"


def part_of(place: str) -> str:
    """The innermost part of the model that an operation comes from."""
    found = [scope for scope in place.split("/") if scope in PARTS]
    return found[-1] if found else OTHER


def traffic(module: Module) -> Traffic:
    """Counts a program."""
    bytes_of: dict[tuple[str, str], float] = defaultdict(float)
    kernel_flops, unknown = 0.0, 0

    def cost(computation: str, instruction: Instruction) -> float:
        return _moved(module, computation, instruction)

    for computation, instruction, times in module.executed(cost=cost):
        if instruction.kind == "while" and instruction.trips is None:
            unknown += 1
        for one in module.inside(instruction):
            if one.kind == "custom-call" and (said := one.kernel_cost) is not None:
                kernel_flops += times * said.flops
        if moved := cost(computation, instruction):
            place = _place(module, computation, instruction)
            bytes_of[place, instruction.opcode] += times * moved
    return Traffic(bytes_of, kernel_flops, unknown)


def _place(module: Module, computation: str, instruction: Instruction) -> str:
    """Where in the traced program it comes from.

    XLA forgets that of some fusions and copies. A fusion is then where the last of what it joins is that is
    in a part of the model, and anything else where its first operand is.
    """
    names = module.by_name[computation]
    at: Instruction | None = instruction
    while at is not None:
        if at.op_name:
            return at.op_name
        joined = [one.op_name for one in reversed(module.inside(at)) if one.op_name]
        if joined:
            return next((place for place in joined if part_of(place) != OTHER), joined[0])
        at = names.get(at.operands[0]) if at.operands else None
    return ""


def _moved(module: Module, computation: str, instruction: Instruction) -> float:
    """Bytes that one run of an instruction reads and writes."""
    if instruction.free:
        return 0
    said = instruction.kernel_cost if instruction.kind == "custom-call" else None
    if said is not None:
        return said.bytes
    names = module.by_name[computation]
    sizes = {name: names[name].bytes for name in instruction.operands}
    body = module.inside(instruction)
    if instruction.kind == "fusion":
        inputs = {
            one.name: instruction.operands[int(one.operands[0])] for one in body if one.opcode == "parameter"
        }
        names = {one.name: one for one in body}
    else:
        inputs = {name: name for name in instruction.operands}
    root = next((one for one in body if one.root), instruction)
    results = [names[name] for name in root.operands] if root.opcode == "tuple" else [root]

    updates = _updates_in_place(results, names, inputs)
    asked = _asked(module, body, names, results, updates)
    targets = {_origin(names[update.operands[0]], names).name for update in updates}
    if any(_share(asked[name]) >= 1 for name in targets):
        # something takes the whole array as it was before, and might find it changed: XLA makes another
        updates = []
        asked = _asked(module, body, names, results, updates)
    written = sum(map(_written, results)) if not updates else sum(_changed(one, names) for one in updates)
    taken: dict[str, float] = defaultdict(float)
    for name, operand in inputs.items():
        taken[operand] += _share(asked[name])
    return written + sum(min(1, share) * sizes[operand] for operand, share in taken.items())


def _asked(
    module: Module,
    body: Sequence[Instruction],
    names: Mapping[str, Instruction],
    results: Sequence[Instruction],
    updates: Sequence[Instruction],
) -> dict[str, _Regions]:
    """What a kernel's results ask for of each value of its `body`; of updated arrays, but for what stays."""
    asked: dict[str, _Regions] = defaultdict(dict)
    for update in updates:
        count = _targets(update)
        for name in update.operands[count:]:
            asked[name] = {(): 1.0}
        if update.kind == "scatter" and not _overwrites(module, update):
            for name in update.operands[:count]:
                asked[name][("combined",)] = _changed(update, names) / max(update.bytes, 1)
    if not updates:
        for result in results:
            asked[result.name] = {(): 1.0}
    for one in reversed(body):
        regions = asked[one.name]
        for position, name in enumerate(one.operands):
            operand = names.get(name)
            if operand is None:
                continue  # the number of a parameter, or a constant's text
            for region, share in regions.items():
                path = _path(one, operand, region)
                share = _passed(one, position, operand, share, names)
                asked[name][path] = max(asked[name].get(path, 0), share)
            if _share(asked[name]) >= 1:
                asked[name] = {(): 1.0}
    return asked


def _share(regions: _Regions) -> float:
    """Of a value: regions that are not the same may still overlap, so that it is the most."""
    return min(1, sum(regions.values()))


def _passed(
    user: Instruction, position: int, operand: Instruction, share: float, names: Mapping[str, Instruction]
) -> float:
    """The share of an operand that is asked for when `share` is asked of its user."""
    kind = user.kind
    if kind in _WHOLE:
        return 1
    if kind in _SAME_SHARE:
        return share
    if kind == "dynamic-update-slice" and position == 0:
        updated = names[user.operands[1]].elements / max(user.elements, 1)
        return share * (1 - updated)
    return min(1, share * user.elements / max(operand.elements, 1))


def _path(user: Instruction, operand: Instruction, region: tuple[str, ...]) -> tuple[str, ...]:
    """The region of an operand that a region of its user comes from."""
    dims = user.shapes[0].dims if user.shapes else ()
    if user.kind not in _MOVING and operand.shapes and operand.shapes[0].dims == dims:
        return region
    step = f"{user.kind}{dims}{user.operands[1:] if user.kind in _MOVING else ''}"
    return (*region, step + "".join(_PLACES.findall(user.attributes)))


def _updates_in_place(
    results: Sequence[Instruction], names: Mapping[str, Instruction], inputs: Mapping[str, str]
) -> list[Instruction]:
    """The updates that results are, if a kernel leaves everything else of its operands' memory as it is.

    XLA does so if every result is such an update, of parts of the same shape.
    """
    updates = [_origin(result, names) for result in results]
    for update in updates:
        if update.kind not in ("dynamic-update-slice", "scatter"):
            return []
        targets = [_origin(names[name], names).name for name in update.operands[: _targets(update)]]
        if any(name not in inputs for name in targets):
            return []
    parts = {names[one.operands[_targets(one)]].shapes[0].dims for one in updates}
    return updates if len(parts) == 1 else []


def _origin(value: Instruction, names: Mapping[str, Instruction]) -> Instruction:
    """What a value is before its memory was named anew."""
    while value.kind == "bitcast" and value.operands[0] in names:
        value = names[value.operands[0]]
    return value


def _targets(update: Instruction) -> int:
    """How many arrays an update changes: its first operands; a scatter's last ones are as many updates."""
    return (len(update.operands) - 1) // 2 if update.kind == "scatter" else 1


def _changed(update: Instruction, names: Mapping[str, Instruction]) -> float:
    """Bytes that an update writes."""
    if update.kind == "dynamic-update-slice":
        return names[update.operands[1]].bytes
    return min(update.bytes, sum(names[name].bytes for name in update.operands[_targets(update) + 1 :]))


def _overwrites(module: Module, scatter: Instruction) -> bool:
    """Whether it takes the update for what was there, and does not combine them."""
    root = next(one for one in module.computations[scatter.called("to_apply") or ""] if one.root)
    return root.opcode == "parameter"


def _written(result: Instruction) -> float:
    """Bytes of a result; the scratch of a library's call, its last result, is nobody's."""
    shapes = result.results
    if (result.target or "").startswith("__cub") and len(shapes) > 1 and shapes[-1].dtype in ("s8", "u8"):
        shapes = shapes[:-1]
    return sum(shape.bytes for shape in shapes)

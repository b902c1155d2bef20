"""Which slices of stored tensors a rank's slice of a parameter is made of."""

import dataclasses

from qwen_moe_jax.checkpoint.targets import Box, Copy
from qwen_moe_jax.parallel.splits import Split


@dataclasses.dataclass(frozen=True)
class SharedSlot:
    """Where the shared expert lies in a rank's stack of experts.

    Attributes:
        slot: of the rank's.
        inner: how an expert's inner rows are divided.
        hidden: the model's width.
    """

    slot: int
    inner: Split
    hidden: int

    def copies(self, stack: str, projection: str, ranks: tuple[int, ...]) -> list[Copy]:
        """Its matrices in the slot.

        Args:
            stack: name of the stacks before the projection's.
            projection: "gate_up_proj" or "down_proj".
            ranks: of the slice along each dimension of the stack.
        """
        hidden, slot = slice(0, self.hidden), slice(self.slot, self.slot + 1)
        shared = stack.removesuffix("experts") + "shared_expert."
        if projection == "down_proj":
            return [
                Copy(f"{shared}down_proj.weight", (hidden, stored), (slot, hidden, held))
                for stored, held in self.inner.spans(ranks[2])
            ]
        return [
            Copy(
                f"{shared}{part}.weight",
                (stored, hidden),
                (slot, slice(held.start + offset, held.stop + offset), hidden),
            )
            for part, offset in (("gate_proj", 0), ("up_proj", self.inner.local_size))
            for stored, held in self.inner.spans(ranks[1])
        ]


@dataclasses.dataclass(frozen=True)
class Copies:
    """What a slice of a parameter is made of.

    Attributes:
        name: canonical.
        shape: as a checkpoint has it.
        dimensions: how each is divided; None is not.
        shared: the shared expert's place in it, of a stack that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dimensions: tuple[Split | None, ...]
    shared: SharedSlot | None = None

    def __call__(self, index: Box) -> tuple[Copy, ...]:
        """Copies that fill a slice.

        Args:
            index: of the array on the whole mesh.
        """
        ranks = tuple(
            0 if split is None else s.start // split.local_size
            for s, split in zip(index, self.dimensions, strict=True)
        )
        boxes: list[tuple[Box, Box]] = [((), ())]
        for rank, split, size in zip(ranks, self.dimensions, self.shape, strict=True):
            spans = [(slice(0, size), slice(0, size))] if split is None else list(split.spans(rank))
            boxes = [((*a, stored), (*b, held)) for a, b in boxes for stored, held in spans]
        copies = [Copy(self.name, stored, held) for stored, held in boxes]
        if self.shared is not None:
            stack, projection = self.name.rsplit(".", 1)
            copies += self.shared.copies(stack, projection, ranks)
        return tuple(copies)

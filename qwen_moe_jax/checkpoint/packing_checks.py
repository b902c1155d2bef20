"""Tensors of quantised checkpoints that say again what is known otherwise: read, and compared."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qwen_moe_jax.checkpoint.read_box import OpenFiles, read_whole
from qwen_moe_jax.checkpoint.safetensors_files import StoredTensor, abbreviate
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.formats.codes import CODES
from qwen_moe_jax.schemes.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Check:
    """What a tensor is to hold.

    Attributes:
        tensor: that is compared.
        kind: "shape" of the matrix, "order" of its columns' groups, or "zeros" of a symmetric one.
        shape: of the matrix [..., rows, columns].
        scheme: of its codes.
    """

    tensor: StoredTensor
    kind: str
    shape: tuple[int, ...]
    scheme: Scheme

    def problem(self, values: np.ndarray) -> str | None:
        """What is wrong with the tensor's values, or None."""
        if self.kind == "shape":
            if values.tolist() != list(self.shape):
                return f"{self.tensor.key} says {values.tolist()} of a matrix of {list(self.shape)}"
        elif self.kind == "order":
            columns = np.arange(self.shape[-1])
            if not np.array_equal(values, columns // (self.scheme.group[1] or self.shape[-1])):
                return (
                    f"{self.tensor.key} puts columns out of their order (desc_act), which is not "
                    "implemented; quantise without it"
                )
        else:
            zero = CODES[self.scheme.codes].zero or 0
            bits = CODES[self.scheme.codes].bits
            found = np.unique(values.view(np.uint8) if bits == 8 else _nibbles(values))
            # version 1 of GPTQ stores one less; checkpoints that name it and store the zero point exist
            if len(found) != 1 or int(found[0]) not in (zero - 1, zero):
                return (
                    f"{self.tensor.key} holds zero points {found[:5].tolist()} of a symmetric matrix, where "
                    f"{zero - 1} or {zero} is expected; say sym: false in config.json if it is not symmetric"
                )
        return None


def kind_of(ending: str) -> str:
    """Of the check of a tensor of this name."""
    return {"weight_shape": "shape", "qzeros": "zeros"}.get(ending, "order")


def check_packing(folder: str | Path, checks: Iterable[Check]) -> None:
    """Reads the tensors and compares them.

    Raises:
        CheckpointError: some do not say what they should; all are named.
    """
    problems = []
    with OpenFiles() as files:
        for check in checks:
            problem = check.problem(read_whole(check.tensor, files))
            if problem is not None:
                problems.append(problem)
    if problems:
        raise CheckpointError(f"{folder} cannot be read: {abbreviate(problems, 3)}.")


def _nibbles(values: np.ndarray) -> np.ndarray:
    raw = values.view(np.uint8)
    return np.concatenate([np.unique(raw & 15), np.unique(raw >> 4)])

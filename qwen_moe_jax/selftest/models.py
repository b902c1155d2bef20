"""The checkpoint under test, one loaded model at a time."""

import gc
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.checkpoint.layout import parameter_forms, parameter_shapes, stored_dtype
from qwen_moe_jax.checkpoint.stored_config import read_config
from qwen_moe_jax.kernels.table import AMD, make_kernels
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.selftest.expectations import Expectations, find_expectations
from qwen_moe_jax.selftest.machine import memory_limit
from qwen_moe_jax.selftest.report import Skip

if TYPE_CHECKING:
    from qwen_moe_jax.generation.api import QwenMoe

TABLE, PLAIN = "table", "plain"

# Of a checkpoint that nothing is known of: random tokens, rows of different lengths.
_RANDOM_LENGTHS = (5, 9, 16, 17, 23, 31, 40, 48)
_RANDOM_NEW_TOKENS = 32
# Of the memory for JAX, what weights may take: programs and caches need some.
_FOR_WEIGHTS = 0.9


class Models:
    """Loads the checkpoint in a dtype with one choice of kernels, and lets go of it for the next.

    Attributes:
        folder: of the checkpoint.
        config: read from it.
        target: what programs are compiled for.
        expectations: stored of this checkpoint, or None.
        why_none: why there are none, in a sentence.
        prompts: rows of token ids.
        new_tokens: most that follow a prompt.
    """

    def __init__(self, folder: Path, target: str):
        self.folder = folder
        self.config = read_config(folder)
        self.target = target
        self.expectations: Expectations | None
        self.expectations, self.why_none = find_expectations(folder)
        if self.expectations is not None:
            self.prompts = [list(row.prompt) for row in self.expectations.rows]
            self.new_tokens = max(len(row.tokens) for row in self.expectations.rows)
        else:
            rng = np.random.default_rng(0)
            vocabulary = self.config.vocab_size
            self.prompts = [rng.integers(0, vocabulary, n).tolist() for n in _RANDOM_LENGTHS]
            self.new_tokens = _RANDOM_NEW_TOKENS
        self._held: tuple[tuple[str, str], QwenMoe] | None = None

    @property
    def plain(self) -> str | dict[str, str]:
        """Kernels of plain XLA that are other programs than the table's: where the table has plain XLA only,
        every expert on every token."""
        kernels = make_kernels(self.target)
        return "xla" if self.target in AMD or kernels.native else {"experts": "dense"}

    def load(self, dtype: str, which: str) -> "QwenMoe":
        """The model.

        Args:
            dtype: "float32" or "bfloat16".
            which: `TABLE` for what the table picks, or `PLAIN`.

        Raises:
            Skip: it does not fit into the device's memory.
            QwenMoeError: as of `QwenMoe.from_pretrained`.
        """
        from qwen_moe_jax.generation.api import QwenMoe

        if self._held is None or self._held[0] != (dtype, which):
            self.free()
            self._check_memory(dtype)
            kernels = "auto" if which == TABLE else self.plain
            model = QwenMoe.from_pretrained(self.folder, dtype=jnp.dtype(dtype), kernels=kernels)
            self._held = (dtype, which), model
        return self._held[1]

    def free(self) -> None:
        """Lets go of the model."""
        self._held = None
        gc.collect()

    def _check_memory(self, dtype: str) -> None:
        limit = memory_limit(jax.local_devices()[0])
        matrix = np.dtype(held_dtype(jnp.dtype(dtype), make_kernels(self.target)))
        forms = parameter_forms(self.config)
        wanted = sum(
            prod(shape) * stored_dtype(name, forms, matrix).itemsize
            for name, shape in parameter_shapes(self.config).items()
        )
        if limit is not None and wanted > _FOR_WEIGHTS * limit:
            raise Skip(
                f"weights of {wanted / 1e9:.0f} GB in {dtype} do not fit into the {limit / 1e9:.0f} GB that "
                "JAX has on one device"
            )

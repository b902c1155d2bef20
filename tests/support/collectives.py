"""The collectives of compiled programs, counted in the optimised HLO."""

import re
from collections import Counter
from typing import Any

import jax
import numpy as np

from qwen_moe_jax import QwenMoe

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" = (\(?[a-z0-9]+\[.*?) ({_KINDS})(?:-start)?\(")


def collectives(compiled: Any) -> tuple[Counter[str], list[tuple[int, ...]]]:
    """(operation -> how many, the shapes that all-gathers produce)."""
    counts: Counter[str] = Counter()
    gathered = []
    for shape, operation in _COLLECTIVE.findall(compiled.as_text()):
        counts[operation] += 1
        if operation == "all-gather":
            gathered += [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", shape)]
    return counts, gathered


def programs(model: QwenMoe, batch: int) -> dict[str, Any]:
    """The compiled forward of a prefill chunk and of one token."""
    forward = model.sequence_logits.forward
    batch = model.sequence_logits.padded(batch)
    cache = forward.new_cache(batch, 64)
    hidden = jax.jit(forward.hidden)
    found = {}
    for name, tokens in (("prefill", 16), ("decode", 1)):
        arrays = np.zeros((batch, tokens), np.int32), np.ones((batch, tokens), bool)
        found[name] = hidden.lower(forward.parameters, *arrays, cache).compile()
    return found

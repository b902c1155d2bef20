"""The logit lens: what the output matrix would say of the residual stream behind each layer (nostalgebraist,
"interpreting GPT: the logit lens", 2020)."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.errors import InputError
from qwen_moe_jax.experiments.arrays import LabelledArray
from qwen_moe_jax.experiments.runs import Run
from qwen_moe_jax.model.decoder import Decoder

# Positions whose logits are in memory at once.
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Lens:
    """What each layer would say next.

    Attributes:
        layers: whose outputs were captured, in order.
        ids: most likely token, (layer, position).
        probabilities: of that token, (layer, position).
        logprobs: of the token that the whole model finds most likely, (layer, position).
    """

    layers: list[int]
    ids: LabelledArray
    probabilities: LabelledArray
    logprobs: LabelledArray


def logit_lens(decoder: Decoder, run: Run, row: int = 0) -> Lens:
    """The lens over a run that captured "layers.*.residual_out".

    Args:
        decoder: of the model, with its parameters.
        run: of the model.
        row: of the run.

    Raises:
        InputError: no layer's output was captured.
    """
    found = {
        int(name.split(".")[1]): value.array[row]
        for name, value in run.captured.items()
        if isinstance(value, LabelledArray) and re.fullmatch(r"layers\.\d+\.residual_out", name)
    }
    if not found:
        raise InputError('the lens needs the layers\' outputs: run with capture="layers.*.residual_out".')
    length = len(run.tokens[row])
    final = jnp.asarray(run.logits.array[row, :length].argmax(axis=-1))

    @jax.jit
    def said(stream: jax.Array, final: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        every = jax.nn.log_softmax(decoder.logits(decoder.finish(stream)), axis=-1)
        ids = every.argmax(axis=-1)
        return (
            ids,
            jnp.exp(jnp.take_along_axis(every, ids[..., None], -1)[..., 0]),
            jnp.take_along_axis(every, final[..., None], -1)[..., 0],
        )

    rows: list[list[np.ndarray]] = []
    for stream in found.values():
        parts = [
            said(jnp.asarray(stream[first : min(first + _BLOCK, length)]), final[first : first + _BLOCK])
            for first in range(0, length, _BLOCK)
        ]
        rows.append([np.concatenate([np.asarray(p[i]) for p in parts]) for i in range(3)])
    labels = {"layer": list(found), "position": list(run.logits.labels.get("position", range(length)))}
    ids, probabilities, logprobs = (
        LabelledArray(name, np.stack([row[i] for row in rows]), ("layer", "position"), labels)
        for i, name in enumerate(("lens.ids", "lens.probabilities", "lens.logprobs"))
    )
    return Lens(list(found), ids, probabilities, logprobs)

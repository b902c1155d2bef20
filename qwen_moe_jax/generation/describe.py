"""A loaded model in words."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from qwen_moe_jax.checkpoint.inspect import CheckpointSummary, inspect_checkpoint
from qwen_moe_jax.checkpoint.layout import count_parameters, formats_in_words
from qwen_moe_jax.checkpoint.parts import mtp_forms, mtp_shapes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.devices import find_device
from qwen_moe_jax.kernels.table import Kernels
from qwen_moe_jax.model.linear import held_dtype
from qwen_moe_jax.model.params import DtypePolicy
from qwen_moe_jax.parallel.layout import NO_SHARED_EXPERT, Layout
from qwen_moe_jax.parallel.memory import DeviceMemory, holding, layout_memory
from qwen_moe_jax.parallel.mesh import abstract_mesh


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class ModelDescription:
    """What `QwenMoe.describe()` gives; `str()`, and so a notebook's display, is the report.

    Attributes:
        checkpoint: it was loaded from.
        kernels: what it is compiled for, and which implementations run.
        compute: the dtype it computes in.
        held: the dtype matrices, keys and values are held in.
        memory: of one device.
        draft_tokens: that multi-token prediction drafts at most for a step; 0 where it does not.
    """

    checkpoint: CheckpointSummary
    kernels: Kernels
    compute: str
    held: str
    memory: DeviceMemory
    draft_tokens: int = 0

    def __str__(self) -> str:
        return "\n".join(
            [
                *self.checkpoint.architecture_lines(),
                *self.checkpoint.parameter_lines(),
                f"on {self.kernels.target:<16}computes in {self.compute}; "
                f"matrices, keys and values held in {self.held}",
                *self.kernels.lines(self.compute),
                *self._drafts(),
                str(self.memory),
            ]
        )

    def _drafts(self) -> list[str]:
        if not self.draft_tokens:
            return []
        config = self.checkpoint.config
        count = count_parameters(mtp_shapes(config, 1), mtp_forms(config, 1))
        return [
            f"drafts             {self.draft_tokens} tokens a step at most, by multi-token prediction of "
            f"{count:,} parameters"
        ]

    def __repr__(self) -> str:
        return str(self)


def describe_model(
    folder: Path,
    config: ModelConfig,
    compute: jnp.dtype,
    layout: Layout | None,
    kernels: Kernels,
    *,
    context: int | None = None,
    device: str | None = None,
    draft_tokens: int = 0,
) -> ModelDescription:
    """Describes a model as loaded: nothing is measured, its sizes follow from configuration and layout.

    Arguments as of `QwenMoe.describe`; layout None means one device.
    """
    found = None if device is None else find_device(device)
    summary = inspect_checkpoint(folder, context=context)
    mode = "outside" if config.shared_expert_intermediate_size else NO_SHARED_EXPERT
    layout = layout or Layout(config, abstract_mesh(1, 1, 1), shared_expert=mode)
    policy = DtypePolicy(compute=compute, matrix=held_dtype(compute, kernels))
    held = policy.matrix.name
    if words := formats_in_words(config):
        held = f"{words} (layers) and {held}"
    return ModelDescription(
        checkpoint=summary,
        kernels=kernels,
        compute=compute.name,
        held=held,
        memory=layout_memory(
            layout,
            {held: holding(layout, policy, drafter=bool(draft_tokens))},
            summary.context,
            found,
        ),
        draft_tokens=draft_tokens,
    )

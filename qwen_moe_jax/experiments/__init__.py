"""Looking inside a model, changing what happens there, and scoring texts."""

from qwen_moe_jax.experiments.arrays import LabelledArray, RouterCapture
from qwen_moe_jax.experiments.edits import ablate_experts, add, force_experts, patch, scale
from qwen_moe_jax.experiments.runs import Run

__all__ = [
    "LabelledArray",
    "RouterCapture",
    "Run",
    "ablate_experts",
    "add",
    "force_experts",
    "patch",
    "scale",
]

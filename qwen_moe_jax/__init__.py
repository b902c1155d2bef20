"""Qwen3.5 MoE inference in JAX."""

from qwen_moe_jax.generation.api import QwenMoe
from qwen_moe_jax.generation.options import GenerationConfig

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "QwenMoe", "__version__"]

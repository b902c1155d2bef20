"""Qwen3.5 MoE inference in JAX."""

from qwen_moe_jax.generation.api import QwenMoe
from qwen_moe_jax.generation.options import GenerationConfig
from qwen_moe_jax.parallel.mesh import make_mesh

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "QwenMoe", "__version__", "make_mesh"]

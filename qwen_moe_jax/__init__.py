"""Qwen3.5 MoE inference in JAX."""

import gc

# Imports make a million objects that stay; looking for garbage among them, again and again, is a sixth of
# their time.
_collects = gc.isenabled()
gc.disable()
try:
    from qwen_moe_jax.generation.api import QwenMoe
    from qwen_moe_jax.generation.options import GenerationConfig
    from qwen_moe_jax.parallel.mesh import make_mesh
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "QwenMoe", "__version__", "make_mesh"]

"""What is nearer to the reference on an FP8 checkpoint: activations in bfloat16, or quantised ones.

    python benchmarks/activations.py [--problems 300]

On GPUs transformers quantises every activation that meets an FP8 matrix to e4m3, by token and block of 128
(`finegrained_fp8_linear`, and the same for experts); its kernels do not run on a CPU. Here the reference is
transformers in bfloat16 with such products written out: quantised activations times multiplied-out matrices,
summed in float32. This library multiplies codes by bfloat16 activations; asked to
(`kernels={"scaled": "pallas_float8x8"}`), it quantises those of single products, not those of experts.

Mean KL over the tokens of worked word problems, of the trained checkpoint in FP8: from that reference,
and from the checkpoint before it was written in FP8, computed in float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen3_5MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.divergence import mean_kl  # noqa: E402
from support.float8 import is_block_scaled, write_multiplied_out  # noqa: E402
from support.problems import CHECKPOINT, teacher_forced  # noqa: E402
from support.reference import reference_logits  # noqa: E402

from qwen_moe_jax import QwenMoe  # noqa: E402
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint  # noqa: E402
from qwen_moe_jax.config import ModelConfig  # noqa: E402
from qwen_moe_jax.engine.logits import SequenceLogits  # noqa: E402
from qwen_moe_jax.evaluation.word_problems import held_out  # noqa: E402
from qwen_moe_jax.generation.loading import load_forward  # noqa: E402
from qwen_moe_jax.kernels.table import PLAIN, make_kernels  # noqa: E402

BLOCK, LARGEST = 128, 448.0


def quantised(x: torch.Tensor) -> torch.Tensor:
    """The numbers that e4m3 codes and scales of each block of the last dimension stand for, in float32."""
    blocks = functional.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-12)
    numbers = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
    return numbers.flatten(-2)[..., : x.shape[-1]]


def reference(plain: Path, rows: np.ndarray, dtype: torch.dtype, *, quantise: bool) -> np.ndarray:
    """Logits by transformers. Matrices that are FP8 in the checkpoint stay in float32, as its kernels have
    them; what they give is rounded to the dtype."""
    model: Any = Qwen3_5MoeForCausalLM.from_pretrained(
        plain, dtype=torch.float32, experts_implementation="eager"
    )
    coded = set()
    for name, parameter in model.named_parameters():
        if is_block_scaled(name.removeprefix("model.")):
            coded.add(parameter.untyped_storage().data_ptr())
        elif parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    plain_linear = functional.linear
    met = 0

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal met
        if weight.untyped_storage().data_ptr() not in coded:
            return plain_linear(x, weight, bias)
        met += 1
        return plain_linear(quantised(x) if quantise else x.float(), weight, bias).to(x.dtype)

    with mock.patch.object(functional, "linear", linear):
        logits = reference_logits(model.eval(), rows)
    assert met, "no product met a matrix that is FP8 in the checkpoint"
    return logits


def quantising(folder: Path, rows: np.ndarray) -> np.ndarray:
    """This library's logits with the kernel that quantises, interpreted."""
    kernels = make_kernels("gfx950", PLAIN | {"scaled": "pallas_float8x8"}, interpret=True)
    config = ModelConfig.from_file(folder)
    loaded = load_forward(folder, config, jnp.dtype(jnp.bfloat16), kernels, False)
    run = SequenceLogits(loaded.forward)
    cache = run.new_cache(*rows.shape)
    return np.asarray(run(rows.astype(np.int32), np.ones(rows.shape, bool), cache)[0])


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=300)
    args = parser.parse_args()
    rows = teacher_forced(CHECKPOINT, held_out(args.problems, seed=4))
    with tempfile.TemporaryDirectory() as temporary:
        float8, plain = Path(temporary) / "float8", Path(temporary) / "plain"
        quantize_checkpoint(CHECKPOINT, float8)
        write_multiplied_out(float8, plain)
        exact = np.asarray(QwenMoe.from_pretrained(CHECKPOINT, dtype=jnp.float32).logits(rows))
        wanted = reference(plain, rows, torch.bfloat16, quantise=True)
        found = {
            "the reference": wanted,
            "the reference, the rest in float32": reference(plain, rows, torch.float32, quantise=True),
            "transformers, activations in bfloat16": reference(plain, rows, torch.bfloat16, quantise=False),
            "this library, activations in bfloat16": np.asarray(
                QwenMoe.from_pretrained(float8, dtype=jnp.bfloat16).logits(rows)
            ),
            "this library, activations of single products quantised": quantising(float8, rows),
        }
    print(f"{rows.size} positions\n")
    print("| | KL from the reference | KL from the float32 checkpoint | most likely token as the reference |")
    print("|---|---|---|---|")
    for name, logits in found.items():
        same = (logits.argmax(-1) == wanted.argmax(-1)).mean()
        print(f"| {name} | {mean_kl(wanted, logits):.2e} | {mean_kl(exact, logits):.2e} | {same:.2%} |")


if __name__ == "__main__":
    main()

"""What FP8 with block scales costs in accuracy and saves in memory.

    python benchmarks/float8.py CHECKPOINT [--tokens 2048]

Quantises a float checkpoint into a temporary folder and compares next-token distributions on texts that the
checkpoint's own model wrote (sampled at temperature 1 from random first tokens): KL divergence in nats, mean
and largest over positions, and how often the most likely token is the same. Beside it what computing in
bfloat16 alone does.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax import QwenMoe
from qwen_moe_jax.checkpoint.quantize import quantize_checkpoint
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.parallel.memory import device_memory

LENGTH = 128


def compared(truth: np.ndarray, other: np.ndarray) -> str:
    """KL(truth || other) and agreement of the most likely token, as cells of a table."""
    p, q = (jax.nn.log_softmax(jnp.asarray(x), axis=-1) for x in (truth, other))
    kl = np.asarray((jnp.exp(p) * (p - q)).sum(axis=-1))
    same = (truth.argmax(-1) == other.argmax(-1)).mean()
    return f"{kl.mean():.2e} | {kl.max():.2e} | {same:.2%}"


def main() -> int:
    """Prints two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        float8 = Path(temporary) / "float8"
        report = quantize_checkpoint(args.folder, float8)
        exact = QwenMoe.from_pretrained(args.folder, dtype=jnp.float32)
        rows = -(-args.tokens // LENGTH)
        first = np.random.default_rng(0).integers(0, exact.config.vocab_size, (rows, 1))
        texts = exact.generate(
            first, max_new_tokens=LENGTH - 1, do_sample=True, temperature=1.0, seed=0, eos_token_id=[]
        ).sequences
        ids = np.concatenate([first, np.asarray(texts)], axis=1)
        truth = np.asarray(exact.logits(ids))
        print(f"{ids.size} positions; files {report.written_bytes / report.source_bytes:.3f} of the source\n")
        print("| against the checkpoint in float32 | KL mean | KL largest | same most likely token |")
        print("|---|---|---|---|")
        for name, folder, dtype in (
            ("bfloat16", args.folder, jnp.bfloat16),
            ("FP8, computed in float32", float8, jnp.float32),
            ("FP8, computed in bfloat16", float8, jnp.bfloat16),
        ):
            found = np.asarray(QwenMoe.from_pretrained(folder, dtype=dtype).logits(ids))
            print(f"| {name} | {compared(truth, found)} |")
        sizes = []
        for folder in (float8, args.folder):
            config = ModelConfig.from_file(folder)
            holdings = device_memory(config, (1, 1, 1), 4096).holdings
            name = next(key for key in holdings if "bfloat16" in key)
            sizes.append(sum(holdings[name].weights.values()))
        print(f"\nweights in memory, FP8 over bfloat16: {sizes[0] / sizes[1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

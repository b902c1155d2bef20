"""What sums over ranks that travel in bfloat16 cost in accuracy, on devices that one CPU pretends to have.

    python benchmarks/sums.py [DIR] [--texts 32]

Logits of a checkpoint in bfloat16, on one device and on meshes whose sums travel in float32 and in bfloat16,
against its logits in float32: the mean Kullback-Leibler divergence a token, and how often the likeliest token
is the same. A CPU adds up what arrives in float32, where a GPU's library may round between two ranks.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

MESHES = ((1, 8, 1), (1, 2, 4), (1, 1, 8))


def divergence(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """(mean KL a token, share of tokens with the same likeliest next one)."""
    logs = [np.asarray(jax.nn.log_softmax(x.astype(np.float64), axis=-1)) for x in (truth, found)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return float(kl.mean()), float((truth.argmax(-1) == found.argmax(-1)).mean())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("checkpoints/abacus"))
    parser.add_argument("--texts", type=int, default=32)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    from qwen_moe_jax import QwenMoe, make_mesh
    from qwen_moe_jax.evaluation.word_problems import held_out

    exact = QwenMoe.from_pretrained(args.checkpoint, dtype="float32")
    problems = held_out(args.texts, seed=0)
    texts = [f"{p.question} {p.solution}" for p in problems]
    rows = [exact.tokenizer.encode(text)[:64] for text in texts]
    length = min(map(len, rows))
    ids = np.asarray([row[:length] for row in rows])
    truth = np.asarray(exact.logits(ids))
    print(f"{ids.size} tokens")
    print("| mesh | sums | KL mean | same likeliest token |\n|---|---|---|---|")
    for sizes in (None, *MESHES):
        for sums in ("float32", "compute") if sizes else ("-",):
            options = {"mesh": make_mesh(*sizes), "shared_expert": "sharded", "sums": sums} if sizes else {}
            model = QwenMoe.from_pretrained(args.checkpoint, dtype="bfloat16", **options)
            kl, same = divergence(truth, np.asarray(model.logits(ids)))
            print(f"| {sizes or 'one device'} | {sums} | {kl:.2e} | {same:.2%} |", flush=True)


if __name__ == "__main__":
    main()

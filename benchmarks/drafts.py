"""Decoding with drafts that hold at stated rates, over decoding without, on a CPU.

    python benchmarks/make_checkpoint.py mid DIR --mtp
    python benchmarks/drafts.py DIR [--batch 1 8] [--drafts 1 2 3 4] [--rates 0.9 0.8 0.7 0.6] [--out NAME]

The drafter of a random model says nothing that holds. So its cost is left as it is, and what it says is
replaced: by the text that the model gives without drafts, which is known beforehand, at the stated rates (of
the first draft, the second given the first, ...), else by another token. In bfloat16 a random model's text
depends on the order of sums, so it is held to the known one: what a pass gives is then what the rates say.
With "--free" the drafter is not run at all.
Rates of 0 show what failing drafts cost, with the rule that lets rows rest; "--always" drafts on
nevertheless. Both sides run in turns.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CONTEXT = 64  # tokens of a prompt


class Replayed:
    """What drafts say: a known text, or not."""

    def __init__(self, texts: list[list[int]], rates: list[float], vocab: int, *, free: bool, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.known = jnp.asarray(np.asarray([text + [0] * 16 for text in texts], np.int32))
        shape = (len(rates), *self.known.shape)
        self.holds = jnp.asarray(rng.random(shape) < np.asarray(rates)[:, None, None])
        self.vocab, self.free = vocab, free

    def __call__(self, number: Any, logits: Any, drafts: Any, rows: Any, roster: Any, seen: Any) -> Any:
        """Stands for `decoding.drawn`."""
        place = jnp.minimum(rows.emitted + number, self.known.shape[1] - 1)
        slot = jnp.minimum(roster.slots, self.known.shape[0] - 1)
        right = self.known[slot, place]
        token = jnp.where(self.holds[number, slot, place], right, (right + 1) % self.vocab)
        if not self.free:  # nobody is to leave the logits out
            said = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            token = jnp.where(logits[:, 0, 0] > 1e30, said, token)
        return jax.lax.dynamic_update_slice_in_dim(drafts, token[:, None], number, axis=1), token[:, None]


def held_to(replayed: Replayed, choose: Any) -> Any:
    """`row_updates._choose` with the known text as the most likely one."""

    def chosen(logits: Any, rows: Any, given: Any, seen: Any, said: Any, alive: Any, allowed: Any) -> Any:
        place = jnp.minimum(rows.emitted, replayed.known.shape[1] - 1)
        slot = jnp.minimum(given.roster.slots, replayed.known.shape[0] - 1)
        right = jax.nn.one_hot(replayed.known[slot, place], logits.shape[-1], dtype=logits.dtype)
        return choose(logits + 1e4 * right, rows, given, seen, said, alive, allowed)

    return chosen


def load(folder: Path, drafts: int) -> Any:
    """The model in bfloat16."""
    from qwen_moe_jax import QwenMoe

    return QwenMoe.from_pretrained(folder, dtype="bfloat16", draft_tokens=drafts)


def texts_of(engine: Any, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, Any]:
    """(texts, decode seconds, stats) of prompts together; each takes the slot of its number."""
    begin = engine.stats()
    requests = [engine.submit(p, max_new_tokens=new, eos_token_id=[]) for p in prompts]
    found = [request.result() for request in requests]
    start = max(request.first_token for request in requests)
    seconds = max(request.ended for request in requests) - start
    after = engine.stats()
    counts = after.drafted_tokens - begin.drafted_tokens, after.accepted_tokens - begin.accepted_tokens
    return [out.sequences[0] for out in found], seconds, counts


def main() -> None:
    """Prints and writes what the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--new", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--free", action="store_true", help="leave the drafter's own cost out")
    parser.add_argument("--always", action="store_true", help="rows never rest")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from qwen_moe_jax.engine import decoding, row_updates
    from qwen_moe_jax.host import processor_says

    if args.always:
        decoding.draft_cost = lambda kernels: 0.0
    plain, choose = load(args.folder, 0), row_updates._choose
    found: dict[str, Any] = {
        "processor": processor_says("model name"),
        "kernels": plain.kernels.native,
        "cores": os.cpu_count(),
        "rates": args.rates,
        "rows": [],
    }
    rng = np.random.default_rng(0)
    print(f"{found['processor']}, {found['kernels']}, rates {args.rates}")
    print("batch drafts  tokens/s without  with  ratio  tokens a pass  equal texts")
    for batch in args.batch:
        prompts = [rng.integers(3, plain.config.vocab_size, CONTEXT).tolist() for _ in range(batch)]
        with plain.engine(max_rows=batch, prefix_cache=False) as base:
            row_updates._choose = choose
            known, _, _ = texts_of(base, prompts, args.new)
            for drafts in args.drafts:
                replayed = Replayed(known, args.rates[:drafts], plain.config.vocab_size, free=args.free)
                decoding.drawn, row_updates._choose = replayed, held_to(replayed, choose)
                drafting = load(args.folder, drafts)
                if args.free:
                    forward = drafting._steps.forward
                    forward.draft = lambda params, hidden, following, valid, cache: (hidden, cache)
                with drafting.engine(max_rows=batch, prefix_cache=False) as engine:
                    texts_of(engine, prompts, args.new)  # compiles
                    without, with_drafts = [], []
                    for _ in range(args.rounds):
                        without.append(texts_of(base, prompts, args.new)[1])
                        texts, seconds, (drafted, accepted) = texts_of(engine, prompts, args.new)
                        with_drafts.append(seconds)
                total = batch * (args.new - 1)
                row = {
                    "batch": batch,
                    "drafts": drafts,
                    "without": total / statistics.median(without),
                    "with": total / statistics.median(with_drafts),
                    "ratio": statistics.median(without) / statistics.median(with_drafts),
                    "tokens a pass": total / max(1, total - accepted),
                    "accepted": accepted / max(1, drafted),
                    "equal": sum(a == b for a, b in zip(texts, known, strict=True)),
                }
                found["rows"].append(row)
                print(
                    f"{batch:5} {drafts:6} {row['without']:16.1f} {row['with']:7.1f} {row['ratio']:6.2f} "
                    f"{row['tokens a pass']:10.2f} {row['equal']:8} of {batch}",
                    flush=True,
                )
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")

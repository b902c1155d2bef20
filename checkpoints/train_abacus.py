"""Trains the small checkpoint of this repository with the PyTorch reference.

    python checkpoints/train_abacus.py --out checkpoints/abacus

Grade-school word problems (`qwen_moe_jax.evaluation.word_problems`), answered with the steps written
out. The model is transformers' own `Qwen3_5MoeForCausalLM`, saved with `save_pretrained` in bfloat16.
"""

import argparse
import csv
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from abacus_tokenizer import END_OF_TEXT, END_OF_TURN, START_OF_TURN, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qwen_moe_jax.evaluation.word_problems import Problem, held_out, training_problems

MAX_POSITIONS = 4096
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
POOL = 20  # batches that are sorted by length together
DRILL_SHARE = 0.4  # of the training examples
DRILL_TOKENS = 55  # at least; so that a drill is about as long as a problem
IGNORED = -100  # label of a token on which no loss is taken
EMPTY_THOUGHT_SHARE = 0.25  # of the training examples, so that enable_thinking=False works as well


def model_config(tokenizer: Tokenizer, layers: int, hidden: int) -> Qwen3_5MoeTextConfig:
    """The architecture of the large models, in small."""
    return Qwen3_5MoeTextConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,
        eos_token_id=tokenizer.token_to_id(END_OF_TURN),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


Example = tuple[list[int], list[int]]  # token ids, and labels: the same ids, IGNORED where no loss is taken


def encode(tokenizer: Tokenizer, problem: Problem, empty_thought: bool) -> Example:
    """A chat whose answer is to be learned."""
    prompt = f"{START_OF_TURN}user\n{problem.question}{END_OF_TURN}\n{START_OF_TURN}assistant\n"
    prompt += EMPTY_THOUGHT if empty_thought else ""
    ids = tokenizer.encode(prompt).ids
    answer = tokenizer.encode(problem.solution + END_OF_TURN).ids
    return ids + answer, [IGNORED] * len(ids) + answer


def encode_drill(tokenizer: Tokenizer, problems: Iterator[Problem]) -> Example:
    """Equations of several problems in a row, whose results are to be learned.

    A problem's text is understood long before its sums are right; drills show more sums a step.
    """
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < DRILL_TOKENS:
        for equation in next(problems).solution.split(". ")[:-1]:
            left, result = equation.split(" = ")
            asked = tokenizer.encode(f" {left} =").ids
            told = tokenizer.encode(f" {result}.").ids
            ids += asked + told
            labels += [IGNORED] * len(asked) + told
    return ids, labels


def batch_stream(
    tokenizer: Tokenizer, options: argparse.Namespace, coin: random.Random
) -> Iterator[list[Example]]:
    """Batches of problems of about equal length, in random order: few pads, so shorter steps."""
    problems = training_problems(options.seed)
    while True:
        pool = [
            encode_drill(tokenizer, problems)
            if coin.random() < DRILL_SHARE
            else encode(tokenizer, next(problems), coin.random() < EMPTY_THOUGHT_SHARE)
            for _ in range(options.batch * POOL)
        ]
        pool.sort(key=lambda encoded: len(encoded[0]))
        batches = [pool[start : start + options.batch] for start in range(0, len(pool), options.batch)]
        coin.shuffle(batches)
        yield from batches


def make_batch(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels)."""
    width = max(len(ids) for ids, _ in examples)
    batch_ids = torch.full((len(examples), width), pad)
    batch_labels = torch.full((len(examples), width), IGNORED)
    for row, (ids, labels) in enumerate(examples):
        batch_ids[row, : len(ids)] = torch.tensor(ids)
        batch_labels[row, : len(ids)] = torch.tensor(labels)
    return batch_ids, batch_labels


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def exact_match(model: Qwen3_5MoeForCausalLM, encoded: list[Example], pad: int) -> float:
    """Share of answers whose every token is the most likely one: exactly what greedy decoding gives."""
    model.eval()
    right = 0
    for start in range(0, len(encoded), 100):
        ids, labels = make_batch(encoded[start : start + 100], pad)
        guess = model(ids).logits[:, :-1].argmax(-1)
        right += int(((guess == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(-1).sum())
    model.train()
    return right / len(encoded)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to 1 % of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def plot_curve(log: Path, picture: Path) -> None:
    """Draws training_log.csv: loss, and held-out accuracy on seen and unseen templates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.semilogy(steps, [float(row["loss"]) for row in rows])
    left.set(xlabel="step", ylabel="cross-entropy of answer tokens", title="Training loss")
    for column, label in (("held_out", "seen templates, new numbers"), ("unseen", "unseen templates")):
        right.plot(steps, [100 * float(row[column]) for row in rows], label=label)
    right.set(xlabel="step", ylabel="whole answers right, %", title="Held-out accuracy", ylim=(0, 100))
    right.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


def train(options: argparse.Namespace) -> None:
    """Trains, logs every `--log-every` steps, and saves at the end (and a snapshot at each log line)."""
    started = time.time()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.vocab, options.seed)
    save_tokenizer(tokenizer, out, MAX_POSITIONS)
    pad = tokenizer.token_to_id(END_OF_TEXT)
    config = model_config(tokenizer, options.layers, options.hidden)
    model = Qwen3_5MoeForCausalLM(config).train()
    model.set_experts_implementation(options.experts)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {config.vocab_size}"
    )

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    coin = random.Random(options.seed)
    batches = batch_stream(tokenizer, options, coin)
    tests = {
        "held_out": [encode(tokenizer, p, False) for p in held_out(200, options.seed)],
        "unseen": [encode(tokenizer, p, False) for p in held_out(100, options.seed, unseen_templates=True)],
    }
    log = out / "training_log.csv"
    log.write_text("step,loss,held_out,unseen,minutes\n", encoding="utf-8")
    losses: list[float] = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        ids, labels = make_batch(next(batches), pad)
        # Pads stand behind the tokens and attention is causal, so no mask is needed.
        loss = answer_loss(model(ids).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            scores = {name: exact_match(model, encoded, pad) for name, encoded in tests.items()}
            row = [step + 1, f"{sum(losses) / len(losses):.5f}", *scores.values()]
            row.append(f"{(time.time() - started) / 60:.1f}")
            with log.open("a", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            print(*row, flush=True)
            losses.clear()
            save(model, out)
    plot_curve(log, out / "training_curve.png")


def save(model: Qwen3_5MoeForCausalLM, out: Path) -> None:
    """Writes the weights in bfloat16, the dtype the large models are released in."""
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    half.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    half.save_pretrained(out)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "abacus"))
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", default="grouped_mm", help="the reference's experts implementation")
    parser.add_argument("--log-every", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

"""Trains the multi-token prediction layer of this repository's checkpoint, on the frozen model.

    python checkpoints/train_mtp.py --model checkpoints/abacus

The layer is made of the reference's own modules and learns, on the problems that the model was trained on, what
the model itself will take for the most likely token: one, two and three tokens behind the next one, by being
applied to its own output as drafting does. Its weights are added to model.safetensors as `mtp.*`, in bfloat16, and
config.json says that they are there.
"""

import argparse
import csv
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from train_abacus import IGNORED, batch_stream, encode, learning_rate, make_batch
from transformers import Qwen3_5MoeForCausalLM
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm

from qwen_moe_jax.evaluation.word_problems import held_out

DEPTH = 3  # drafts that it learns to make in a row
WEIGHTS = (1.0, 0.6, 0.4)  # of their losses


class Mtp(nn.Module):
    """The layer, with the names of a checkpoint."""

    def __init__(self, model: Qwen3_5MoeForCausalLM):
        super().__init__()
        config, hidden, eps = model.config, model.config.hidden_size, model.config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        # the reference decides by the layer's number what kind it is; the last one has full attention
        attention = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(config, attention)])
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        # begin as the model's own layer, which knows what to do with its hidden states
        self.layers[0].load_state_dict(model.model.layers[attention].state_dict())
        self.norm.load_state_dict(model.model.norm.state_dict())
        with torch.no_grad():
            self.fc.weight.copy_(torch.cat([torch.eye(hidden), torch.eye(hidden)], dim=1) * 0.7)

    def forward(self, hidden, embedded, rotary, mask):
        """Hidden states and the tokens behind them [batch, seq, hidden] -> hidden states behind `norm`."""
        x = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1)
        return self.norm(self.layers[0](self.fc(x), position_embeddings=rotary, attention_mask=mask))


def drafts(
    model: Qwen3_5MoeForCausalLM, mtp: Mtp, ids: torch.Tensor, hidden: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of each depth: entry i of depth d is about token i + d + 1 (d from 1), tokens up to i + d given."""
    embedded = model.model.embed_tokens(ids)
    found, length = [], ids.shape[1]
    for depth in range(1, DEPTH + 1):
        count = length - depth
        positions = torch.arange(count)
        rotary = model.model.rotary_emb(hidden[:, :count], positions[None, None].expand(3, 1, -1))
        mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)[None, None]
        hidden = mtp(hidden[:, :count], embedded[:, depth:], rotary, mask)
        found.append(model.lm_head(hidden))
    return found


@torch.no_grad()
def targets(
    model: Qwen3_5MoeForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's hidden states, and what it takes for the most likely token at each place where an answer
    stands; else IGNORED."""
    hidden = model.model(ids).last_hidden_state
    likely = model.lm_head(hidden).argmax(-1)
    wanted = torch.full_like(ids, IGNORED)
    wanted[:, 1:] = torch.where(labels[:, 1:] != IGNORED, likely[:, :-1], IGNORED)
    return hidden, wanted


@torch.no_grad()
def agreement(model: Qwen3_5MoeForCausalLM, mtp: Mtp, encoded: list, pad: int) -> list[float]:
    """Share of each depth's drafts that are what the model says, given that all tokens before are right."""
    mtp.eval()
    right, all_of = [0] * DEPTH, [0] * DEPTH
    for start in range(0, len(encoded), 100):
        ids, labels = make_batch(encoded[start : start + 100], pad)
        hidden, wanted = targets(model, ids, labels)
        for depth, logits in enumerate(drafts(model, mtp, ids, hidden), start=1):
            asked = wanted[:, depth + 1 :]
            told = asked != IGNORED
            right[depth - 1] += int((logits[:, :-1].argmax(-1) == asked)[told].sum())
            all_of[depth - 1] += int(told.sum())
    mtp.train()
    return [a / b for a, b in zip(right, all_of, strict=True)]


def train(options: argparse.Namespace) -> None:
    """Trains, logs, and adds the weights to the checkpoint."""
    started = time.time()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    folder = Path(options.model)
    model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad = model.config.pad_token_id
    mtp = Mtp(model).train().requires_grad_(True)
    decayed = [p for p in mtp.parameters() if p.ndim >= 2]
    others = [p for p in mtp.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    batches = batch_stream(tokenizer, options, random.Random(options.seed))
    tests = [encode(tokenizer, problem, False) for problem in held_out(200, options.seed)]
    log = folder / "mtp_training_log.csv"
    log.write_text("step,loss,first,second,third,minutes\n", encoding="utf-8")
    losses: list[float] = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        ids, labels = make_batch(next(batches), pad)
        hidden, wanted = targets(model, ids, labels)
        told = drafts(model, mtp, ids, hidden)
        loss = sum(
            weight
            * functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), wanted[:, depth + 1 :].flatten(), ignore_index=IGNORED
            )
            for depth, (logits, weight) in enumerate(zip(told, WEIGHTS, strict=True), start=1)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mtp.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            row = [step + 1, f"{sum(losses) / len(losses):.4f}"]
            row += [f"{share:.4f}" for share in agreement(model, mtp, tests, pad)]
            row.append(f"{(time.time() - started) / 60:.1f}")
            with log.open("a", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            print(*row, flush=True)
            losses.clear()
            save(mtp, folder)


def save(mtp: Mtp, folder: Path) -> None:
    """Adds the weights to model.safetensors, in bfloat16, and says so in config.json."""
    file = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith("mtp.")}
    tensors |= {f"mtp.{name}": value.to(torch.bfloat16).contiguous() for name, value in mtp.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(
        json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8"
    )


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(__file__).parent / "abacus"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

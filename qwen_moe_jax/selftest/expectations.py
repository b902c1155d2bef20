"""What is stored of the repository's checkpoint: greedy continuations and some logits, so that a machine
without PyTorch can tell whether it computes what the reference does.

They were made by this library on CPU, in float32, and a test compares them with the reference. To make them
anew after another training: `python -m qwen_moe_jax.selftest.expectations checkpoints/abacus`.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DATA = Path(__file__).resolve().parents[1] / "selftest_data"
_WEIGHTS = "model.safetensors"
_PROBLEMS = 8
# Problems are taken whose every token is ahead of all others by that many logits. bfloat16 was seen to move
# one by up to 1.3, so its tokens have to be the same, too.
_CLEAR = 4.0
_LARGEST, _SPREAD = 8, 8  # logits of a position that are kept: the largest, and some at even distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Logits of one position of a row.

    Attributes:
        index: of the position in prompt and continuation.
        ids: of tokens.
        logits: of these.
    """

    index: int
    ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt.

    Attributes:
        text: the question, for people.
        prompt: token ids.
        tokens: ids of the greedy continuation, with the one that ends it.
        positions: some of the row's, with their logits.
    """

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[Position, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectations:
    """What is stored of one checkpoint.

    Attributes:
        name: of the checkpoint.
        weights_bytes: size of its weights' file.
        weights_sha256: of that file.
        margin: the least by which a token of any row is ahead of the next, in logits.
        rows: of prompts.
    """

    name: str
    weights_bytes: int
    weights_sha256: str
    margin: float
    rows: tuple[Row, ...]

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Expectations":
        """As JSON has them."""
        rows = tuple(
            Row(
                text=row["text"],
                prompt=tuple(row["prompt"]),
                tokens=tuple(row["tokens"]),
                positions=tuple(
                    Position(index=p["index"], ids=tuple(p["ids"]), logits=tuple(p["logits"]))
                    for p in row["positions"]
                ),
            )
            for row in given["rows"]
        )
        return cls(
            name=given["name"],
            weights_bytes=given["weights_bytes"],
            weights_sha256=given["weights_sha256"],
            margin=given["margin"],
            rows=rows,
        )


def find_expectations(folder: Path) -> tuple[Expectations | None, str]:
    """What is stored of the checkpoint in a folder.

    Returns:
        (expectations, "") or (None, why there are none, in a sentence).
    """
    weights = folder / _WEIGHTS
    known = [
        Expectations.from_dict(json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(DATA.glob("*.json"))
    ]
    names = ", ".join(each.name for each in known) or "none"
    if not weights.is_file():
        return None, f"nothing is stored of this checkpoint, which has no {_WEIGHTS} (stored are: {names})"
    size = weights.stat().st_size
    fitting = [each for each in known if each.weights_bytes == size]
    # so that only what can be known is read for its hash
    if fitting:
        digest = _sha256(weights)
        for each in fitting:
            if each.weights_sha256 == digest:
                return each, ""
    return None, f"nothing is stored of a checkpoint with these weights (stored are: {names})"


def make_expectations(folder: Path) -> Expectations:
    """Makes them of a checkpoint that answers word problems; on CPU, for the stored ones."""
    from qwen_moe_jax.evaluation.evaluate import MAX_SOLUTION_TOKENS
    from qwen_moe_jax.evaluation.word_problems import held_out
    from qwen_moe_jax.generation.api import QwenMoe

    model = QwenMoe.from_pretrained(folder, dtype=jnp.float32)
    assert model.tokenizer is not None
    assert model.chat_template is not None
    rows: list[Row] = []
    margins: list[float] = []
    for problem in held_out(4 * _PROBLEMS, seed=0):
        chat = [{"role": "user", "content": problem.question}]
        if len(rows) == _PROBLEMS:
            break
        prompt = model.tokenizer.encode(model.chat_template.render(chat))
        tokens = model.generate([prompt], do_sample=False, max_new_tokens=MAX_SOLUTION_TOKENS).sequences[0]
        logits = np.asarray(model.logits([[*prompt, *tokens]]))[0]
        margin = min(_margins(logits[len(prompt) - 1 : -1], tokens))
        if margin >= _CLEAR:
            margins.append(margin)
            places = (len(prompt) - 1, len(prompt) + len(tokens) // 2, len(prompt) + len(tokens) - 2)
            positions = tuple(_position(logits, index) for index in places)
            rows.append(
                Row(text=problem.question, prompt=tuple(prompt), tokens=tuple(tokens), positions=positions)
            )
    weights = folder / _WEIGHTS
    return Expectations(
        name=folder.name,
        weights_bytes=weights.stat().st_size,
        weights_sha256=_sha256(weights),
        margin=round(min(margins), 4),
        rows=tuple(rows),
    )


def _margins(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """By how much each token is ahead of every other."""
    found = []
    for row, token in zip(logits, tokens, strict=True):
        others = np.delete(row, token)
        found.append(float(row[token] - others.max()))
    return found


def _position(logits: np.ndarray, index: int) -> Position:
    row = logits[index]
    order = np.argsort(-row, kind="stable")
    rest = np.sort(order[_LARGEST:])
    spread = rest[np.linspace(0, len(rest) - 1, _SPREAD).astype(int)]
    ids = [*order[:_LARGEST].tolist(), *spread.tolist()]
    return Position(index=index, ids=tuple(ids), logits=tuple(round(float(row[i]), 5) for i in ids))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _store(folder: Path) -> None:
    found = make_expectations(folder)
    text = json.dumps(dataclasses.asdict(found), separators=(",", ":")).replace('{"text"', '\n{"text"')
    DATA.mkdir(exist_ok=True)
    (DATA / f"{found.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    _store(Path(sys.argv[1]))

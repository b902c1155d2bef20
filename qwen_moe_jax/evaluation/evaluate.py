"""Greedy accuracy on word problems."""

import dataclasses
from collections.abc import Sequence

from tqdm import tqdm

from qwen_moe_jax.evaluation.accuracy import wilson_interval
from qwen_moe_jax.evaluation.word_problems import Problem, extract_answer
from qwen_moe_jax.generation.api import QwenMoe

# The longest solution of any template is shorter; a run that reaches this many tokens is a loop.
MAX_SOLUTION_TOKENS = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How many problems were answered right.

    Attributes:
        correct: problems whose final answer is the expected one.
        total: problems asked.
        answers: what the model answered to each, None where no answer could be read.
        texts: the full replies.
        generated_tokens: tokens decoded over all problems.
    """

    correct: int
    total: int
    answers: list[int | None]
    texts: list[str]
    generated_tokens: int

    @property
    def accuracy(self) -> float:
        """Fraction of problems answered right."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson score)."""
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{100 * self.accuracy:.1f} % ({self.correct} of {self.total}; "
            f"95 % confidence {100 * low:.1f} to {100 * high:.1f} %)"
        )


def evaluate(
    model: QwenMoe, problems: Sequence[Problem], *, batch_size: int = 50, progress: bool = False
) -> Evaluation:
    """Asks each problem as a chat message, decodes greedily and compares the final answers.

    Args:
        model: with a tokenizer and a chat template.
        problems: at least one.
        batch_size: problems decoded together; replies do not depend on it.
        progress: shows a bar on stderr.
    """
    answers: list[int | None] = []
    texts: list[str] = []
    generated = 0
    with tqdm(total=len(problems), disable=not progress, unit="problem") as bar:
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            chats = [[{"role": "user", "content": problem.question}] for problem in batch]
            out = model.generate(chats, do_sample=False, max_new_tokens=MAX_SOLUTION_TOKENS)
            assert out.texts is not None  # chats need a tokenizer, so there is one
            texts += out.texts
            answers += [extract_answer(text) for text in out.texts]
            generated += out.usage.generated_tokens
            right = sum(a == p.answer for a, p in zip(answers, problems, strict=False))
            bar.update(len(batch))
            bar.set_postfix_str(f"{100 * right / len(answers):.1f} % right")
    return Evaluation(
        correct=sum(a == p.answer for a, p in zip(answers, problems, strict=True)),
        total=len(problems),
        answers=answers,
        texts=texts,
        generated_tokens=generated,
    )

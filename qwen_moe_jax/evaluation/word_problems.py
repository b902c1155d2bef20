"""Grade-school arithmetic word problems with worked solutions, drawn from a table of templates.

Whether a problem may be trained on depends on its template and its numbers alone: a hash of the two
sets one in ten aside, whatever the names and nouns. The templates in `UNSEEN` are never trained on.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from qwen_moe_jax.evaluation.templates import SEEN, UNSEEN, Template

__all__ = ["SEEN", "UNSEEN", "Problem", "Template", "extract_answer", "held_out", "training_problems"]

# Every intermediate result is a positive integer of at most three digits.
_LARGEST_RESULT = 999
# One (template, numbers) pair in this many is kept out of training.
_HELD_OUT_ONE_IN = 10
# Draws in a row without a new held-out problem after which no more are expected.
_PATIENCE = 5_000

_HE = ("he", "He", "him", "his")
_SHE = ("she", "She", "her", "her")
_MEN = ("Tom", "Ben", "Sam", "Max", "Leo", "Adam", "Paul", "Omar", "Ivan", "Noah", "Hugo", "Raj")
_WOMEN = ("Anna", "Mia", "Lucy", "Emma", "Sara", "Kate", "Nina", "Rosa", "Ella", "Jane", "Maya", "Lin")
_NAMES = dict.fromkeys(_MEN, _HE) | dict.fromkeys(_WOMEN, _SHE)
_FRUITS = ("apples", "pears", "plums", "oranges", "lemons", "cherries", "nuts", "figs")
_THINGS = (
    *_FRUITS,
    *("pens", "books", "cards", "coins", "stamps", "toys"),
    *("balls", "shells", "stickers", "cookies", "eggs", "hats"),
)
_CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("tray", "trays"))

_CHOICE = re.compile(r"\[([^\]]+)\]")
_ANSWER = re.compile(r"The answer is\s+(-?\d+)")


@dataclass(frozen=True)
class Problem:
    """A word problem and its worked solution.

    Attributes:
        question: the text put to the model.
        solution: one short equation a step, then "The answer is N."
        answer: the number N.
        template: key of the template it was drawn from.
        numbers: the template's variables, in the order of its table row.
    """

    question: str
    solution: str
    answer: int
    template: str
    numbers: tuple[int, ...] = ()


def training_problems(seed: int) -> Iterator[Problem]:
    """Problems to train on, without end: seen templates, numbers that are not held out."""
    rng = random.Random(f"training {seed}")
    while True:
        problem = _draw(rng.choice(SEEN), rng)
        if not is_held_out(problem):
            yield problem


def held_out(count: int, seed: int, unseen_templates: bool = False) -> list[Problem]:
    """Problems that no training run has seen.

    Args:
        count: how many. No two have the same template and the same numbers.
        seed: same seed, same problems.
        unseen_templates: draw from the templates that are never trained on, instead of from held-out
            numbers of the others.

    Raises:
        ValueError: more problems were asked for than distinct ones could be found.
    """
    rng = random.Random(f"held out {seed} {unseen_templates}")
    templates = UNSEEN if unseen_templates else SEEN
    found: dict[tuple[str, tuple[int, ...]], Problem] = {}
    fruitless = 0
    while len(found) < count and fruitless < _PATIENCE:
        problem = _draw(rng.choice(templates), rng)
        before = len(found)
        if unseen_templates or is_held_out(problem):
            found.setdefault((problem.template, problem.numbers), problem)
        fruitless = fruitless + 1 if len(found) == before else 0
    if len(found) < count:
        raise ValueError(f"only {len(found)} distinct held-out problems were found, {count} were asked for")
    return list(found.values())


def is_held_out(problem: Problem) -> bool:
    """Whether this problem's template and numbers are among those set aside from training."""
    text = f"{problem.template} {problem.numbers}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def extract_answer(text: str) -> int | None:
    """The number after the last "The answer is" in `text`, or None if there is none."""
    answers = _ANSWER.findall(text)
    return int(answers[-1]) if answers else None


def _draw(template: Template, rng: random.Random) -> Problem:
    """A problem of this template with fresh numbers, names and nouns."""
    while True:
        numbers = _draw_numbers(template, rng)
        solved = _solve(template, numbers)
        if solved is not None:
            break
    equations, answer = solved
    question = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template.question)
    return Problem(
        question=question.format_map(_draw_words(rng) | {key: str(value) for key, value in numbers.items()}),
        solution=" ".join(f"{equation}." for equation in equations) + f" The answer is {answer}.",
        answer=answer,
        template=template.key,
        numbers=tuple(numbers.values()),
    )


def _draw_words(rng: random.Random) -> dict[str, str]:
    first, second, third = rng.sample(list(_NAMES), 3)
    box, boxes = rng.choice(_CONTAINERS)
    words = dict(zip(("he", "He", "him", "his"), _NAMES[first], strict=True))
    words |= {"n": first, "m": second, "o": third, "box": box, "boxes": boxes}
    return words | {"things": rng.choice(_THINGS), "fruits": rng.choice(_FRUITS)}


def _draw_numbers(template: Template, rng: random.Random) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for entry in template.numbers.split(", "):
        name, _, spec = entry.partition(" ")
        if spec.startswith("= "):
            numbers[name] = _evaluate(spec[2:].split(), numbers)
        else:
            low, _, high = spec.partition("..")
            numbers[name] = rng.randint(int(low), int(high))
    return numbers


def _solve(template: Template, numbers: dict[str, int]) -> tuple[list[str], int] | None:
    """The equations and the answer, or None if a number on the way is not a small positive integer."""
    values = dict(numbers)
    # A number of one in a question ("1 apples") would be bad English.
    if min(values.values()) < 2:
        return None
    equations = []
    for step in template.steps:
        name, _, *expression = step.split()
        left, operation, right = expression
        if operation == "/" and _value(left, values) % _value(right, values) != 0:
            return None
        result = _evaluate(expression, values)
        if not 0 < result <= _LARGEST_RESULT:
            return None
        equations.append(f"{_value(left, values)} {operation} {_value(right, values)} = {result}")
        values[name] = result
    return equations, result


def _evaluate(expression: list[str], values: dict[str, int]) -> int:
    """Evaluates `a * k + c` from left to right; multiplication must come first."""
    result = _value(expression[0], values)
    for operation, operand in zip(expression[1::2], expression[2::2], strict=True):
        right = _value(operand, values)
        if operation == "+":
            result += right
        elif operation == "-":
            result -= right
        elif operation == "*":
            result *= right
        else:
            result //= right
    return result


def _value(operand: str, values: dict[str, int]) -> int:
    return int(operand) if operand.isdigit() else values[operand]

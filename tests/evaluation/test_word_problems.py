"""The word problems are right, and what is held out stays out of training."""

import itertools
import re
from collections import Counter

import pytest

from qwen_moe_jax.evaluation import word_problems
from qwen_moe_jax.evaluation.accuracy import wilson_interval
from qwen_moe_jax.evaluation.word_problems import (
    SEEN,
    UNSEEN,
    Problem,
    Template,
    extract_answer,
    held_out,
    is_held_out,
    training_problems,
)

MANY = 10_000
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
SOLUTION = re.compile(r"(\d+ [-+*/] \d+ = \d+\. ){1,3}The answer is \d+\.")
# The numbers b for which "gain" with a = 50 is held out.
RECORDED_HELD_OUT_OF_GAIN_50 = [26, 43, 45, 46, 52, 54, 67, 79, 86, 88]


def some_training(count: int = MANY, seed: int = 0) -> list[Problem]:
    return list(itertools.islice(training_problems(seed), count))


@pytest.fixture(scope="module")
def training() -> list[Problem]:
    return some_training()


@pytest.fixture(scope="module")
def every_kind(training: list[Problem]) -> list[Problem]:
    return training + held_out(1_000, seed=0) + held_out(800, seed=0, unseen_templates=True)


def holds(left: str, operation: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    # A division is checked by multiplying back, so that a remainder cannot pass.
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[operation]


def test_there_are_enough_templates_and_no_two_are_alike() -> None:
    assert len(SEEN) >= 32
    assert len(UNSEEN) >= 8
    assert len(SEEN) + len(UNSEEN) >= 40
    templates = SEEN + UNSEEN
    assert len({template.key for template in templates}) == len(templates)
    assert len({template.question for template in templates}) == len(templates)


def test_every_template_occurs(training: list[Problem]) -> None:
    assert {problem.template for problem in training} == {template.key for template in SEEN}
    unseen = held_out(800, seed=0, unseen_templates=True)
    assert {problem.template for problem in unseen} == {template.key for template in UNSEEN}
    # No template is a rarity: each has at least half of its even share.
    counts = Counter(problem.template for problem in training)
    assert min(counts.values()) > MANY / len(SEEN) / 2


def test_every_equation_is_true_and_the_last_one_gives_the_answer(every_kind: list[Problem]) -> None:
    for problem in every_kind:
        assert SOLUTION.fullmatch(problem.solution), problem
        equations = EQUATION.findall(problem.solution)
        assert all(holds(*equation) for equation in equations), problem
        assert int(equations[-1][3]) == problem.answer, problem
        assert extract_answer(problem.solution) == problem.answer


def test_solutions_use_one_to_three_steps(every_kind: list[Problem]) -> None:
    assert {len(EQUATION.findall(problem.solution)) for problem in every_kind} == {1, 2, 3}


def test_each_operand_is_in_the_question_or_computed_before(every_kind: list[Problem]) -> None:
    for problem in every_kind:
        known = set(re.findall(r"\d+", problem.question))
        # "twice" and "half" stand for a 2 that the question does not spell.
        known |= {"2"} if re.search(r"twice|half", problem.question) else set()
        for left, _, right, result in EQUATION.findall(problem.solution):
            assert {left, right} <= known, problem
            known.add(result)


def test_questions_have_no_placeholder_left_and_no_number_below_two(every_kind: list[Problem]) -> None:
    for problem in every_kind:
        assert not set("{}[]|") & set(problem.question), problem
        assert min(map(int, re.findall(r"\d+", problem.question))) >= 2, problem
        assert problem.question.endswith("?")


def test_training_and_held_out_share_no_template_with_the_same_numbers(training: list[Problem]) -> None:
    trained = {(problem.template, problem.numbers) for problem in training}
    trained |= {(problem.template, problem.numbers) for problem in some_training(seed=1)}
    questions = {problem.question for problem in training}
    for problem in held_out(1_000, seed=0) + held_out(1_000, seed=7):
        assert is_held_out(problem)
        assert (problem.template, problem.numbers) not in trained
        assert problem.question not in questions


def test_the_split_is_fixed_across_versions_of_python() -> None:
    def with_numbers(*numbers: int) -> Problem:
        return Problem(question="", solution="", answer=0, template="gain", numbers=numbers)

    # Recorded once: a change here would mix the test set into the training set of a trained checkpoint.
    aside = [b for b in range(5, 90) if is_held_out(with_numbers(50, b))]
    assert aside == RECORDED_HELD_OUT_OF_GAIN_50


def test_about_one_pair_in_ten_is_held_out() -> None:
    pairs = [
        Problem(question="", solution="", answer=0, template="lose", numbers=(a, b))
        for a in range(100)
        for b in range(100)
    ]
    assert 0.09 < sum(map(is_held_out, pairs)) / len(pairs) < 0.11


def test_unseen_templates_are_never_trained_on(training: list[Problem]) -> None:
    unseen = {template.key for template in UNSEEN}
    assert not unseen & {problem.template for problem in training}
    assert not unseen & {problem.template for problem in held_out(500, seed=0)}
    assert {problem.template for problem in held_out(500, seed=0, unseen_templates=True)} <= unseen


@pytest.mark.parametrize("unseen", [False, True])
def test_held_out_is_deterministic_and_distinct(unseen: bool) -> None:
    problems = held_out(500, seed=3, unseen_templates=unseen)
    assert problems == held_out(500, seed=3, unseen_templates=unseen)
    assert problems != held_out(500, seed=4, unseen_templates=unseen)
    assert len({(problem.template, problem.numbers) for problem in problems}) == 500


def test_training_is_deterministic_in_its_seed() -> None:
    assert some_training(200, seed=5) == some_training(200, seed=5)
    assert some_training(200, seed=5) != some_training(200, seed=6)


def test_asking_for_more_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # A table of one template with one pair of numbers has exactly one problem to give.
    only = Template(
        key="only", question="{n} has {a} and {b}?", numbers="a 5..5, b 6..6", steps=("x = a + b",)
    )
    monkeypatch.setattr(word_problems, "UNSEEN", (only,))
    assert len(held_out(1, seed=0, unseen_templates=True)) == 1
    with pytest.raises(ValueError, match="only 1 distinct"):
        held_out(2, seed=0, unseen_templates=True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7. The answer is 7.", 7),
        ("The answer is 12. Wait. The answer is 15.", 15),
        ("The answer is\n42", 42),
        ("The answer is -3.", -3),
        ("7 + 5 = 12.", None),
        ("The answer is seven.", None),
        ("", None),
    ],
)
def test_extract_answer_reads_the_last_one(text: str, answer: int | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Closed form at the ends: with no success the bounds are 0 and z^2 / (n + z^2), mirrored at all.
        (0, 10, 0.0, 1.96**2 / (10 + 1.96**2)),
        (10, 10, 10 / (10 + 1.96**2), 1.0),
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_known_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=r"trial"):
        wilson_interval(successes, trials)

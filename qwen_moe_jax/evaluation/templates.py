"""The table of word-problem templates: 36 that are trained on, 8 that never are.

A template is one sentence structure. In its question, `{a}` stands for a number, `{n}` and `{m}` for
two names (`{he}`, `{He}`, `{him}`, `{his}` follow the first), `{things}` and `{fruits}` for plural
nouns, `{box}` and `{boxes}` for a container, and `[gives|hands]` for either word.

`numbers` draws the variables in order, either from a range (`a 10..60`) or from earlier variables and
constants (`t = a * k`, read from left to right), so that divisions come out even. `steps` are the
equations of the solution; the last one gives the answer.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Template:
    """One sentence structure with its numbers and its solution.

    Attributes:
        key: name of the template; part of what the held-out split is decided on.
        question: the text, with placeholders.
        numbers: how the variables are drawn.
        steps: the equations, such as `x = a + b`.
    """

    key: str
    question: str
    numbers: str
    steps: tuple[str, ...]


def _row(key: str, numbers: str, steps: str, question: str) -> Template:
    return Template(key=key, question=question, numbers=numbers, steps=tuple(steps.split("; ")))


SEEN: tuple[Template, ...] = (
    # One step.
    _row("gain", "a 10..59, b 5..39", "x = a + b",
         "{n} has {a} {things}. {m} [gives|hands] {him} {b} more. How many {things} does {n} have now?"),
    _row("lose", "a 20..69, b 5..39", "x = a - b",
         "{n} has {a} {things}. {He} [gives|sells] {b} {things} to {m}. "
         "How many {things} does {n} have left?"),
    _row("packs", "a 2..9, b 2..20", "x = a * b",
         "There are {a} {boxes} on the table. Each {box} [holds|has] {b} {things}. "
         "How many {things} are there in all?"),
    _row("share", "a 2..9, k 2..20, t = a * k", "x = t / a",
         "{n} [shares|divides] {t} {things} equally among {a} friends. "
         "How many {things} does each friend get?"),
    _row("more_than", "a 10..59, b 5..39", "x = a + b",
         "{n} has {a} {things}. {m} has {b} more {things} than {n}. How many {things} does {m} have?"),
    _row("fewer_than", "a 20..69, b 5..39", "x = a - b",
         "{n} has {a} {things}. {m} has {b} fewer {things} than {n}. How many {things} does {m} have?"),
    _row("difference", "a 20..69, b 5..39", "x = a - b",
         "{n} has {a} {things} and {m} has {b} {things}. How many more {things} does {n} have than {m}?"),
    _row("times_as_many", "a 2..20, b 2..9", "x = a * b",
         "{m} has {a} {things}. {n} has {b} times as many {things} as {m}. "
         "How many {things} does {n} have?"),
    # Two steps.
    _row("find_then_lose", "a 10..59, b 5..40, c 5..39", "x = a + b; y = x - c",
         "{n} has {a} {things}. {He} [finds|gets] {b} more {things} and then loses {c} of them. "
         "How many {things} does {n} have now?"),
    _row("sell_then_buy", "a 20..69, b 5..39, c 5..39", "x = a - b; y = x + c",
         "{n} had {a} {things}. {He} [sold|lost] {b} of them and then bought {c} more. "
         "How many {things} did {n} have in the end?"),
    _row("more_together", "a 5..39, b 3..40", "x = a + b; y = a + x",
         "{n} has {a} {things}. {m} has {b} more {things} than {n}. "
         "How many {things} do they have together?"),
    _row("fewer_together", "a 15..59, b 3..39", "x = a - b; y = a + x",
         "{n} has {a} {things}. {m} has {b} fewer {things} than {n}. "
         "How many {things} do they have together?"),
    _row("twice_after_gift", "a 5..45, b 3..40", "x = a * 2; y = x + b",
         "{n} has {a} {things}. {m} has twice as many {things} as {n}, and then {m} buys {b} more. "
         "How many {things} does {m} have now?"),
    _row("half_after_gift", "k 3..45, t = k * 2, b 3..40", "x = t / 2; y = x + b",
         "{n} had {t} {things}. {He} gave half of them to {m}, and then {he} found {b} more. "
         "How many {things} does {n} have now?"),
    _row("packs_and_more", "a 2..9, b 2..12, c 3..39", "x = a * b; y = x + c",
         "{n} has {c} {things}. {He} buys {a} {boxes} of {b} {things}. "
         "How many {things} does {n} have in all?"),
    _row("packs_then_give", "a 2..9, b 2..12, c 3..39", "x = a * b; y = x - c",
         "{n} buys {a} {boxes} with {b} {things} in each. {He} gives {c} of the {things} to {m}. "
         "How many {things} does {he} have left?"),
    _row("keep_then_share", "a 2..9, k 2..12, c 3..30, t = a * k + c", "x = t - c; y = x / a",
         "{n} has {t} {things}. {He} keeps {c} of them and shares the rest equally among {a} friends. "
         "How many {things} does each friend get?"),
    _row("join_then_pack", "c 2..9, k 3..12, b 3..40, a = c * k - b", "x = a + b; y = x / c",
         "{n} has {a} {things} and {m} has {b} {things}. They put them together and pack them "
         "equally into {c} {boxes}. How many {things} are in each {box}?"),
    _row("spend_twice", "a 40..89, b 3..40, c 3..40", "x = a - b; y = x - c",
         "{n} has ${a}. {He} buys [a book|a bag] for ${b} and [a toy|a hat] for ${c}. "
         "How much money does {n} have left?"),
    _row("items_and_one", "a 2..9, c 2..12, b 3..39", "x = a * c; y = x + b",
         "One ticket costs ${c} and one bag costs ${b}. How much do {a} tickets and one bag cost?"),
    _row("change", "a 2..9, b 2..9, c 20..69", "x = a * b; y = c - x",
         "{n} buys {a} {things} for ${b} each. {He} pays with ${c}. How much change does {he} get?"),
    _row("wages", "a 3..12, b 2..9, c 3..50", "x = a * b; y = x - c",
         "{n} earns ${a} [an|every] hour and works for {b} hours. Then {he} spends ${c}. "
         "How much money does {he} have left?"),
    _row("pages", "a 3..12, b 2..9, c 30..89", "x = a * b; y = c - x",
         "A book has {c} pages. {n} reads {a} pages every day. "
         "How many pages are left after {b} days?"),
    _row("way_to_school", "a 2..9, b 2..9, c 2..9", "x = a + b; y = x * c",
         "Every day {n} walks {a} minutes to school and {b} minutes back. "
         "How many minutes does {he} walk in {c} days?"),
    _row("chairs", "a 2..9, b 3..12, c 3..39", "x = a * b; y = x - c",
         "There are {a} rows of chairs in the hall, with {b} chairs in each row. "
         "{c} chairs are taken. How many chairs are free?"),
    _row("bus", "a 15..59, b 3..30, c 3..30", "x = a - b; y = x + c",
         "There are {a} people on [a bus|a train]. At the first stop {b} people get off and {c} people "
         "get on. How many people are there now?"),
    _row("boxes_sold", "a 2..9, k 5..20, t = a * k, b 2..15", "x = t / a; y = x - b",
         "{n} packs {t} {things} into {boxes} of {a}. {He} sells {b} {boxes}. "
         "How many {boxes} are left?"),
    _row("older", "a 5..50, b 2..20, c 2..20", "x = a + b; y = x + c",
         "{n} is {a} years old. {m} is {b} years older than {n}. How old will {m} be in {c} years?"),
    _row("more_then_times", "a 2..9, b 2..9, c 2..6", "x = a + b; y = x * c",
         "{n} has {a} {things}. {m} has {b} more than {n}, and {o} has {c} times as many as {m}. "
         "How many {things} does {o} have?"),
    # Three steps.
    _row("two_kinds_of_packs", "a 2..9, b 2..9, c 2..9, d 2..9", "x = a * b; y = c * d; z = x + y",
         "{n} buys {a} {boxes} of {b} {things} and {c} {boxes} of {d} {things}. "
         "How many {things} does {he} buy in all?"),
    _row("two_prices", "a 2..9, b 2..9, c 2..9, d 2..9", "x = a * b; y = c * d; z = x + y",
         "{n} buys {a} [pens|hats] for ${b} each and {c} [books|toys] for ${d} each. "
         "How much does {he} pay in all?"),
    _row("eat_then_share", "a 2..9, b 2..20, c 2..20, e 2..6",
         "x = a * b; y = x - c; z = y / e",
         "{n} has {a} {boxes} with {b} {fruits} in each. {He} eats {c} {fruits} and shares the rest "
         "equally among {e} friends. How many {fruits} does each friend get?"),
    _row("farm", "d 2..9, k 2..9, c 3..30, b 5..40, a = d * k + c - b",
         "x = a + b; y = x - c; z = y / d",
         "A farmer picks {a} {fruits} in the morning and {b} {fruits} in the afternoon. "
         "{c} of them are bad. The rest are packed into {boxes} of {d}. How many {boxes} are there?"),
    _row("savings", "a 2..12, b 2..9, c 3..40, d 3..50", "x = a * b; y = x + c; z = y - d",
         "{n} saves ${a} every week for {b} weeks. Then {m} gives {him} ${c}, and {he} spends ${d}. "
         "How much money does {n} have now?"),
    _row("class", "c 2..9, k 2..9, e 2..12, b 3..30, a = c * k + e - b",
         "x = a + b; y = x - e; z = y / c",
         "A class has {a} boys and {b} girls. {e} of the children are at home. The rest work in groups "
         "of {c}. How many groups are there?"),
    _row("three_friends", "a 5..40, b 3..30, c 3..40", "x = a * 2; y = x - b; z = y + c",
         "{n} has {a} {things}. {m} has twice as many {things} as {n}. {o} had {b} fewer {things} than "
         "{m}, and then {o} found {c} more. How many {things} does {o} have now?"),
)  # fmt: skip

UNSEEN: tuple[Template, ...] = (
    _row("at_first", "b 5..39, c 5..39", "x = b + c",
         "{n} gave {b} {things} to {m}. Now {n} has {c} {things} left. "
         "How many {things} did {n} have in the beginning?"),
    _row("asked_first", "a 2..9, b 2..12, c 3..39", "x = a * b; y = x + c",
         "How many {things} are there in all if {a} {boxes} hold {b} {things} each and {c} more "
         "{things} are on the table?"),
    _row("missing_part", "a 30..89, b 5..49", "x = a - b",
         "{n} and {m} have {a} {things} together. {n} has {b} of them. How many {things} does {m} have?"),
    _row("picnic", "a 2..9, b 2..12, c 3..40", "x = a * b; y = x + c",
         "Every one of {a} friends gets {b} {fruits} from {n}, and {m} gets {c} {fruits}. "
         "How many {fruits} did {n} give in all?"),
    _row("afternoon", "a 5..40, b 3..40", "x = a * 2; y = x - b",
         "In the morning {n} picks {a} {fruits}. In the afternoon {he} picks twice as many, and then "
         "sells {b} of the {fruits} from the afternoon. How many {fruits} from the afternoon are left?"),
    _row("shop", "a 2..9, b 2..9, c 3..30, d 60..99", "x = a * b; y = x + c; z = d - y",
         "{n} had ${d}. Then {he} bought {a} {things} for ${b} each and a bag for ${c}. "
         "How much money is left?"),
    _row("twice_as_old", "a 4..40, b 2..20", "x = a * 2; y = x + b",
         "{m} is twice as old as {n}. {n} is {a} years old. How old will {m} be in {b} years?"),
    _row("weekly_reading", "a 2..9, b 2..9, c 2..6", "x = a * b; y = x * c",
         "{n} reads {a} books every week. Each book has {b} pages. How many pages does {n} read "
         "in {c} weeks?"),
)  # fmt: skip

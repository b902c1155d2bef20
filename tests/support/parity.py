"""How parity is measured: our error against the float64 truth, beside the reference's own.

A case is a random configuration with random weights and one prompt. What is measured of an
implementation is a function of its logits and tokens alone, so that the reference (or a broken model) can be
put in our place to see whether the measurement can fail.

A case is drawn again while the truth's own router margin is below `ROUTER_TIE`: there, one rounding error
chooses another expert and moves the logits by many times the error, in either implementation, and what is
measured is luck. The decision looks at the truth alone, never at an implementation, and is
counted and reported.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from support import oracle
from support.configs import QWEN35_MOE, family_config, random_ids
from support.reference import build_reference, parameters_float64, reference_greedy, reference_logits

# The bar. The reference in float32 is itself 1e-7 to 2e-4 (largest) from the truth on such models.
GEOMETRIC_MEAN_RATIO = 1.1  # of our RMS error over the reference's: no worse than it, on the whole
LARGEST_RATIO = 3.0  # of one case: the reference's own paths differ by up to 2.8
LARGEST_DIFFERENCE = 3e-4  # |ours - truth| over the largest |truth|: twice the reference's worst case

# Router logits here are of order 2 to 5 and, like the logits, up to 1e-4 off in float32.
ROUTER_TIE = 1e-4

GREEDY_TOKENS = 128
SEEDS = range(48)

# Lengths of one group share every compiled shape (padded chunk, cache capacity).
LENGTH_GROUPS = ((1, 2), (63, 64), (65,), (127, 128), (129,), (200,))


def lengths_of(seed: int) -> tuple[int, ...]:
    """Prompt lengths for a seed: every group eight times over `SEEDS`, in no step with the configurations."""
    order = np.random.default_rng(9).permutation(len(SEEDS))
    return LENGTH_GROUPS[order[seed] % len(LENGTH_GROUPS)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt for one random model.

    Attributes:
        seed: of configuration and weights.
        ids: the prompt, int64 [length].
        truth: float64 logits [length, vocab].
        router_margin: the truth's smallest, over tokens and layers (inf where every expert is chosen).
        model_type: of the configuration.
    """

    seed: int
    ids: np.ndarray
    truth: np.ndarray
    router_margin: float
    model_type: str = QWEN35_MOE

    @property
    def router_tie(self) -> bool:
        """Whether rounding alone may choose another expert."""
        return self.router_margin < ROUTER_TIE


class RandomModel:
    """The reference with a seed's configuration and weights, and the truth about it."""

    def __init__(self, seed: int, model_type: str = QWEN35_MOE):
        self.seed = seed
        self.config: dict[str, Any] = family_config(model_type, seed)
        self.reference = build_reference(self.config, seed)
        self.params = parameters_float64(self.reference)

    def cases(self, length: int) -> Iterator[Case]:
        """Draws prompts, the last one without a router tie."""
        for draw in range(20):
            ids = random_ids(self.config, length, self.seed + 1000 * draw)
            truth = oracle.forward(self.config, self.params, ids)
            margin = float(truth.router_margin.min())
            case = Case(self.seed, ids, truth.logits, margin, self.config["model_type"])
            yield case
            if not case.router_tie:
                return
        raise RuntimeError(f"seed {self.seed}: twenty prompts of {length} tokens all have router ties")

    def case(self, length: int) -> Case:
        """The first prompt without a router tie."""
        return list(self.cases(length))[-1]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Two implementations against the truth, relative to its largest logit."""

    ours_rms: float
    reference_rms: float
    ours_max: float
    reference_max: float

    @property
    def ratio(self) -> float:
        """Our RMS error over the reference's."""
        return self.ours_rms / self.reference_rms


def measure(case: Case, ours: np.ndarray, reference: np.ndarray) -> Errors:
    """Errors of float32 logits [length, vocab]."""
    scale = np.abs(case.truth).max()
    a, b = ((logits.astype(np.float64) - case.truth) / scale for logits in (ours, reference))
    return Errors(
        ours_rms=math.sqrt((a**2).mean()),
        reference_rms=math.sqrt((b**2).mean()),
        ours_max=float(np.abs(a).max()),
        reference_max=float(np.abs(b).max()),
    )


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp of the mean log."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """Where two greedy continuations part.

    Attributes:
        step: tokens agreed on before.
        ours, reference: the two tokens.
        gap: difference of the truth's two best logits there, over its largest logit.
        best_two: the truth's two best tokens.
        router_margin: the truth's smallest up to there.
    """

    step: int
    ours: int
    reference: int
    gap: float
    best_two: tuple[int, int]
    router_margin: float

    @property
    def excused(self) -> bool:
        """The truth cannot tell the two tokens apart within the parity tolerance."""
        return self.gap <= LARGEST_DIFFERENCE and {self.ours, self.reference} == set(self.best_two)


def compare_greedy(
    model: RandomModel, prompt: np.ndarray, ours: Sequence[int], reference: Sequence[int]
) -> Disagreement | None:
    """The first place where the tokens differ, judged by the truth; None if they never do."""
    if len(ours) != len(reference):
        raise ValueError(f"{len(ours)} tokens of ours, {len(reference)} of the reference")
    for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a != b:
            seen = np.concatenate([prompt, np.asarray(reference[:step], np.int64)])
            truth = oracle.forward(model.config, model.params, seen)
            last = truth.logits[-1]
            best = np.argsort(-last)[:2]
            return Disagreement(
                step=step,
                ours=int(a),
                reference=int(b),
                gap=float((last[best[0]] - last[best[1]]) / np.abs(last).max()),
                best_two=(int(best[0]), int(best[1])),
                router_margin=float(truth.router_margin.min()),
            )
    return None


def random_model(seed: int, model_type: str = QWEN35_MOE) -> RandomModel:
    """Built once a process."""
    return _random_model(seed, model_type)


_random_model = functools.cache(RandomModel)  # to which a default and the same value given are two


def reference_on(case: Case) -> np.ndarray:
    """The reference's own float32 logits [length, vocab]."""
    return reference_logits(random_model(case.seed, case.model_type).reference, case.ids)[0]


def reference_tokens(case: Case) -> list[int]:
    """The reference's greedy continuation."""
    return reference_greedy(random_model(case.seed, case.model_type).reference, case.ids, GREEDY_TOKENS)

"""How sure a measured accuracy is."""

import math


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a success rate.

    Unlike the textbook interval, it stays within [0, 1] and does not collapse to a point when all or
    none of the trials succeed.

    Args:
        successes: how many trials succeeded, 0 to `trials`.
        trials: how many were made, at least 1.
        z: half-width in standard deviations of the normal distribution; 1.96 gives 95 %.

    Returns:
        The lower and upper bound, as fractions.

    Raises:
        ValueError: no trials, or a count of successes that is not within 0 to `trials`.
    """
    if trials < 1:
        raise ValueError(f"an accuracy needs at least one trial, got {trials}")
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes out of {trials} trials is impossible")
    rate = successes / trials
    shrink = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)

"""What a family of contrasts can see with a number of seeds, before there are any numbers.

Differences and margins here are in standard deviations of a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from scipy import special

from orchestrator.results.statistics.contrasts import (
    POWER,
    Contrast,
    Design,
    Estimate,
    simultaneous,
)

MAX_SEEDS = 200  # beyond this, "more than" is answer enough


def foreseen(
    family: Sequence[Contrast], arms: Mapping[str, Sequence[str]], seeds: int, design: Design
) -> list[Estimate]:
    """The estimates of `family` if every arm's seeds spread by exactly 1.

    arms: metric -> the arms that have it. `resolvable` is then the difference that is seen with a
    power of 80%.
    """
    # Evenly spaced values with the sample variance 1.
    step = math.sqrt(12 / (seeds * (seeds + 1))) if seeds > 1 else 0.0
    unit = {seed: step * (seed - (seeds - 1) / 2) for seed in range(seeds)}
    values = {metric: dict.fromkeys(names, unit) for metric, names in arms.items()}
    return simultaneous(family, values, design)


def equivalence_power(margin: float, error: float, quantile: float, df: float) -> float:
    """How often the interval lies inside the margin if there is no difference.

    error: the true standard error. It integrates over the spread that the seeds may show.
    """
    from scipy import integrate

    def inside(probability: float) -> float:
        shown = math.sqrt(special.chdtri(df, 1 - probability) / df) * error
        room = (margin - quantile * shown) / error
        return float(2 * special.ndtr(room) - 1) if room > 0 else 0.0

    return float(integrate.quad(inside, 0.0, 1.0, limit=200)[0])


def seeds_needed(sees: Callable[[int], bool], least: int = 3) -> int:
    """The smallest number of seeds that `sees`; 0 if MAX_SEEDS do not. More seeds see more."""
    high = least
    while not sees(high):
        if high >= MAX_SEEDS:
            return 0
        high = min(2 * high, MAX_SEEDS)
    low = least
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle + 1, high)
    return high


def sees_difference(estimate: Estimate, difference: float) -> bool:
    return estimate.resolvable <= difference


def sees_equivalence(estimate: Estimate, margin: float) -> bool:
    """Whether a true 0 comes out as equivalent with a power of 80%."""
    half = estimate.high - estimate.difference
    if not half < margin:  # also where there is no interval
        return False
    error = half / estimate.quantile
    return equivalence_power(margin, error, estimate.quantile, estimate.df) >= POWER

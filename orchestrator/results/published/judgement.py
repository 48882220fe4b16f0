"""What a published difference of one seed an arm says to a difference of ours. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from orchestrator.results.statistics.contrasts import Estimate
from orchestrator.results.statistics.quantiles import t_quantile
from orchestrator.results.statistics.summary import CONFIDENCE
from orchestrator.results.statistics.verdicts import Verdict

Judgement = Literal["", "contradicts", "consistent", "not resolved"]
Direction = Literal["", "same direction", "opposite"]
Interval = tuple[float, float]


def deviation_of(estimate: Estimate, seeds: Mapping[str, int]) -> float:
    """The standard deviation of a seed behind an interval; NaN without one.

    seeds: arm -> its seeds.
    """
    weights = estimate.contrast.weights
    error = (estimate.high - estimate.low) / 2 / estimate.quantile
    return error / math.sqrt(math.fsum(w * w / seeds[arm] for arm, w in weights.items() if w))


def one_seed_interval(
    difference: float,
    deviation: float,
    df: float,
    weights: Mapping[str, float],
    seeds: Mapping[str, int],
) -> Interval:
    """Where the same contrast lies in 95% of repetitions with one seed an arm.

    Both sides have their noise: ours of a mean over seeds, the other of single seeds. Of two arms
    with n seeds each it is the difference +- t s sqrt(2/n + 2).
    """
    if not df or math.isnan(deviation):
        return math.nan, math.nan
    noise = math.fsum(w * w * (1 / seeds[arm] + 1) for arm, w in weights.items() if w)
    half = t_quantile((1 + CONFIDENCE) / 2, df) * deviation * math.sqrt(noise)
    return difference - half, difference + half


def judgement_of(interval: Interval, published: float, verdict: Verdict) -> Judgement:
    """What our result is to the published one. Empty where there is no interval, or no verdict."""
    low, high = interval
    if math.isnan(low) or math.isnan(published) or not verdict:
        return ""
    # Printed differences have one decimal: on the edge they are inside.
    if not low - 1e-9 <= published <= high + 1e-9:
        return "contradicts"
    return "consistent" if _sign_of(verdict) == _sign(published) else "not resolved"


def direction_of(difference: float, published: float) -> Direction:
    """All that a run of another scale may say. Empty where one of the two has no direction."""
    product = _sign(difference) * _sign(published)
    return "" if not product else "same direction" if product > 0 else "opposite"


def _sign(value: float) -> int:
    return 0 if math.isnan(value) or abs(value) < 1e-9 else 1 if value > 0 else -1


def _sign_of(verdict: Verdict) -> int | None:
    """None for what has no sign. What is equivalent agrees with a published difference of 0."""
    match verdict.partition(",")[0]:
        case "better":
            return 1
        case "worse":
            return -1
        case "equivalent":
            return 0
        case _:
            return None

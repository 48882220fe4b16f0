"""One arm alone: its mean over seeds and the interval of that mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.results.statistics.quantiles import t_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """One metric of one arm, in its own unit (fractions for AP).

    `low`, `high`: interval of the mean, NaN below two seeds.
    """

    mean: float
    deviation: float  # sample standard deviation over seeds, NaN below two
    low: float
    high: float
    by_seed: dict[int, float]


def summarise(by_seed: Mapping[int, float]) -> Summary:
    """Mean, standard deviation and t interval over seeds."""
    values = list(by_seed.values())
    mean, variance = mean_of(values), variance_of(values)
    deviation = math.sqrt(variance)
    half = math.nan
    if len(values) > 1:
        half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * deviation / len(values) ** 0.5
    return Summary(mean, deviation, mean - half, mean + half, dict(by_seed))


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def variance_of(values: Sequence[float]) -> float:
    """The sample variance; NaN below two values."""
    if len(values) < 2:
        return math.nan
    mean = mean_of(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)

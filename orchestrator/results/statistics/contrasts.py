"""Contrasts between arms, and the simultaneous intervals of a family of them.

A value is one seed's metric. The seeds of an arm are repeats: they share a variance with the seeds
of the other arms. Two arms of one seed start from the same sample order, but how far that carries
through a training is not known, and pairs of few seeds pay for it with half the degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from scipy import special

from contract.study import Expected, Variance
from orchestrator.results.statistics.quantiles import (
    bonferroni_quantile,
    correlated,
    max_t_quantile,
)
from orchestrator.results.statistics.summary import CONFIDENCE, mean_of, variance_of

# Whether seeds are blocks: fixed for the program and never per study, because a choice after a look
# at the numbers is a second chance. Blocks pay off above a correlation between arms of one seed of
# 0.58 at 3 seeds and 0.31 at 5 (two arms). Nobody has measured it in 30 blocks yet.
SEEDS_ARE_BLOCKS = False
POWER = 0.8
MAX_DEVIATION_RATIO = 2.0  # of the arms' standard deviations, above which a report says so

Values: TypeAlias = Mapping[str, Mapping[int, float]]  # arm -> seed -> value, of one metric


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of arms' means. The weights add up to 0; those of one sign add up to 1.

    margin: in the metric's unit; 0 asks for no equivalence. expected: what the study foresees; it
    makes no test one-sided.
    """

    name: str
    metric: str
    weights: Mapping[str, float]
    expected: Expected = ""
    margin: float = 0.0


@dataclass(frozen=True)
class Design:
    """What the intervals assume.

    trainings: arm -> the training that it shares with others; an arm without an entry has its own.
    pool: arms whose variance counts; None for all.
    """

    variance: Variance = "pooled"
    trainings: Mapping[str, str] | None = None
    pool: Collection[str] | None = None
    blocks: bool = SEEDS_ARE_BLOCKS

    def training(self, arm: str) -> str:
        return "all" if self.blocks else (self.trainings or {}).get(arm, arm)


@dataclass(frozen=True)
class Estimate:
    """A contrast's difference with its interval; NaN where the seeds give none.

    resolvable: the true difference that this many seeds see with a power of 80%.
    """

    contrast: Contrast
    difference: float
    low: float
    high: float
    resolvable: float
    seeds: int  # of the arm that has the fewest
    df: float
    quantile: float = math.nan  # half of the interval is this many standard errors
    last_quantile: float = math.nan  # of the last look, where there are looks

    @property
    def error(self) -> float:
        """The standard error of the difference."""
        return (self.high - self.difference) / self.quantile


def simultaneous(
    family: Sequence[Contrast],
    values: Mapping[str, Values],
    design: Design | None = None,
    rule: Rule | None = None,
) -> list[Estimate]:
    """The estimates of `family`, whose intervals hold the truth all at once in 95% of studies.

    values: metric -> its values. Max-t over the contrasts of a metric, Bonferroni over the metrics
    and over groups of contrasts with another variance. rule: the quantiles, if not of a fixed
    number of seeds.
    """
    parts = [
        _part(contrast, values.get(contrast.metric, {}), design or Design()) for contrast in family
    ]
    groups = dict.fromkeys(part.group for part in parts if part is not None)
    reaches: dict[str, Reach] = {}
    for group in groups:
        members = [part for part in parts if part is not None and part.group == group]
        found = (rule or _at_once)(members, len(groups))
        reaches |= {part.name: reach for part, reach in zip(members, found, strict=True)}
    return [
        _estimate(contrast, part, reaches.get(contrast.name, Reach()))
        for contrast, part in zip(family, parts, strict=True)
    ]


def _at_once(parts: Sequence[Part], groups: int) -> list[Reach]:
    level = 1 - (1 - CONFIDENCE) / groups
    return [Reach(quantile) for quantile in joint_quantiles(parts, level)]


def plain(
    contrast: Contrast, values: Mapping[str, Values], design: Design | None = None
) -> Estimate:
    """The contrast as if nobody had asked for another one: for exploring, not for a verdict."""
    return simultaneous([contrast], values, design)[0]


def deviation_ratio(arms: Collection[str], values: Values) -> float:
    """The largest of the arms' standard deviations over the smallest; NaN where there is none."""
    spread = [
        variance_of(list(values[arm].values())) for arm in arms if len(values.get(arm, ())) > 1
    ]
    if len(spread) < 2 or min(spread) == 0:
        return math.nan
    return math.sqrt(max(spread) / min(spread))


# --- one contrast -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A contrast's difference and its standard error, before a quantile makes an interval.

    group: contrasts of one group share a variance. weights, per_arm: for their correlation.
    numbers: seeds of the arms that a pooled variance is of; empty for another variance.
    """

    name: str
    group: tuple[str, str]
    difference: float
    error: float
    df: float
    seeds: int
    weights: Mapping[str, float]
    per_arm: Mapping[str, float]  # arm -> 1 / its seeds
    joint: bool  # whether the group's statistics are a multivariate t
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reach:
    """How many standard errors the interval reaches, now and at the last look if there are any."""

    now: float = math.nan
    last: float = math.nan


# The parts of one group, and the number of groups that share the error, to a reach of each.
Rule: TypeAlias = Callable[[Sequence[Part], int], list[Reach]]


def _part(contrast: Contrast, values: Values, design: Design) -> Part | None:
    weights = {arm: weight for arm, weight in contrast.weights.items() if weight}
    if not all(values.get(arm) for arm in weights):
        return None
    trainings = {design.training(arm) for arm in weights}
    if len(trainings) == len(weights):
        return (
            _own(contrast, weights, values)
            if design.variance == "own"
            else _between(contrast, weights, values, design)
        )
    if len(trainings) == 1 and design.variance == "pooled":
        return _within(contrast, weights, values, design, trainings.pop())
    return _by_training(contrast, weights, values, design)


def _between(
    contrast: Contrast, weights: Mapping[str, float], values: Values, design: Design
) -> Part:
    """Arms of different trainings: one variance, pooled over all arms."""
    variance, df = pooled_variance(values, design)
    per_arm = {arm: 1 / len(values[arm]) for arm in weights}
    error = math.sqrt(variance * math.fsum(w * w * per_arm[arm] for arm, w in weights.items()))
    pool = [arm for arm in values if design.pool is None or arm in design.pool]
    alone = len({design.training(arm) for arm in pool}) == len(pool)
    return Part(
        contrast.name,
        (contrast.metric, ""),
        _difference(weights, values),
        error,
        df,
        min(len(values[arm]) for arm in weights),
        weights,
        per_arm,
        joint=True,
        numbers={arm: len(values[arm]) for arm in pool} if alone else {},
    )


def pooled_variance(values: Values, design: Design) -> tuple[float, float]:
    """The variance within arms, and its degrees of freedom; NaN and 0 without a repeat."""
    by_training: dict[str, list[list[float]]] = {}
    for arm, by_seed in values.items():
        if len(by_seed) > 1 and (design.pool is None or arm in design.pool):
            by_training.setdefault(design.training(arm), []).append(list(by_seed.values()))
    total = df = 0.0
    for arms in by_training.values():
        # Arms of one training err together: they count like one arm.
        own = min(map(len, arms)) - 1
        total += own * mean_of([variance_of(arm) for arm in arms])
        df += own
    return (total / df, df) if df else (math.nan, 0.0)


def _own(contrast: Contrast, weights: Mapping[str, float], values: Values) -> Part:
    """Each arm with its own variance: Welch's t, Satterthwaite's degrees of freedom."""
    terms = {
        arm: (
            weight**2 * variance_of(list(values[arm].values())) / len(values[arm]),
            len(values[arm]),
        )
        for arm, weight in weights.items()
    }
    difference = _difference(weights, values)
    return _apart(contrast, difference, list(terms.values()), min(n for _, n in terms.values()))


def _within(
    contrast: Contrast, weights: Mapping[str, float], values: Values, design: Design, training: str
) -> Part:
    """Arms of one training: paired by seed, the variance that of the residuals of arm and seed."""
    pool = values if design.pool is None else {*design.pool, *weights}
    arms = [arm for arm in values if arm in pool and design.training(arm) == training]
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms)))
    table = [[values[arm][seed] for seed in seeds] for arm in arms]
    n, df = len(seeds), (len(arms) - 1) * (len(seeds) - 1)
    if not n:
        group = contrast.metric, training
        nan = math.nan
        return Part(contrast.name, group, nan, nan, 0.0, 0, weights, {}, joint=False)
    residuals = _two_way(table)
    variance = math.fsum(r * r for row in residuals for r in row) / df if df else math.nan
    common = {arm: {seed: values[arm][seed] for seed in seeds} for arm in weights}
    error = math.sqrt(variance * math.fsum(w * w for w in weights.values()) / n)
    return Part(
        contrast.name,
        (contrast.metric, training),
        _difference(weights, common),
        error,
        df,
        n,
        weights,
        dict.fromkeys(weights, 1 / n),
        joint=True,
    )


def _two_way(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """What rows and columns leave over."""
    rows = [mean_of(row) for row in table]
    columns = [mean_of(column) for column in zip(*table, strict=True)]
    whole = mean_of(rows)
    return [
        [value - row - column + whole for value, column in zip(line, columns, strict=True)]
        for line, row in zip(table, rows, strict=True)
    ]


def _by_training(
    contrast: Contrast, weights: Mapping[str, float], values: Values, design: Design
) -> Part:
    """Several arms of several trainings: each training's sum by seed, with its own variance."""
    terms: list[tuple[float, int]] = []
    difference = 0.0
    for training in dict.fromkeys(design.training(arm) for arm in weights):
        arms = [arm for arm in weights if design.training(arm) == training]
        seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms)))
        if not seeds:
            difference = math.nan
            continue
        sums = [math.fsum(weights[arm] * values[arm][seed] for arm in arms) for seed in seeds]
        difference += mean_of(sums)
        terms.append((variance_of(sums) / len(sums), len(sums)))
    return _apart(contrast, difference, terms, min((n for _, n in terms), default=0))


def _apart(
    contrast: Contrast, difference: float, terms: Sequence[tuple[float, int]], seeds: int
) -> Part:
    """terms: the variance of each independent part of the difference, and its seeds."""
    whole = math.fsum(term for term, _ in terms)
    below = math.fsum(term**2 / (n - 1) if n > 1 else math.nan for term, n in terms)
    # Without any spread every number of degrees gives the same interval.
    df = whole**2 / below if below else float(seeds - 1)
    group = (contrast.metric, "each its own variance")
    error = math.sqrt(whole)
    return Part(contrast.name, group, difference, error, df, seeds, {}, {}, joint=False)


def _difference(weights: Mapping[str, float], values: Values) -> float:
    return math.fsum(w * mean_of(list(values[arm].values())) for arm, w in weights.items())


# --- intervals ----------------------------------------------------------------------------------


def joint_quantiles(parts: Sequence[Part], level: float) -> list[float]:
    """The quantile of each part of one group."""
    if not all(part.joint for part in parts):
        return [
            bonferroni_quantile(len(parts), part.df, level) if part.df > 0 else math.nan
            for part in parts
        ]
    arms = list(dict.fromkeys(arm for part in parts for arm in part.weights))
    rows = [[part.weights.get(arm, 0.0) for arm in arms] for part in parts]
    per_arm = {arm: share for part in parts for arm, share in part.per_arm.items()}
    covariance = correlated(rows, [per_arm[arm] for arm in arms])
    # Arms of one training: a contrast that brings an arm of its own has more degrees of freedom.
    return [max_t_quantile(covariance, part.df, level) if part.df else math.nan for part in parts]


def _estimate(contrast: Contrast, part: Part | None, reach: Reach) -> Estimate:
    if part is None:
        return Estimate(contrast, math.nan, math.nan, math.nan, math.nan, seeds=0, df=0.0)
    quantile = reach.now
    half = quantile * part.error
    return Estimate(
        contrast,
        part.difference,
        part.difference - half,
        part.difference + half,
        resolvable(part.error, quantile, part.df),
        part.seeds,
        part.df,
        quantile,
        reach.last,
    )


def resolvable(error: float, quantile: float, df: float, power: float = POWER) -> float:
    """The true difference that lies outside of its interval's reach of 0 with this power."""
    if math.isnan(error) or math.isnan(quantile):
        return math.nan
    return float(special.nctdtrinc(df, 1 - power, quantile)) * error

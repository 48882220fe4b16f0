"""Looks at fixed numbers of seeds: how much of the 5% each may spend, and the quantile it takes.

The spending is alpha t^2 (Kim and DeMets 1987), t the share of the last look's seeds. The quantiles
hold for the pooled t itself: its looks are correlated and its degrees of freedom grow, and a
quantile of z in its place exceeds 5% at few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import special

from orchestrator.results.statistics.contrasts import Part, Reach, joint_quantiles
from orchestrator.results.statistics.quantiles import t_quantile

SPENT = 0.048  # in all looks together, so that the error of the simulation stays below 5%
MIN_POWER = 0.1  # conditional power below which an arm may stop
_STUDIES_LOG2 = 18  # simulated; another generator moves a boundary by about 0.01
_PART = 2**16  # studies at once
_GENERATOR = 1

Numbers = tuple[int, ...]  # seeds of each arm
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LookAt:
    """One look of a group of contrasts that share a pooled variance.

    numbers: seeds of each arm then. as_if: the same if no look had stopped an arm. rows: weights by
    arm of all contrasts, be they settled or not: an arm that stops is no arm at random, and with a
    smaller family five arms would be wrong in 8% of studies.
    """

    numbers: Numbers
    as_if: Numbers
    rows: tuple[tuple[float, ...], ...]


def spent(seeds: int, most: int, level: float = SPENT) -> float:
    """The error spent up to the look at `seeds`, this one included."""
    return level * (seeds / most) ** 2


@lru_cache(maxsize=512)
def boundaries(looks: tuple[LookAt, ...], spending: tuple[float, ...]) -> tuple[float, ...]:
    """For each look the q that |t| of a contrast must exceed.

    spending: error spent up to each look. If no arm differs, some contrast of some look exceeds its
    q in that share of studies.
    """
    largest = _largest(looks)
    alive = np.ones(len(largest), dtype=np.bool_)
    found: list[float] = []
    for k, look in enumerate(looks):
        # The studies that no look has called yet, of which this one may call its share.
        share = (spending[k] - (spending[k - 1] if k else 0.0)) * len(largest)
        if not k and len(look.rows) == 1:  # the tail of a single t is known, and far out
            df = sum(look.numbers) - sum(n > 0 for n in look.numbers)
            found.append(t_quantile(1 - spending[0] / 2, df))
        else:
            values = np.sort(largest[alive, k])
            found.append(float(values[-max(1, round(share))]))
        alive &= largest[:, k] <= found[k]
    return tuple(found)


def _largest(looks: Sequence[LookAt]) -> NDArray[np.float64]:
    """The largest |t| of each look, of many studies without any difference."""
    # A generator for each part: a look comes out the same whatever looks follow it.
    parts = range(2**_STUDIES_LOG2 // _PART)
    return np.concatenate(
        [_simulated(looks, _PART, np.random.default_rng([_GENERATOR, part])) for part in parts]
    )


def _simulated(
    looks: Sequence[LookAt], studies: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A mean for each arm and one sum of squares stand for the seeds: nothing else counts."""
    arms = len(looks[0].numbers)
    mean, squares, df = np.zeros((studies, arms)), np.zeros(studies), 0.0
    before, seen = np.zeros(arms), np.zeros(arms)
    result = np.empty((studies, len(looks)))
    for k, look in enumerate(looks):
        now = np.asarray(look.as_if, dtype=np.float64)
        new = now - before
        for arm in np.flatnonzero(new):
            away = rng.standard_normal(studies) / math.sqrt(new[arm]) - mean[:, arm]
            if look.numbers[arm] > seen[arm]:  # of an arm that has stopped no spread is seen
                squares += before[arm] * new[arm] / now[arm] * away**2
            mean[:, arm] += new[arm] / now[arm] * away
        added = np.asarray(look.numbers, dtype=np.float64) - seen
        if within := np.maximum(added - 1, 0).sum():
            squares += rng.chisquare(within, studies)
        df += within + np.count_nonzero((added > 0) & (seen > 0))
        before, seen = now, seen + added
        rows = np.asarray(look.rows)
        error = np.sqrt((rows[:, now > 0] ** 2 / now[now > 0]).sum(axis=1))
        result[:, k] = (np.abs(mean @ rows.T) / error).max(axis=1) / np.sqrt(squares / df)
    return result


def conditional_power(
    difference: Array, error: Array, share: float, quantile: float, margin: float = 0.0
) -> Array:
    """How likely the last look settles a contrast, if the truth is as far out as one error allows.

    That is Pepe and Anderson's (1992) hopeful trend: after three seeds the trend itself is so
    uncertain that stopping on it would cost much of the power. error: the standard error now.
    share: of the last look's seeds that there are, below 1. quantile: of the last look.
    """
    reach = quantile * error * math.sqrt(share)
    left = error * math.sqrt(share * (1 - share))  # sd of what is to come
    best = np.zeros_like(difference)
    for truth in (difference - error, difference, difference + error):
        mean = share * difference + (1 - share) * truth
        power = special.ndtr((mean - reach) / left) + special.ndtr((-mean - reach) / left)
        room = np.maximum(margin - reach, 0.0)
        power += np.where(
            room > 0, special.ndtr((room - mean) / left) - special.ndtr((-room - mean) / left), 0.0
        )
        best = np.maximum(best, power)
    return np.asarray(best)


# --- the quantiles of a family ------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """One look of a study. seeds: for which it was planned. numbers: seeds of each arm then.

    stopped: the arms that took no more seeds after it.
    """

    seeds: int
    numbers: Mapping[str, int]
    stopped: Collection[str] = ()


@dataclass(frozen=True)
class LookRule:
    """The reach of each contrast at the look at `planned[len(past)]` seeds, as a `Rule`.

    past: the looks before. closed: contrasts that this look no longer tests.
    """

    planned: tuple[int, ...]
    past: tuple[Taken, ...] = ()
    closed: frozenset[str] = frozenset()

    def __call__(self, parts: Sequence[Part], groups: int) -> list[Reach]:
        spending = tuple(spent(n, self.planned[-1], SPENT / groups) for n in self.planned)
        numbers = parts[0].numbers
        known = [part for part in parts if part.weights.keys() <= numbers.keys()]
        # A past look in which an arm had no seed yet is rare, and the bound holds for it too.
        whole = all(past.numbers.get(arm, 0) > 1 for past in self.past for arm in numbers)
        if known and whole and part_df(known[0]) == known[0].df:
            names = self._pooled(known, numbers, spending)
        else:
            names = self._apart(parts, spending)
        return [
            Reach() if part.name in self.closed else names.get(part.name, Reach()) for part in parts
        ]

    def _pooled(
        self, known: Sequence[Part], numbers: Mapping[str, int], spending: tuple[float, ...]
    ) -> dict[str, Reach]:
        arms = list(numbers)
        rows = tuple(tuple(part.weights.get(arm, 0.0) for arm in arms) for part in known)
        looks: list[LookAt] = []
        stopped: set[str] = set()
        for k, planned in enumerate(self.planned):
            past = self.past[k] if k < len(self.past) else None
            then = past.numbers if past else numbers
            # A trial that was tried again since may have added a seed to a past look, or the other
            # way round: a number never falls.
            actual = {arm: min(then[arm], numbers[arm]) for arm in arms}
            if k > len(self.past):  # what is to come, as planned: it moves no quantile of today
                actual |= {arm: max(n, planned) for arm, n in actual.items() if arm not in stopped}
            as_if = {a: max(n, planned) if a in stopped else n for a, n in actual.items()}
            looks.append(LookAt(tuple(actual.values()), tuple(as_if.values()), rows))
            stopped |= set(past.stopped) if past else set()
        found = boundaries(tuple(looks), spending)
        return {part.name: Reach(found[len(self.past)], found[-1]) for part in known}

    def _apart(self, parts: Sequence[Part], spending: tuple[float, ...]) -> dict[str, Reach]:
        """Other variances: each look by itself within what it may spend, which is a bound."""
        shares = [now - before for before, now in pairwise((0.0, *spending))]
        now = joint_quantiles(parts, 1 - shares[len(self.past)])
        last = joint_quantiles(parts, 1 - shares[-1])
        names = (part.name for part in parts)
        return {n: Reach(*pair) for n, pair in zip(names, zip(now, last, strict=True), strict=True)}


def part_df(part: Part) -> int:
    """The degrees of freedom of a variance that is pooled over arms of their own trainings."""
    return sum(n - 1 for n in part.numbers.values())

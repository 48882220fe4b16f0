"""What a number of seeds can see, against scipy's noncentral t and published sample sizes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.results.statistics.contrasts import Contrast, Design
from orchestrator.results.statistics.power import (
    equivalence_power,
    foreseen,
    seeds_needed,
    sees_difference,
    sees_equivalence,
)

TWO = [Contrast("c", "m", {"a": 1.0, "b": -1.0})]
ARMS = {"m": ["a", "b"]}


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_resolvable_difference_is_statsmodels_effect_size(seeds: int) -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    (estimate,) = foreseen(TWO, ARMS, seeds, Design())
    theirs = power.TTestIndPower().solve_power(nobs1=seeds, alpha=0.05, power=0.8)
    assert estimate.resolvable == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(("margin", "seeds"), [(1.0, 23), (2.0, 7)])
def test_equivalence_takes_so_many_seeds(margin: float, seeds: int) -> None:
    needed = seeds_needed(lambda n: sees_equivalence(foreseen(TWO, ARMS, n, Design())[0], margin))
    assert needed == seeds


def test_the_power_of_equivalence_is_that_of_random_studies() -> None:
    rng = np.random.default_rng(0)
    n, margin, q = 10, 1.2, stats.t.ppf(0.975, 18)
    values = rng.standard_normal((20_000, 2, n))
    difference = values[:, 0].mean(1) - values[:, 1].mean(1)
    half = q * np.sqrt(values.var(axis=2, ddof=1).mean(1) * 2 / n)
    share = (np.abs(difference) + half < margin).mean()
    assert equivalence_power(margin, np.sqrt(2 / n), q, 18) == pytest.approx(share, abs=0.01)


def test_more_contrasts_take_more_seeds() -> None:
    family = [Contrast(f"c{i}", "m", {f"a{i}": 1.0, "b": -1.0}) for i in range(4)]
    arms = {"m": ["b", *(f"a{i}" for i in range(4))]}

    def needed(asked: list[Contrast]) -> int:
        return seeds_needed(lambda n: sees_difference(foreseen(asked, arms, n, Design())[0], 1.5))

    assert needed(family[:1]) < needed(family)
    assert seeds_needed(lambda n: n >= 9) == 9
    assert seeds_needed(lambda n: False) == 0
    assert foreseen(TWO, ARMS, 1, Design())[0].seeds == 1

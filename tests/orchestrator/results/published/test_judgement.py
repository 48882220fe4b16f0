"""The paper's single seeds beside our means: hand-computed numbers, and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.results.published.judgement import (
    deviation_of,
    direction_of,
    judgement_of,
    one_seed_interval,
)
from orchestrator.results.statistics.contrasts import Contrast, plain

WEIGHTS = {"align": 1.0, "pool": -1.0}
NAN = math.nan


def test_the_interval_of_one_seed_is_the_formula_by_hand() -> None:
    # t of 4 degrees is 2.7764; 2.7764 * 0.2 * sqrt(2/3 + 2) = 0.9068
    low, high = one_seed_interval(3.0, 0.2, 4, WEIGHTS, {"align": 3, "pool": 3})
    assert (low, high) == pytest.approx((3 - 0.9068, 3 + 0.9068), abs=1e-4)
    half = stats.t.ppf(0.975, 7) * 0.3 * math.sqrt(1 / 5 + 1 / 4 + 2)
    low, high = one_seed_interval(1.0, 0.3, 7, WEIGHTS, {"align": 5, "pool": 4})
    assert high - 1.0 == pytest.approx(half)
    # an interaction of four arms has four single seeds on the paper's side
    weights = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    low, high = one_seed_interval(0.0, 1.0, 8, weights, dict.fromkeys(weights, 3))
    assert high == pytest.approx(stats.t.ppf(0.975, 8) * math.sqrt(4 / 3 + 4))


def test_the_deviation_of_a_seed_is_the_pooled_one() -> None:
    values = {"align": {0: 0.31, 1: 0.33, 2: 0.32}, "pool": {0: 0.27, 1: 0.275, 2: 0.28, 3: 0.30}}
    estimate = plain(Contrast("", "segm/AP", WEIGHTS), {"segm/AP": values})
    spread = deviation_of(estimate, {"align": 3, "pool": 4})
    lists = [list(arm.values()) for arm in values.values()]
    pooled = sum(np.var(arm, ddof=1) * (len(arm) - 1) for arm in lists) / 5
    assert spread == pytest.approx(math.sqrt(pooled))
    # and one repetition of the whole, simulated, lies inside in 95% of cases
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(20_000, 3, 2))
    single = generator.normal(size=(20_000, 2))
    sd = np.sqrt(draws.var(axis=1, ddof=1).mean(axis=1))
    half = stats.t.ppf(0.975, 4) * sd * math.sqrt(2 / 3 + 2)
    means = draws.mean(axis=1)
    apart = np.abs(means[:, 0] - means[:, 1] - single[:, 0] + single[:, 1])
    assert float((apart < half).mean()) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize(
    ("interval", "published", "verdict", "judged"),
    [
        ((2.0, 4.0), 3.4, "better", "consistent"),
        ((2.0, 4.0), 4.0, "better", "consistent"),  # on the edge is inside
        ((2.0, 4.0), 4.1, "better", "contradicts"),
        ((-1.0, 4.0), 3.4, "not resolved", "not resolved"),
        ((-1.0, 4.0), 3.4, "better, by less than the margin", "consistent"),
        ((-4.0, 1.0), -3.0, "worse", "consistent"),
        ((-1.0, 4.0), -0.5, "better", "not resolved"),  # inside, and of the other sign
        ((-0.5, 0.5), 0.0, "equivalent", "consistent"),
        ((-0.5, 0.5), 0.3, "equivalent", "not resolved"),
        ((2.0, 4.0), 9.0, "", ""),  # withheld
        ((NAN, NAN), 3.4, "better", ""),
        ((2.0, 4.0), NAN, "better", ""),
    ],
)
def test_the_judgement(
    interval: tuple[float, float], published: float, verdict: str, judged: str
) -> None:
    assert judgement_of(interval, published, verdict) == judged  # type: ignore[arg-type]


def test_without_a_spread_there_is_no_interval() -> None:
    assert math.isnan(one_seed_interval(1.0, NAN, 0, WEIGHTS, {"align": 1, "pool": 1})[0])


def test_a_direction_needs_two_signs() -> None:
    given = [direction_of(*pair) for pair in ((1, 2), (1, -2), (0, 2), (NAN, 1))]
    assert given == ["same direction", "opposite", "", ""]

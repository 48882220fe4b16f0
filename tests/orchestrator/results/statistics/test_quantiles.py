"""Quantiles against printed tables, against scipy's Dunnett and Tukey, and against themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.results.statistics.quantiles import (
    bonferroni_quantile,
    correlated,
    max_t_quantile,
    t_quantile,
)


def against_control(arms: int) -> list[list[float]]:
    return [[float(i == j) - float(j == 0) for j in range(arms)] for i in range(1, arms)]


# Two-sided 95% points of Student's t, as printed in any statistics book.
@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)],
)
def test_t_quantiles_are_the_books(df: int, t: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(t, abs=5e-4)
    assert max_t_quantile(np.array([[2.0]]), df, 0.95) == pytest.approx(t, abs=5e-4)


# Dunnett's two-sided 5% points (Dunnett 1964, table II): number of treatments and df.
@pytest.mark.parametrize(
    ("treatments", "df", "d"), [(2, 6, 2.86), (4, 10, 2.89), (2, 20, 2.38), (9, 20, 2.95)]
)
def test_a_common_control_gives_dunnetts_table(treatments: int, df: int, d: float) -> None:
    arms = treatments + 1
    covariance = correlated(against_control(arms), [1.0] * arms)
    assert max_t_quantile(covariance, df, 0.95) == pytest.approx(d, abs=0.006)


@pytest.mark.parametrize(("arms", "df"), [(3, 6), (4, 12)])
def test_all_pairs_give_tukeys_range(arms: int, df: int) -> None:
    pairs = [
        [float(j == a) - float(j == b) for j in range(arms)]
        for a in range(arms)
        for b in range(a + 1, arms)
    ]
    tukey = stats.studentized_range.ppf(0.95, arms, df) / np.sqrt(2)
    assert max_t_quantile(correlated(pairs, [1.0] * arms), df, 0.95) == pytest.approx(
        tukey, abs=0.005
    )


def test_a_contrast_and_its_negative_are_one() -> None:
    rows = [[1.0, -1.0], [-1.0, 1.0], [2.0, -2.0]]
    assert max_t_quantile(correlated(rows, [0.2, 0.3]), 7, 0.95) == t_quantile(0.975, 7)


def test_a_quantile_is_the_same_every_time_and_below_bonferronis() -> None:
    from orchestrator.results.statistics import quantiles

    covariance = correlated(against_control(4), [1 / 3, 1 / 5, 1 / 3, 1 / 4])
    first = max_t_quantile(covariance, 9, 0.95)
    quantiles._quantile.cache_clear()
    assert max_t_quantile(covariance, 9, 0.95) == first
    assert t_quantile(0.975, 9) < first < bonferroni_quantile(3, 9, 0.95)

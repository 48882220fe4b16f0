"""False verdicts by simulation, and that the simulation is of the intervals of a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.error_rates import (
    draw,
    intervals,
    look_markdown,
    look_power,
    look_rates,
    markdown,
    power,
    rates,
)
from orchestrator.results.statistics.contrasts import Contrast, simultaneous

GUIDE = Path(__file__).parents[4] / "docs" / "statistics.md"


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (5, 4)])
def test_the_simulated_intervals_are_the_reports(arms: int, seeds: int) -> None:
    values = draw(arms, seeds, studies=5, ratio=2.0)
    difference, half = intervals(values)
    for study in range(5):
        by_metric = {
            str(m): {str(a): dict(enumerate(map(float, values[study, m, a]))) for a in range(arms)}
            for m in range(values.shape[1])
        }
        family = [
            Contrast(f"{m}-{a}", m, {str(a): 1.0, "0": -1.0})
            for m in by_metric
            for a in range(1, arms)
        ]
        estimates = simultaneous(family, by_metric)
        np.testing.assert_allclose([e.difference for e in estimates], difference[study].ravel())
        halves = np.broadcast_to(half[study], difference[study].shape).ravel()
        np.testing.assert_allclose([e.high - e.difference for e in estimates], halves)


@pytest.mark.slow
def test_at_most_five_percent_of_studies_have_a_false_verdict() -> None:
    all_rates = [rates(arms, seeds) for arms in (2, 5) for seeds in (3, 5, 10)]
    all_power = [power(seeds) for seeds in (3, 5, 7, 10, 23)]
    for one in all_rates:
        assert max(one.primary, one.equal) <= 5.3  # the upper bound of 5% at 20,000 studies
    for seeds in all_power:
        assert seeds.coverage >= 94.7
    assert all_power[0].three == pytest.approx(78, abs=1)
    assert markdown(all_rates, all_power).split("\n\n")[0] in GUIDE.read_text()
    assert markdown(all_rates, all_power).split("\n\n")[1] in GUIDE.read_text()


@pytest.mark.slow
def test_all_looks_together_have_at_most_five_percent_false_verdicts() -> None:
    all_rates = [look_rates(arms) for arms in (2, 5)]
    all_power = [look_power(effect) for effect in (0, 1, 2, 3)]
    assert all(one.equal <= 5.3 for one in all_rates)  # as above
    assert [one.saved for one in all_power] == pytest.approx([0.1, 1.0, 3.6, 5.2], abs=0.15)
    for table in look_markdown(all_rates, all_power).split("\n\n"):
        assert table in GUIDE.read_text()

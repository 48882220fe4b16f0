"""One arm's mean and its interval, by hand."""

from __future__ import annotations

import math

import pytest

from orchestrator.results.statistics.summary import summarise


def test_a_summary_by_hand() -> None:
    # 1, 2, 3: mean 2, sd 1, interval 2 +- 4.3027 / sqrt 3.
    summary = summarise({0: 1.0, 1: 2.0, 2: 3.0})
    assert (summary.mean, summary.deviation) == (2.0, 1.0)
    assert summary.high - summary.mean == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    summary = summarise({4: 0.3})
    assert summary.mean == 0.3
    assert math.isnan(summary.deviation)
    assert math.isnan(summary.low)

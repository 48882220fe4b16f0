"""One interval decides: every place that it can take has its word."""

from __future__ import annotations

import math

import pytest

from orchestrator.results.statistics.verdicts import verdict_of


@pytest.mark.parametrize(
    ("low", "high", "margin", "said"),
    [
        (0.1, 1.1, 0.0, "better"),
        (-1.1, -0.1, 0.0, "worse"),
        (-0.1, 1.1, 0.0, "not resolved"),
        (-0.1, 0.1, 0.0, "not resolved"),  # equal is a word that only a margin allows
        (-0.4, 0.6, 1.0, "equivalent"),
        (-0.4, 1.6, 1.0, "not resolved"),
        (0.2, 0.6, 1.0, "better, by less than the margin"),
        (-0.6, -0.2, 1.0, "worse, by less than the margin"),
        (0.2, 1.6, 1.0, "better"),
        (-1.0, 1.0, 1.0, "not resolved"),  # the margin itself is outside
        (0.0, 0.5, 0.0, "not resolved"),
        (math.nan, math.nan, 1.0, ""),
    ],
)
def test_words(low: float, high: float, margin: float, said: str) -> None:
    assert verdict_of(low, high, margin) == said

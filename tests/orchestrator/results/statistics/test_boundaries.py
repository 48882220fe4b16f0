"""Boundaries of looks: that they spend what they may, and the arms that they stop."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.error_rates import PLANNED, draw, looks
from orchestrator.results.statistics.boundaries import (
    LookAt,
    LookRule,
    Taken,
    boundaries,
    conditional_power,
    spent,
)
from orchestrator.results.statistics.contrasts import Contrast, Design, simultaneous

TWO = tuple(LookAt((n, n), (n, n), ((1.0, -1.0),)) for n in PLANNED)
SPENDING = tuple(spent(seeds, 10) for seeds in PLANNED)


def test_two_arms_at_3_5_7_and_10_seeds() -> None:
    # alpha t^2: 0.43, 1.2, 2.35 and 4.8% of the error are spent by then.
    np.testing.assert_allclose(SPENDING, [0.00432, 0.012, 0.02352, 0.048])
    np.testing.assert_allclose(boundaries(TWO, SPENDING), [5.75, 3.44, 2.80, 2.28], rtol=0.02)


def test_a_look_comes_out_the_same_whatever_looks_follow() -> None:
    assert boundaries(TWO[:2], SPENDING) == boundaries(TWO, SPENDING)[:2]


def test_other_variances_take_each_look_within_its_own_share() -> None:
    contrast = Contrast("c", "m", {"a": 1.0, "b": -1.0})
    values = {"m": {"a": {0: 1.0, 1: 2.0, 2: 3.5}, "b": {0: 1.0, 1: 1.1, 2: 1.3}}}
    rule = LookRule(PLANNED)
    own, pooled = (
        simultaneous([contrast], values, Design(variance), rule)[0]
        for variance in ("own", "pooled")
    )
    assert pooled.quantile == pytest.approx(5.827, abs=0.001)
    assert own.df < pooled.df
    assert own.quantile > pooled.quantile
    later = LookRule(PLANNED, (Taken(3, {"a": 0, "b": 0}),))
    bound = simultaneous([contrast], values, Design(), later)[0]
    assert bound.quantile == pytest.approx(4.965, abs=0.001)  # t, 0.768%, df 4


@pytest.mark.parametrize(
    ("difference", "seeds", "hopeful"), [(0.0, 3, True), (0.0, 7, False), (1.0, 7, True)]
)
def test_an_arm_stops_where_even_a_hopeful_trend_would_not_settle_it(
    difference: float, seeds: int, hopeful: bool
) -> None:
    error = np.array([(2 / seeds) ** 0.5])
    power = conditional_power(np.array([difference]), error, seeds / 10, 2.3)[0]
    assert bool(power > 0.1) is hopeful
    wide = conditional_power(np.array([difference]), error, seeds / 10, 2.3, margin=3.0)[0]
    assert wide > power  # it may come out as equivalent too


def test_the_simulated_looks_are_those_of_a_family() -> None:
    values = draw(3, 10, 3, ratio=2.0, metrics=1)[:, 0]
    values[:, 1] += 4.0
    called, taken = looks(values)
    family = [Contrast(str(i), "m", {str(i): 1.0, "0": -1.0}) for i in (1, 2)]
    for study in range(3):
        past: tuple[Taken, ...] = ()
        stops: dict[str, int] = {}
        for seeds in PLANNED:
            if len(stops) == 2:
                break
            numbers = {str(arm): stops.get(str(arm), seeds) for arm in range(3)}
            table = {
                arm: dict(enumerate(map(float, values[study, int(arm), :n])))
                for arm, n in numbers.items()
            }
            rule = LookRule(PLANNED, past, frozenset(stops))
            for one in simultaneous(family, {"m": table}, Design(), rule):
                name = one.contrast.name
                if name in stops:
                    continue
                hit = one.low > 0 or one.high < 0
                assert bool(called[study, int(name) - 1]) or not hit
                now = np.array([one.difference]), np.array([one.error])
                hopeless = seeds < 10 and (
                    conditional_power(*now, seeds / 10, one.last_quantile)[0] < 0.1
                )
                if hit or hopeless or seeds == 10:
                    stops[name] = seeds
            past += (Taken(seeds, numbers, [n for n, stop in stops.items() if stop == seeds]),)
        assert [stops[name] for name in ("1", "2")] == taken[study].tolist()

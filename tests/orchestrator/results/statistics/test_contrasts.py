"""Simultaneous intervals against scipy, by hand, and where a seed or an arm is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.results.statistics.contrasts import (
    Contrast,
    Design,
    Estimate,
    Values,
    deviation_ratio,
    plain,
    resolvable,
    simultaneous,
)
from orchestrator.results.statistics.quantiles import t_quantile

BASE = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 3.0, 1: 5.0, 2: 7.0}}
B_MINUS_A = Contrast("b", "m", {"b": 1.0, "a": -1.0})


def random_arms(seed: int, arms: int = 4, seeds: int = 5) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, seeds + 1, arms)
    return {
        f"arm-{i}": dict(enumerate(map(float, rng.normal(rng.normal(0, 1), 1, n))))
        for i, n in enumerate(sizes)
    }


def minus_first(values: Values) -> list[Contrast]:
    first, *others = values
    return [Contrast(arm, "m", {arm: 1.0, first: -1.0}) for arm in others]


def one(contrast: Contrast, values: Values, design: Design | None = None) -> Estimate:
    return plain(contrast, {"m": values}, design)


# scipy's own interval is a random sum, and says itself when it is off by more than 1%.
@pytest.mark.filterwarnings("ignore:Computation of the confidence interval did not converge")
@pytest.mark.parametrize("seed", range(3))
def test_arms_against_a_reference_are_dunnetts(seed: int) -> None:
    values = random_arms(seed)
    estimates = simultaneous(minus_first(values), {"m": values})
    control, *samples = [list(by_seed.values()) for by_seed in values.values()]
    theirs = stats.dunnett(*samples, control=control, rng=np.random.default_rng(0))
    interval = theirs.confidence_interval()
    halves = [e.high - e.difference for e in estimates]
    np.testing.assert_allclose(halves, (interval.high - interval.low) / 2, rtol=0.015)
    np.testing.assert_allclose(
        [e.low + h for e, h in zip(estimates, halves, strict=True)],
        (interval.high + interval.low) / 2,
        atol=1e-9,
    )
    for estimate, p in zip(estimates, theirs.pvalue, strict=True):
        assert (estimate.low > 0 or estimate.high < 0) == (p < 0.05)


@pytest.mark.parametrize("seed", range(5))
def test_two_arms_are_students_and_welchs(seed: int) -> None:
    values = random_arms(seed, arms=2)
    (contrast,) = minus_first(values)
    reference, arm = (list(by_seed.values()) for by_seed in values.values())
    for design, equal in ((Design(), True), (Design(variance="own"), False)):
        mine = one(contrast, values, design)
        theirs = stats.ttest_ind(arm, reference, equal_var=equal)
        interval = theirs.confidence_interval()
        assert (mine.low, mine.high) == pytest.approx((interval.low, interval.high))
        assert mine.df == pytest.approx(theirs.df)


def test_a_difference_by_hand() -> None:
    # Variances 1 and 4: pooled 2.5, standard error sqrt(2.5 * 2/3), 4 degrees of freedom.
    estimate = one(B_MINUS_A, BASE)
    half = 2.77645 * math.sqrt(2.5 * 2 / 3)
    assert (estimate.difference, estimate.seeds, estimate.df) == (3.0, 3, 4)
    assert (estimate.low, estimate.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)


def test_a_third_arm_adds_degrees_of_freedom_and_not_a_difference() -> None:
    more = {**BASE, "c": {0: 9.0, 1: 9.5, 2: 10.0}}
    assert (one(B_MINUS_A, more).difference, one(B_MINUS_A, more).df) == (3.0, 6)
    left_out = one(B_MINUS_A, more, Design(pool=["a", "b"]))
    assert left_out == one(B_MINUS_A, BASE)


def test_an_interaction_by_hand() -> None:
    values = {
        "none": {0: 0.0, 1: 2.0},
        "mask": {0: 1.0, 1: 3.0},
        "kp": {0: 4.0, 1: 6.0},
        "both": {0: 7.0, 1: 9.0},
    }
    weights = {"both": 1.0, "kp": -1.0, "mask": -1.0, "none": 1.0}
    estimate = one(Contrast("x", "m", weights), values)
    # (8 - 5) - (2 - 1) = 2; every variance is 2, so the standard error is sqrt(4 * 2 / 2) = 2.
    assert (estimate.difference, estimate.df) == (2.0, 4)
    assert estimate.high - 2.0 == pytest.approx(2 * t_quantile(0.975, 4))


def test_metrics_share_the_five_percent() -> None:
    family = [B_MINUS_A, Contrast("n", "n", B_MINUS_A.weights)]
    first, second = simultaneous(family, {"m": BASE, "n": BASE})
    half = t_quantile(1 - 0.025 / 2, 4) * math.sqrt(2.5 * 2 / 3)
    assert (first.high - 3.0, second.high - 3.0) == pytest.approx((half, half))


def test_own_variances_of_a_family_are_bonferronis() -> None:
    values = {**BASE, "c": {0: 0.0, 1: 4.0, 2: 8.0}}
    family = minus_first(values)
    joint = simultaneous(family, {"m": values}, Design(variance="own"))
    alone = [one(contrast, values, Design(variance="own")) for contrast in family]
    for mine, single in zip(joint, alone, strict=True):
        error = (single.high - single.difference) / t_quantile(0.975, single.df)
        assert mine.high - mine.difference == pytest.approx(
            error * t_quantile(1 - 0.025 / 2, single.df)
        )


def test_arms_of_one_training_are_paired() -> None:
    # The seeds differ by 10, the two arms of one training by 1 +- 0.1: pairs see that, arms cannot.
    values = {
        "argmax": {0: 10.0, 1: 20.0, 2: 30.0},
        "softmax": {0: 10.9, 1: 21.0, 2: 31.1},
        "other": {0: 11.0, 1: 19.0, 2: 30.0},
    }
    trainings = {"argmax": "t", "softmax": "t"}
    contrast = Contrast("x", "m", {"softmax": 1.0, "argmax": -1.0})
    paired = one(contrast, values, Design(trainings=trainings))
    theirs = stats.ttest_rel([10.9, 21.0, 31.1], [10.0, 20.0, 30.0]).confidence_interval()
    assert (paired.low, paired.high) == pytest.approx((theirs.low, theirs.high))
    assert one(contrast, values).low < 0 < paired.low
    # One of them against another training is no pair, and their common variance counts once.
    across = one(
        Contrast("y", "m", {"softmax": 1.0, "other": -1.0}), values, Design(trainings=trainings)
    )
    assert across.df == 4


def test_groups_of_another_variance_share_the_five_percent() -> None:
    values = {**BASE, "b2": {0: 3.1, 1: 5.0, 2: 7.3}}
    design = Design(trainings={"b": "t", "b2": "t"})
    within = Contrast("w", "m", {"b2": 1.0, "b": -1.0})
    alone = one(within, values, design)
    joint = simultaneous([within, B_MINUS_A], {"m": values}, design)[0]
    ratio = (joint.high - joint.difference) / (alone.high - alone.difference)
    assert ratio == pytest.approx(t_quantile(1 - 0.0125, 2) / t_quantile(0.975, 2))


def test_a_mixed_contrast_takes_each_trainings_own_variance() -> None:
    values = {**BASE, "b2": {0: 4.0, 1: 5.5, 2: 8.5}, "a2": {0: 1.5, 1: 2.5, 2: 3.0}}
    design = Design(trainings={"b": "t", "b2": "t"})
    weights = {"b2": 1.0, "b": -1.0, "a2": -1.0, "a": 1.0}
    estimate = one(Contrast("x", "m", weights), values, design)
    pairs = [1.0, 0.5, 1.5]
    assert estimate.difference == pytest.approx(np.mean(pairs) - (7 / 3 - 2))
    spread = np.var(pairs, ddof=1) / 3 + 1 / 3 + np.var([1.5, 2.5, 3.0], ddof=1) / 3
    error = (estimate.high - estimate.difference) / t_quantile(0.975, estimate.df)
    assert error == pytest.approx(math.sqrt(spread))


def test_seeds_as_blocks_are_the_paired_t_test() -> None:
    blocks = one(B_MINUS_A, BASE, Design(blocks=True))
    theirs = stats.ttest_rel([3.0, 5.0, 7.0], [1.0, 2.0, 3.0]).confidence_interval()
    assert (blocks.low, blocks.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("variance", ["pooled", "own"])
def test_too_few_seeds_give_a_difference_without_an_interval(variance: str) -> None:
    design = Design(variance=variance)  # type: ignore[arg-type]
    single = one(B_MINUS_A, {"a": {0: 1.0}, "b": {0: 3.0}}, design)
    assert single.difference == 2.0
    assert math.isnan(single.low)
    assert math.isnan(single.resolvable)
    nothing = one(B_MINUS_A, {"a": {0: 1.0}}, design)
    assert math.isnan(nothing.difference)
    assert nothing.seeds == 0


@pytest.mark.parametrize("variance", ["pooled", "own"])
def test_seeds_without_any_spread_give_a_point(variance: str) -> None:
    values = {"a": dict.fromkeys(range(3), 1.0), "b": dict.fromkeys(range(3), 3.0)}
    estimate = one(B_MINUS_A, values, Design(variance=variance))  # type: ignore[arg-type]
    assert (estimate.low, estimate.high, estimate.resolvable) == (2.0, 2.0, 0.0)


def test_pooling_sees_at_three_seeds_what_pairs_do_not() -> None:
    """0.6 AP at a seed sd of 0.2: power 51% of the paired t test, 78% of the pooled one."""
    error = 0.2 * math.sqrt(2 / 3)
    for df, power in ((2, 0.51), (4, 0.78)):
        q = t_quantile(0.975, df)
        assert stats.nct.sf(q, df, 0.6 / error) == pytest.approx(power, abs=0.005)
    seen = resolvable(error, q, 4)
    assert stats.nct.sf(q, 4, seen / error) == pytest.approx(0.8, abs=1e-4)


def test_the_ratio_of_deviations() -> None:
    assert deviation_ratio(["a", "b"], BASE) == 2.0
    assert math.isnan(deviation_ratio(["a"], BASE))


def test_contrasts_of_one_training_do_not_depend_on_their_order() -> None:
    """One arm has not learned: only its own contrast counts its seeds."""
    rng = np.random.default_rng(0)
    values = {"m": {arm: dict(enumerate(0.3 + 0.01 * rng.normal(size=3))) for arm in "abu"}}
    design = Design(trainings=dict.fromkeys("abu", "a"), pool=("a", "b"))
    family = [Contrast(arm, "m", {arm: 1.0, "a": -1.0}) for arm in "bu"]
    forward, backward = (
        {one.contrast.name: one for one in simultaneous(order, values, design)}
        for order in (family, family[::-1])
    )
    for name, one in forward.items():
        assert (one.low, one.high) == pytest.approx((backward[name].low, backward[name].high))

"""Statistics against numbers by hand and of published tables; verdicts only where they are due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.answers import TrialView
from contract.attempt import Event
from orchestrator.results.statistics import (
    compare_arms,
    difference,
    holm,
    sign_flip_p,
    summarise,
    t_quantile,
    t_two_sided,
)
from tests.orchestrator.studies import finished

POOL, ALIGN = {"roi": "pool"}, {"roi": "align"}


# Two-sided 95% points of Student's t, as printed in any statistics book.
@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)],
)
def test_t_quantiles_are_the_books(df: int, t: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(t, abs=5e-4)


def test_t_tails_have_their_closed_forms() -> None:
    # df 1 is Cauchy: P(|T| >= 1) = 1/2. df 2: P(|T| >= t) = 1 - t / sqrt(t^2 + 2).
    assert t_two_sided(1, 1) == pytest.approx(0.5, abs=1e-12)
    for t in (0.1, 1.0, 4.3, 50.0):
        assert t_two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)
    assert t_two_sided(0, 5) == 1.0


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


def test_a_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641, df 2, p = 1 - t / sqrt(t^2 + 2) = 0.0742.
    paired = difference({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert paired is not None
    assert paired.by_seed == {0: 1.0, 1: 2.0, 2: 3.0}
    assert paired.mean == 2.0
    assert paired.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14), abs=1e-9)


def test_seeds_that_only_one_arm_has_do_not_pair() -> None:
    paired = difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 0.0})
    assert paired is not None
    assert paired.by_seed == {1: 0.5}
    assert math.isnan(paired.p)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_equal_differences_are_certain_and_none_is_nothing() -> None:
    same = difference({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    shifted = difference({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert same is not None
    assert shifted is not None
    assert (same.p, shifted.p) == (1.0, 0.0)


def test_sign_flips_by_hand() -> None:
    # Six positive values: only all + and all - are as extreme, 2 of 64.
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64
    assert sign_flip_p([1, -1, 1, -1, 1, -1]) == 1.0
    assert math.isnan(sign_flip_p([1, 2, 3]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.02, math.nan])
    assert adjusted[0] == 0.02
    assert math.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p and a <= 1 for a, p in zip(adjusted, p_values, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def two_arms(pool: list[float], align: list[float]) -> list[TrialView]:
    trials = [
        finished(POOL, seed, True, metrics={"segm/AP": value}) for seed, value in enumerate(pool)
    ]
    return trials + [
        finished(ALIGN, seed, metrics={"segm/AP": value}) for seed, value in enumerate(align)
    ]


def verdict(trials: list[TrialView], machinery_only: str = "") -> str:
    return compare_arms(trials, ["segm/AP"], machinery_only).arms[1].differences["segm/AP"].verdict


def test_verdicts_follow_the_interval() -> None:
    assert verdict(two_arms([0.270, 0.271, 0.269], [0.303, 0.304, 0.303])) == "better"
    assert verdict(two_arms([0.303, 0.304, 0.303], [0.270, 0.271, 0.269])) == "worse"
    assert verdict(two_arms([0.30, 0.31, 0.29], [0.31, 0.29, 0.31])) == "not shown"


def test_two_pairs_or_a_short_schedule_give_no_verdict() -> None:
    assert verdict(two_arms([0.1, 0.1], [0.3, 0.3])) == ""
    assert verdict(two_arms([0.1, 0.1, 0.1], [0.3, 0.3, 0.3]), "a short schedule") == ""


def test_a_diverged_seed_withholds_the_verdict_and_is_marked() -> None:
    lost = finished(ALIGN, 3, state="failed", error_class="diverged", error="loss is nan at step 9")
    comparison = compare_arms([*two_arms([0.1, 0.1, 0.1], [0.3, 0.3, 0.3]), lost], ["segm/AP"])
    arm = comparison.arms[1]
    assert arm.differences["segm/AP"].verdict == ""
    assert arm.marks == ("roi=align/seed-3: diverged: loss is nan at step 9",)
    assert len(arm.trials) == 4


def test_a_rollback_marks_a_trial_that_counts() -> None:
    trials = two_arms([0.1], [0.3])
    trials[1].events.append(Event(at=0.0, kind="rollback", step=70, text=""))
    arm = compare_arms(trials, ["segm/AP"]).arms[1]
    assert arm.marks == ("roi=align/seed-0: rolled back after a bad loss (step 70)",)
    assert arm.metrics["segm/AP"].mean == 0.3


def test_nothing_to_evaluate_is_no_number() -> None:
    arm = compare_arms(two_arms([0.1], [-1.0]), ["segm/AP"]).arms[1]
    assert not arm.metrics
    assert not arm.differences


def test_without_a_baseline_there_are_no_differences() -> None:
    comparison = compare_arms([finished(ALIGN, 0, metrics={"segm/AP": 0.3})], ["segm/AP"])
    assert not comparison.arms[0].differences


def test_more_arms_ask_for_stronger_evidence() -> None:
    # p = 0.0742 / 2 alone would stay; 0.03 alone is shown, four times 0.03 is not.
    values = {0: 0.30, 1: 0.31, 2: 0.32}
    gains = (0.010, 0.013, 0.016)
    trials = [finished({"x": "base"}, s, True, metrics={"segm/AP": v}) for s, v in values.items()]
    one = [finished({"x": "a"}, s, metrics={"segm/AP": v + gains[s]}) for s, v in values.items()]
    noise = [
        finished({"x": name}, s, metrics={"segm/AP": v + (0.01, -0.01, 0.002)[s]})
        for name in ("b", "c", "d")
        for s, v in values.items()
    ]
    assert verdict([*trials, *one]) == "better"
    assert verdict([*trials, *one, *noise]) == "not shown"

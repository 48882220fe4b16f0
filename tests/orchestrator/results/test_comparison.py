"""A study's answers: the family it asks, what withholds a verdict, and what only is explored."""

from __future__ import annotations

import math
from typing import Any

import pytest

from contract.answers import TrialView
from contract.attempt import Event, Progress
from orchestrator.results.comparison import (
    Answer,
    Comparison,
    Folders,
    answer_study,
    compare_arms,
    shared_trainings,
)
from orchestrator.results.soundness import Course
from tests.orchestrator.studies import finished, tiny_study

POOL, ALIGN = {"roi": "pool"}, {"roi": "align"}
FACTORS = {"roi": {"pool": {"model.roi.kind": "pool"}, "align": {"model.roi.kind": "align"}}}
LOW, HIGH = [0.270, 0.271, 0.269], [0.303, 0.304, 0.303]


def arm_of(arm: dict[str, str], values: list[float], **fields: Any) -> list[TrialView]:
    baseline = arm == POOL
    return [
        finished(arm, seed, baseline, metrics={"segm/AP": value}, **fields)
        for seed, value in enumerate(values)
    ]


def two_arms(pool: list[float], align: list[float]) -> list[TrialView]:
    return arm_of(POOL, pool) + arm_of(ALIGN, align)


def answered(
    trials: list[TrialView], courses: dict[str, Course] | None = None, **fields: Any
) -> Comparison:
    study = tiny_study(FACTORS, metrics=["segm/AP"], seeds=[0, 1, 2], **fields)
    return answer_study(study, trials, Folders(courses or {}))


def only(
    trials: list[TrialView], courses: dict[str, Course] | None = None, **fields: Any
) -> Answer:
    (answer,) = answered(trials, courses, **fields).answers
    return answer


def lost(seed: int = 2, **fields: Any) -> TrialView:
    """A trial of the arm that has no number."""
    return finished(ALIGN, seed, **({"state": "failed"} | fields))


# --- verdicts -----------------------------------------------------------------------------------


def test_verdicts_follow_the_interval() -> None:
    assert only(two_arms(LOW, HIGH)).verdict == "better"
    assert only(two_arms(HIGH, LOW)).verdict == "worse"
    assert only(two_arms([0.30, 0.31, 0.29], [0.31, 0.29, 0.31])).verdict == "not resolved"


def test_by_default_each_arm_is_compared_with_the_baseline() -> None:
    warp = arm_of({"roi": "warp"}, [0.28, 0.28, 0.281])
    answers = answered([*two_arms(LOW, HIGH), *warp]).answers
    assert [(a.asked.of, a.asked.minus, a.asked.metric) for a in answers] == [
        ("roi=align", "roi=pool", "segm/AP"),
        ("roi=warp", "roi=pool", "segm/AP"),
    ]


def test_a_margin_makes_equivalence() -> None:
    contrasts = {"same": {"of": "align", "minus": "pool", "expected": "equivalent", "margin": 1.0}}
    near = two_arms([0.300, 0.301, 0.302], [0.302, 0.300, 0.301])
    assert only(near, contrasts=contrasts).verdict == "equivalent"
    assert only(near).verdict == "not resolved"


@pytest.mark.parametrize("expected", ["", "better", "worse"])
def test_what_was_expected_moves_no_interval(expected: str) -> None:
    contrasts = {"c": {"of": "align", "minus": "pool", "expected": expected}}
    answer = only(two_arms(LOW, [0.272, 0.273, 0.271]), contrasts=contrasts)
    assert (answer.estimate.low, answer.verdict) == (
        only(two_arms(LOW, [0.272, 0.273, 0.271])).estimate.low,
        "not resolved",
    )


def test_more_contrasts_ask_for_stronger_evidence() -> None:
    trials = two_arms([0.300, 0.310, 0.305], [0.311, 0.321, 0.316])
    noise = [trial for name in "bcd" for trial in arm_of({"roi": name}, [0.306, 0.311, 0.301])]
    many = answered([*trials, *noise]).answers[0]
    asked = {"c": {"of": "align", "minus": "pool"}}
    alone = answered([*trials, *noise], contrasts=asked).answers[0]
    assert alone.estimate.df == many.estimate.df == 10  # the other arms tell of the spread
    assert (alone.verdict, many.verdict) == ("better", "not resolved")


# --- what withholds a verdict ---------------------------------------------------------------------


def test_two_seeds_give_no_verdict() -> None:
    answer = only(two_arms([0.1, 0.11], [0.3, 0.31]))
    assert (answer.verdict, answer.withheld) == ("", "2 seeds of an arm, and a verdict takes 3")


def test_trials_that_go_on_withhold_even_the_interval() -> None:
    comparison = answered([*two_arms(LOW, HIGH), lost(3, state="running")])
    assert comparison.early == "1 of 7 trials have not ended"
    assert not comparison.answers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"error_class": "diverged"}, "diverged"),
        ({"error_class": "out_of_memory"}, "ran out of memory"),
        ({"error_class": "unknown"}, "failed"),
        (
            {
                "state": "cancelled",
                "progress": Progress(attempt=1, step=70, steps=90, phase="training", updated_at=0),
            },
            "was cancelled",
        ),
    ],
)
def test_a_seed_that_is_lost_for_a_reason_withholds_the_verdict(
    fields: dict[str, Any], said: str
) -> None:
    trials = [*two_arms([*LOW, 0.27], HIGH), lost(3, **fields)]
    answer = only(trials, {trials[-1].trial: Course(steps=90, eval_every_steps=30)})
    assert answer.verdict == ""
    assert answer.withheld == (
        f"roi=align/seed-3 {said}; run it again with maskray retry s1:roi=align/seed-3"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"error_class": "node"},
        {"state": "cancelled"},
        {
            "state": "cancelled",
            "progress": Progress(attempt=1, step=20, steps=90, phase="training", updated_at=0),
        },
    ],
)
def test_a_seed_that_is_lost_at_random_is_only_missing(fields: dict[str, Any]) -> None:
    trials = [*two_arms([*LOW, 0.27], HIGH), lost(3, **fields)]
    answer = only(trials, {trials[-1].trial: Course(steps=90, eval_every_steps=30)})
    assert (answer.verdict, answer.estimate.seeds) == ("better", 3)


def test_a_whole_seed_that_was_cancelled_chooses_no_arm() -> None:
    progress = Progress(attempt=1, step=70, steps=90, phase="training", updated_at=0)
    gone = [
        finished(arm, 3, arm == POOL, state="cancelled", progress=progress) for arm in (POOL, ALIGN)
    ]
    courses = {trial.trial: Course(steps=90, eval_every_steps=30) for trial in gone}
    assert only([*two_arms(LOW, HIGH), *gone], courses).verdict == "better"
    # Copies of one arm share no seed: to cancel the one trial of a seed does choose.
    alone = only([*two_arms(LOW, HIGH), gone[1]], courses)
    assert alone.withheld.startswith("roi=align/seed-3 was cancelled")


def test_only_the_contrasts_of_a_lost_arm_are_withheld() -> None:
    warp = arm_of({"roi": "warp"}, [0.310, 0.311, 0.309])
    diverged = lost(3, error_class="diverged")
    comparison = answered([*two_arms(LOW, HIGH), *warp, diverged])
    assert [answer.verdict for answer in comparison.answers] == ["", "better"]
    assert comparison.notes[0] == "roi=align: 1 of 4 trials diverged"


def test_an_arm_that_has_not_learned_carries_no_verdict() -> None:
    answer = only(two_arms([0.02, 0.03, 0.02], [0.2, 0.21, 0.2]))
    assert "roi=pool/seed-0 has not learned: segm/AP 2.0, under 10" in answer.withheld
    assert only(two_arms([0.02, 0.03, 0.02], [0.2, 0.21, 0.2]), learned_ap=1).verdict == "better"


def test_an_arm_that_still_learns_carries_no_verdict() -> None:
    trials = two_arms(LOW, HIGH)
    rising = Course(steps=100, last_step=100, history=((50, 0.1), (75, 0.2), (100, 0.27)))
    flat = Course(steps=100, last_step=100, history=((50, 0.2), (75, 0.25), (100, 0.27)))
    assert only(trials, {trials[0].trial: flat}).verdict == "better"
    said = only(trials, {trials[0].trial: rising}).withheld
    assert said == "roi=pool/seed-0 is still learning: up 26% over the last quarter of its steps"


def test_a_schedule_that_did_not_end_carries_no_verdict() -> None:
    trials = two_arms(LOW, HIGH)
    said = only(trials, {trials[0].trial: Course(steps=1000, last_step=400)}).withheld
    assert said == "roi=pool/seed-0 ended at step 400 of 1,000"


def test_unequal_spreads_are_flagged_and_own_variances_are_not() -> None:
    trials = two_arms([0.270, 0.271, 0.269], [0.35, 0.30, 0.40])
    assert "spread 50.0 times as far" in answered(trials).notes[0]
    assert not answered(trials, variance="own").notes


# --- arms ---------------------------------------------------------------------------------------


def test_other_metrics_are_explored_without_a_verdict() -> None:
    trials = [
        trial.model_copy(
            update={"metrics": {**trial.metrics, "bbox/AP": 2 * trial.metrics["segm/AP"]}}
        )
        for trial in two_arms(LOW, HIGH)
    ]
    comparison = answered(trials)
    assert len(comparison.answers) == 1
    difference = comparison.arms[1].differences["bbox/AP"]
    assert difference.mean == pytest.approx(2 * comparison.arms[1].differences["segm/AP"].mean)
    assert list(difference.by_seed) == [0, 1, 2]


def test_what_is_explored_assumes_what_the_verdicts_assume() -> None:
    trials = two_arms([0.270, 0.271, 0.269], [0.35, 0.30, 0.40])
    pooled, own = (answered(trials, **changes) for changes in ({}, {"variance": "own"}))
    for comparison in (pooled, own):
        difference, estimate = (
            comparison.arms[1].differences["segm/AP"],
            comparison.answers[0].estimate,
        )
        assert (difference.low, difference.high) == (estimate.low, estimate.high)
    assert pooled.arms[1].differences != own.arms[1].differences


def test_a_rollback_marks_a_trial_that_counts() -> None:
    trials = two_arms([0.1], [0.3])
    trials[1].events.append(Event(at=0.0, kind="rollback", step=70, text=""))
    arm = compare_arms(trials, ["segm/AP"]).arms[1]
    assert arm.marks == ("roi=align/seed-0: rolled back after a bad loss (step 70)",)
    assert arm.metrics["segm/AP"].mean == 0.3
    assert math.isnan(arm.differences["segm/AP"].low)


def test_nothing_to_evaluate_is_no_number() -> None:
    arm = compare_arms(two_arms([0.1], [-1.0]), ["segm/AP"]).arms[1]
    assert not arm.metrics
    assert not arm.differences


def test_without_a_baseline_there_are_no_differences() -> None:
    comparison = answered(arm_of(ALIGN, HIGH))
    assert not comparison.arms[0].differences
    assert not comparison.answers


def test_equal_weights_are_one_training() -> None:
    trials = two_arms(LOW, HIGH)
    arms = compare_arms(trials, ["segm/AP"]).arms
    weights = {trial.trial: f"sha-{trial.seed}" for trial in trials}
    assert shared_trainings(arms, weights) == {"roi=pool": "roi=pool", "roi=align": "roi=pool"}
    weights[trials[5].trial] = "other"
    assert shared_trainings(arms, weights) == {"roi=pool": "roi=pool", "roi=align": "roi=align"}
    assert shared_trainings(arms, {}) == {}

"""Whether trials can carry a verdict: they ended as planned, and they learned.

Pure: the reasons follow from what the service and the trials' folders say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contract.answers import TrialView
from contract.study import FINAL_STATES

MIN_SEEDS = 3  # of every arm of a contrast, for a verdict
MAX_LATE_RISE = 0.2  # of the primary metric over the last quarter of the steps


@dataclass(frozen=True)
class Course:
    """How one trial went, as its folder tells it; 0 and empty where that is not known.

    history: (step, primary metric) of each evaluation.
    """

    steps: int = 0
    last_step: int = 0
    eval_every_steps: int = 0
    history: tuple[tuple[int, float], ...] = ()


def unfinished(trials: Sequence[TrialView]) -> str:
    """Why it is too early for intervals; empty once every trial has ended."""
    count = sum(trial.state not in FINAL_STATES for trial in trials)
    if not count:
        return ""
    # An interval at each look has more than its 5% of chances to exclude 0.
    return f"{count} of {len(trials)} trials have not ended"


def reasons(
    trials: Sequence[TrialView],
    courses: Mapping[str, Course],
    primary: str,
    learned: float,
) -> list[str]:
    """Why the arm of these trials carries no verdict, one line each.

    courses: by trial id. learned: what `primary` has to reach, as a fraction.
    """
    lines = []
    for trial in trials:
        course = courses.get(trial.trial, Course())
        lines += [
            line
            for line in (
                _lost(trial, course) or _short(trial, course),
                _not_learned(trial, primary, learned),
                _still_learning(trial, course),
            )
            if line
        ]
    return lines


def whole_seeds_cancelled(trials: Sequence[TrialView]) -> set[int]:
    """The seeds of which a person cancelled every trial: that chooses no arm.

    Where each arm has seeds of its own, one trial is no whole seed.
    """
    by_seed: dict[int, list[TrialView]] = {}
    for trial in trials:
        by_seed.setdefault(trial.seed, []).append(trial)
    return {
        seed
        for seed, members in by_seed.items()
        if len(members) > 1 and all(trial.state == "cancelled" for trial in members)
    }


def is_missing_at_random(trial: TrialView, course: Course) -> bool:
    """Whether the trial's end says nothing about its arm.

    A lost node does not look at the loss. A person who cancels may have looked, from the first
    evaluation on.
    """
    if trial.state == "failed":
        return trial.error_class == "node"
    # A later attempt begins at an earlier checkpoint; what was seen before it was seen.
    steps = [attempt.step for attempt in trial.attempt_list]
    reached = max([*steps, trial.progress.step if trial.progress else 0])
    first = course.eval_every_steps or course.steps
    return reached < first or not reached


def _lost(trial: TrialView, course: Course) -> str:
    if trial.state not in ("failed", "cancelled") or is_missing_at_random(trial, course):
        return ""
    how = {"diverged": "diverged", "out_of_memory": "ran out of memory"}.get(
        trial.error_class, "was cancelled" if trial.state == "cancelled" else "failed"
    )
    return f"{trial.key} {how}; run it again with maskray retry {trial.study}:{trial.key}"


def _short(trial: TrialView, course: Course) -> str:
    if trial.state != "done" or not 0 < course.last_step < course.steps:
        return ""
    return f"{trial.key} ended at step {course.last_step:,} of {course.steps:,}"


def _not_learned(trial: TrialView, primary: str, learned: float) -> str:
    value = trial.metrics.get(primary)
    if trial.state != "done" or value is None or not 0 <= value < learned:
        return ""
    return f"{trial.key} has not learned: {primary} {100 * value:.1f}, under {100 * learned:g}"


def _still_learning(trial: TrialView, course: Course) -> str:
    """A rise of more than MAX_LATE_RISE over the last quarter of the schedule."""
    before = _at_three_quarters(course.history)
    if trial.state != "done" or before is None:
        return ""
    last = course.history[-1][1]
    rise = (last - before) / last if last > 0 else 0.0
    if rise <= MAX_LATE_RISE:
        return ""
    return f"{trial.key} is still learning: up {100 * rise:.0f}% over the last quarter of its steps"


def _at_three_quarters(history: Sequence[tuple[int, float]]) -> float | None:
    """The value there, on the line between its neighbours; None if none is in the second half."""
    if not history:
        return None
    at = 0.75 * history[-1][0]
    earlier = [point for point in history if 0.5 * history[-1][0] <= point[0] <= at]
    if not earlier:
        return None
    (left, low), (right, high) = earlier[-1], history[history.index(earlier[-1]) + 1]
    return low + (high - low) * (at - left) / (right - left)

"""What the numbers of a study allow one to say: its arms, and the answers to its contrasts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from contract.answers import LookTaken, Standing, TrialView
from contract.study import Study
from orchestrator.results.soundness import (
    MIN_SEEDS,
    Course,
    reasons,
    unfinished,
    whole_seeds_cancelled,
)
from orchestrator.results.statistics.contrasts import (
    MAX_DEVIATION_RATIO,
    Contrast,
    Design,
    Estimate,
    Rule,
    Values,
    deviation_ratio,
    plain,
    simultaneous,
)
from orchestrator.results.statistics.summary import Summary, summarise
from orchestrator.results.statistics.verdicts import Verdict, verdict_of
from orchestrator.study.contrasts import Asked, arm_name, family_of, primary_of


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline with a plain 95% interval, NaN where the seeds give none: to explore.

    by_seed: the differences within the seeds that both have.
    """

    mean: float
    low: float
    high: float
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Arm:
    """One row of the table. `marks`: what happened to its trials, in words, one line a trial."""

    arm: dict[str, str]
    baseline: bool
    trials: tuple[TrialView, ...]
    metrics: dict[str, Summary]
    differences: dict[str, Difference]
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to one contrast of the family.

    verdict: empty where it is withheld; `withheld` then says why. first: the verdict that was given
    before some of the seeds, and stands. later: what all seeds say then, to explore.
    """

    asked: Asked
    estimate: Estimate
    verdict: Verdict
    withheld: str = ""
    first: Standing | None = None
    later: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms in the study's order, and the family of contrasts with its answers.

    machinery_only: why no number is evidence; empty if some are. early: why there is no interval
    yet; empty once all trials have ended. notes: what a reader of the answers must know. looks:
    those that were taken. unsound: arm -> why it carries no verdict.
    with_images: contrast's name -> its interval over seeds and validation images.
    """

    arms: tuple[Arm, ...]
    machinery_only: str = ""
    early: str = ""
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()
    looks: tuple[LookTaken, ...] = ()
    unsound: Mapping[str, str] = field(default_factory=dict)
    with_images: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def baseline(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.baseline), None)

    def answer(self, arm: Arm, metric: str) -> Answer | None:
        """The family's answer on this arm minus the baseline, if the study asks for it."""
        if self.baseline is None:
            return None
        weights = {arm_name(arm.arm): 1.0, arm_name(self.baseline.arm): -1.0}
        return next(
            (
                answer
                for answer in self.answers
                if answer.asked.metric == metric and answer.asked.weights == weights
            ),
            None,
        )


@dataclass(frozen=True)
class Folders:
    """What the trials' folders say. courses: by trial id. weights: trial id -> SHA-256."""

    courses: Mapping[str, Course] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)


def compare_arms(trials: Sequence[TrialView], metrics: Sequence[str]) -> Comparison:
    """Groups trials into arms, each with its means and its differences to the baseline arm.

    Metrics beside `metrics` follow in alphabetical order.
    """
    return _with_differences(Comparison(_arms(trials, metrics)), Design())


def _arms(trials: Sequence[TrialView], metrics: Sequence[str]) -> tuple[Arm, ...]:
    """Without differences, which take a design."""
    groups: dict[tuple[tuple[str, str], ...], list[TrialView]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.arm.items()), []).append(trial)
    # A name without "/" is a speed, not an evaluation: no arm is better by it.
    names = [*metrics, *sorted({m for t in trials for m in t.metrics if "/" in m} - set(metrics))]
    return tuple(_arm(group, names) for group in groups.values())


def _with_differences(comparison: Comparison, design: Design) -> Comparison:
    baseline = comparison.baseline
    if baseline is None:
        return comparison
    values = values_of(comparison.arms)
    compared = [
        arm
        if arm.baseline
        else replace(arm, differences=_differences(arm, baseline, values, design))
        for arm in comparison.arms
    ]
    return replace(comparison, arms=tuple(compared))


def answer_study(
    study: Study,
    trials: Sequence[TrialView],
    folders: Folders,
    machinery_only: str = "",
    rule: Rule | None = None,
) -> Comparison:
    """The arms of a study, and what the family of its contrasts comes to.

    machinery_only: withholds the answers as a whole. rule: the quantiles, at a look.
    """
    arms, early = _arms(trials, study.metrics), unfinished(trials)
    comparison = Comparison(arms, machinery_only, early)
    if machinery_only or early:
        return _with_differences(comparison, Design())
    base = comparison.baseline
    primary = primary_of(study, values_of(arms))
    family = family_of(study, [arm.arm for arm in arms], base.arm if base else None, primary)
    unsound = _unsound(arms, trials, folders, primary, study.learned_ap / 100)
    sound = [arm_name(arm.arm) for arm in arms if arm_name(arm.arm) not in unsound]
    design = Design(study.variance, shared_trainings(arms, folders.weights), sound)
    answers, notes = _answers(study, family, arms, unsound, design, rule)
    # What is outside of the family rests on the same assumptions as the family.
    comparison = _with_differences(comparison, design)
    notes = (*_divergence(arms), *notes)
    return replace(comparison, answers=answers, notes=notes, unsound=unsound)


def values_of(arms: Sequence[Arm]) -> dict[str, Values]:
    """metric -> arm's name -> seed -> value."""
    values: dict[str, dict[str, Mapping[int, float]]] = {}
    for arm in arms:
        for metric, summary in arm.metrics.items():
            values.setdefault(metric, {})[arm_name(arm.arm)] = summary.by_seed
    return dict(values)


def shared_trainings(arms: Sequence[Arm], weights: Mapping[str, str]) -> dict[str, str]:
    """Arm -> the first arm that has the same weights at every seed: one training, evaluated twice.

    weights: trial id -> SHA-256. Levels that change inference alone come to this.
    """
    first: dict[tuple[tuple[int, str], ...], str] = {}
    shared: dict[str, str] = {}
    for arm in arms:
        of_seed = sorted((trial.seed, weights.get(trial.trial, "")) for trial in arm.trials)
        if all(sha for _, sha in of_seed):
            shared[arm_name(arm.arm)] = first.setdefault(tuple(of_seed), arm_name(arm.arm))
    return shared


# --- arms ---------------------------------------------------------------------------------------


def _arm(trials: Sequence[TrialView], metrics: Sequence[str]) -> Arm:
    done = [trial for trial in trials if trial.state == "done"]
    summaries = {}
    for metric in metrics:
        values = {t.seed: t.metrics[metric] for t in done if _exists(t.metrics.get(metric))}
        if values:
            summaries[metric] = summarise(values)
    marks = tuple(mark for trial in trials if (mark := _mark(trial)))
    return Arm(trials[0].arm, trials[0].baseline, tuple(trials), summaries, {}, marks)


def _exists(value: float | None) -> bool:
    """pycocotools says -1 where there was nothing to evaluate."""
    return value is not None and math.isfinite(value) and value >= 0


def _mark(trial: TrialView) -> str:
    """What a reader of the table must know of a trial: how it ended, what its loop went through."""
    parts = []
    if trial.state not in ("done", "held"):  # a held one waits for a look, as planned
        reason = f": {trial.error}" if trial.error else ""
        diverged = "diverged" if trial.error_class == "diverged" else trial.state
        parts.append(f"{diverged}{reason}")
    kinds = [event.kind for event in trial.events]
    for kind in dict.fromkeys(kind for kind in kinds if "rollback" in kind or "rolled" in kind):
        steps = ", ".join(str(event.step) for event in trial.events if event.kind == kind)
        parts.append(f"rolled back after a bad loss (step {steps})")
    return f"{trial.key}: {'; '.join(parts)}" if parts else ""


def _differences(
    arm: Arm, baseline: Arm, values: Mapping[str, Values], design: Design
) -> dict[str, Difference]:
    differences = {}
    names = arm_name(arm.arm), arm_name(baseline.arm)
    for metric, summary in arm.metrics.items():
        if metric in baseline.metrics:
            contrast = Contrast("", metric, {names[0]: 1.0, names[1]: -1.0})
            estimate = plain(contrast, values, design)
            reference = baseline.metrics[metric].by_seed
            by_seed = {s: v - reference[s] for s, v in summary.by_seed.items() if s in reference}
            differences[metric] = Difference(
                estimate.difference, estimate.low, estimate.high, by_seed
            )
    return differences


# --- answers ------------------------------------------------------------------------------------


def _unsound(
    arms: Sequence[Arm],
    trials: Sequence[TrialView],
    folders: Folders,
    primary: str,
    learned: float,
) -> dict[str, str]:
    """Arm -> why it carries no verdict, for the arms that carry none."""
    left_out = whole_seeds_cancelled(trials)
    why = {}
    for arm in arms:
        counted = [trial for trial in arm.trials if trial.seed not in left_out]
        lines = reasons(counted, folders.courses, primary, learned)
        if lines:
            why[arm_name(arm.arm)] = "; ".join(lines)
    return why


def _answers(
    study: Study,
    family: Sequence[Asked],
    arms: Sequence[Arm],
    unsound: Mapping[str, str],
    design: Design,
    rule: Rule | None,
) -> tuple[tuple[Answer, ...], tuple[str, ...]]:
    values = values_of(arms)
    if not study.contrasts:  # by default, what an arm does not compute is not asked of it
        family = [asked for asked in family if _is_computed(asked, values)]
    contrasts = [
        Contrast(asked.name, asked.metric, asked.weights, asked.expected, asked.margin / 100)
        for asked in family
    ]
    # An arm that went wrong must not widen the intervals of the others, nor borrow their variance.
    trusted = simultaneous(contrasts, values, design, rule)
    whole = simultaneous(contrasts, values, replace(design, pool=None)) if unsound else trusted
    answers = []
    for asked, good, any_ in zip(family, trusted, whole, strict=True):
        why = [unsound[arm] for arm in asked.weights if arm in unsound]
        if not why and good.seeds < MIN_SEEDS:
            why = [f"{good.seeds} seeds of an arm, and a verdict takes {MIN_SEEDS}"]
        verdict = verdict_of(good.low, good.high, asked.margin / 100)
        if not why and not verdict:
            why = ["the seeds give no interval"]
        answers.append(
            Answer(asked, any_, "", "; ".join(why)) if why else Answer(asked, good, verdict)
        )
    return tuple(answers), _unequal_spread(study, family, values, design.pool or ())


def _is_computed(asked: Asked, values: Mapping[str, Values]) -> bool:
    return all(arm in values.get(asked.metric, {}) for arm in asked.weights)


def _unequal_spread(
    study: Study, family: Sequence[Asked], values: Mapping[str, Values], sound: Collection[str]
) -> tuple[str, ...]:
    if study.variance == "own":
        return ()
    notes = []
    for metric in dict.fromkeys(asked.metric for asked in family):
        ratio = deviation_ratio(sound, values.get(metric, {}))
        if ratio > MAX_DEVIATION_RATIO:
            notes.append(
                f"{metric}: the seeds of one arm spread {ratio:.1f} times as far as those of "
                'another, and the intervals assume one spread; "variance: own" does not'
            )
    return tuple(notes)


def _divergence(arms: Sequence[Arm]) -> list[str]:
    """How often each arm diverges: a result like its AP."""
    notes = []
    for arm in arms:
        count = sum(trial.error_class == "diverged" for trial in arm.trials)
        if count:
            notes.append(f"{arm_name(arm.arm)}: {count} of {len(arm.trials)} trials diverged")
    return notes

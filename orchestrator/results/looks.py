"""Looks at a study while its seeds come in, and the verdicts that stand once they are given.

Pure: the service acts on what a look finds, and the report of a study finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from contract.answers import LookTaken, Standing, StudyView, TrialView
from contract.study import FINAL_STATES, Looks
from orchestrator.results.comparison import Answer, Arm, Comparison, answer_study
from orchestrator.results.facts import Facts
from orchestrator.results.statistics.boundaries import (
    MIN_POWER,
    LookRule,
    Taken,
    conditional_power,
)
from orchestrator.results.statistics.contrasts import Estimate
from orchestrator.results.statistics.verdicts import Verdict, verdict_of
from orchestrator.study.contrasts import Asked, arm_name

_SETTLED = frozenset(get_args(Verdict)) - {"", "not resolved"}


@dataclass(frozen=True)
class Look:
    """What a look finds. verdicts: the first ones, on contrasts that no later look tests."""

    taken: LookTaken
    verdicts: tuple[Standing, ...]


def answers_of(view: StudyView, facts: Facts) -> Comparison:
    """The study's arms and answers, as its report gives them."""
    study, trials = facts.study, _ran(view)
    if not isinstance(study.seeds, Looks):
        comparison = answer_study(study, trials, facts.folders, facts.machinery_only)
        return _standing(comparison, view.verdicts)
    if any(trial.state not in FINAL_STATES for trial in trials):
        comparison = answer_study(study, trials, facts.folders)
        return replace(comparison, early=_waits(view, study.seeds), looks=tuple(view.looks))
    # The report may be made before the service has noted the last look. That is no first verdict.
    after = max((verdict.at for verdict in view.verdicts), default=0.0)
    while (look := take_look(view, facts, after)) is not None:
        looks, verdicts = [*view.looks, look.taken], [*view.verdicts, *look.verdicts]
        view = view.model_copy(update={"looks": looks, "verdicts": verdicts})
    rule = _rule(study.seeds, view.looks[:-1])
    comparison = answer_study(study, trials, facts.folders, rule=rule)
    comparison = replace(comparison, looks=tuple(view.looks))
    return _standing(comparison, view.verdicts, looked=view.study)


def verdicts_of(view: StudyView, comparison: Comparison, at: float) -> tuple[Standing, ...]:
    """The verdicts of a study that is over which nobody has given before."""
    return tuple(
        _given(view, answer, comparison.arms, at)
        for answer in comparison.answers
        if answer.verdict and answer.first is None
    )


def due(view: StudyView, seeds: Looks) -> int:
    """The number of seeds of the next look if all of them have ended, else 0."""
    seeds_of_look = _next(view.looks, seeds)
    waits = [t for t in _ran(view) if t.seed < seeds_of_look and t.state not in FINAL_STATES]
    return 0 if waits else seeds_of_look


def take_look(view: StudyView, facts: Facts, at: float) -> Look | None:
    """The look that is due; None if none is, or if it would see nothing that is new."""
    seeds = facts.study.seeds
    assert isinstance(seeds, Looks)
    planned = due(view, seeds)
    trials = [trial for trial in _ran(view) if trial.seed < planned]
    numbers = _numbers(trials)
    same = bool(view.looks) and numbers == view.looks[-1].numbers
    if not planned or (same and not any(trial.state == "held" for trial in view.trials)):
        return None
    comparison = answer_study(facts.study, trials, facts.folders, rule=_rule(seeds, view.looks))
    before = {name for look in view.looks for name in look.closed}
    asked = [answer for answer in comparison.answers if answer.asked.name not in before]
    last = planned == seeds.most
    power = {} if last else _powers(asked, planned / seeds.most)
    goes_on = [answer for answer in asked if not last and _goes_on(answer, comparison, power)]
    going = {arm for answer in goes_on for arm in answer.asked.weights}
    ended = {arm for look in view.looks for arm in look.stopped}
    stopped = {
        name: _why(name, asked, comparison, last)
        for name in (arm_name(arm.arm) for arm in comparison.arms)
        if name not in going | ended
    }
    # A contrast without a verdict stays open: a trial that is run again may bring one.
    closed = [
        answer
        for answer in asked
        if answer.verdict in _SETTLED
        or (answer.verdict and not going >= answer.asked.weights.keys())
    ]
    return Look(
        LookTaken(
            seeds=planned,
            at=at,
            numbers=numbers,
            tested=[answer.asked.name for answer in asked],
            closed=[answer.asked.name for answer in closed],
            stopped=stopped,
        ),
        tuple(_given(view, answer, comparison.arms, at) for answer in closed),
    )


# --- a look -------------------------------------------------------------------------------------


def _ran(view: StudyView) -> list[TrialView]:
    return [trial for trial in view.trials if trial.state != "spared"]


def _next(taken: Sequence[LookTaken], seeds: Looks) -> int:
    before = taken[-1].seeds if taken else 0
    return next((number for number in seeds.looks if number > before), 0)


def _numbers(trials: Sequence[TrialView]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for trial in trials:
        name = arm_name(trial.arm)
        numbers[name] = numbers.get(name, 0) + (trial.state == "done")
    return numbers


def _rule(seeds: Looks, past: Sequence[LookTaken]) -> LookRule:
    return LookRule(
        seeds.looks,
        tuple(Taken(look.seeds, look.numbers, tuple(look.stopped)) for look in past),
        frozenset(name for look in past for name in look.closed),
    )


def _powers(answers: Sequence[Answer], share: float) -> dict[str, float]:
    """By contrast that is not resolved. Without any spread more seeds are taken."""
    powers = {}
    for answer in answers:
        estimate, margin = answer.estimate, answer.asked.margin / 100
        if answer.verdict == "not resolved" and estimate.error > 0:
            now = np.array([estimate.difference]), np.array([estimate.error])
            power = conditional_power(*now, share, estimate.last_quantile, margin)
            powers[answer.asked.name] = float(power[0])
    return powers


def _goes_on(answer: Answer, comparison: Comparison, power: Mapping[str, float]) -> bool:
    """More seeds may settle it. Those of an arm that has gone wrong could not."""
    if answer.asked.weights.keys() & comparison.unsound.keys():
        return False
    return answer.verdict not in _SETTLED and power.get(answer.asked.name, 1.0) >= MIN_POWER


def _why(arm: str, asked: Sequence[Answer], comparison: Comparison, last: bool) -> str:
    """Why the arm takes no more seeds, in words without a number: the study may go on."""
    if arm in comparison.unsound:
        return "it carries no verdict"
    own = [answer for answer in asked if arm in answer.asked.weights]
    if all(answer.verdict in _SETTLED for answer in own):
        return "settled"
    return "the last look" if last else "more seeds would hardly settle it"


def _waits(view: StudyView, seeds: Looks) -> str:
    number = _next(view.looks, seeds)
    trials = [trial for trial in _ran(view) if trial.seed < number]
    ended = sum(trial.state in FINAL_STATES for trial in trials)
    if not number:
        return "seeds that were added after the last look have not ended"
    return f"the next look is at {number} seeds; {ended} of its {len(trials)} trials have ended"


# --- verdicts that stand ------------------------------------------------------------------------


def _given(view: StudyView, answer: Answer, arms: Sequence[Arm], at: float) -> Standing:
    asked, estimate = answer.asked, answer.estimate
    seen = estimate.resolvable
    return Standing(
        name=asked.name,
        metric=asked.metric,
        weights=dict(asked.weights),
        difference=estimate.difference,
        low=estimate.low,
        high=estimate.high,
        resolvable=seen if math.isfinite(seen) else None,
        quantile=estimate.quantile,
        df=estimate.df,
        seeds=estimate.seeds,
        verdict=answer.verdict,
        trials={
            arm_name(arm.arm): _identities(arm, asked.metric)
            for arm in arms
            if arm_name(arm.arm) in asked.weights
        },
        study=view.study,
        at=at,
    )


def _identities(arm: Arm, metric: str) -> list[str]:
    """Of the trials that have a number."""
    summary = arm.metrics.get(metric)
    seeds = summary.by_seed if summary else {}
    return [trial.identity for trial in arm.trials if trial.seed in seeds]


def _standing(comparison: Comparison, verdicts: Sequence[Standing], looked: str = "") -> Comparison:
    """The comparison with the first verdicts in the place of later ones.

    looked: a study with looks. The seeds that follow its own verdicts are no second chance.
    """
    answers = [_first(answer, comparison.arms, verdicts, looked) for answer in comparison.answers]
    return replace(comparison, answers=tuple(answers))


def _first(
    answer: Answer, arms: Sequence[Arm], verdicts: Sequence[Standing], looked: str
) -> Answer:
    asked = answer.asked
    trials = {arm_name(arm.arm): {trial.identity for trial in arm.trials} for arm in arms}
    for standing in sorted(verdicts, key=lambda one: one.at):
        first = _as_asked(asked, standing, trials)
        if first is None:
            continue
        now = {arm_name(arm.arm): _identities(arm, asked.metric) for arm in arms}
        used = {name for names in first.trials.values() for name in names}
        more = {name for arm in asked.weights for name in now[arm]} - used
        tried_again = more and first.study != looked and not answer.withheld
        later = answer.estimate if tried_again else None
        verdict = verdict_of(first.low, first.high, asked.margin / 100)
        return Answer(asked, _estimate(answer, first), verdict, first=first, later=later)
    return answer


def _as_asked(asked: Asked, standing: Standing, trials: Mapping[str, set[str]]) -> Standing | None:
    """The verdict in this contrast's arms and sign; None if it is on another contrast.

    An arm is the one that shares a trial: names and studies may differ.
    """
    if asked.metric != standing.metric or len(asked.weights) != len(standing.weights):
        return None
    names = {}
    for arm in asked.weights:
        known = [n for n, ids in standing.trials.items() if not trials[arm].isdisjoint(ids)]
        if len(known) != 1:
            return None
        names[arm] = known[0]
    for sign in (1, -1):
        pairs = ((now, sign * standing.weights[names[arm]]) for arm, now in asked.weights.items())
        if all(math.isclose(now, then) for now, then in pairs):
            low, high = sorted((sign * standing.low, sign * standing.high))
            same = {
                "weights": dict(asked.weights),
                "trials": {arm: standing.trials[name] for arm, name in names.items()},
                "difference": sign * standing.difference,
                "low": low,
                "high": high,
                # The interval stands; this margin may be another than that of the first time.
                "verdict": verdict_of(low, high, asked.margin / 100),
            }
            return standing.model_copy(update=same)
    return None


def _estimate(answer: Answer, first: Standing) -> Estimate:
    return replace(
        answer.estimate,
        difference=first.difference,
        low=first.low,
        high=first.high,
        resolvable=math.nan if first.resolvable is None else first.resolvable,
        seeds=first.seeds,
        df=first.df,
        quantile=math.nan if first.quantile is None else first.quantile,
    )

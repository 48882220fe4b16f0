"""What a study can see before it starts: differences at 80% power, and the seeds it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from contract.answers import StudyView
from contract.metrics import metric_names
from contract.recipe import RunConfig
from contract.study import Looks, Study, Submission
from orchestrator.results.comparison import compare_arms
from orchestrator.results.planning.looks_ahead import LooksAhead, look_ahead
from orchestrator.results.soundness import MIN_SEEDS
from orchestrator.results.statistics.contrasts import Contrast, Design, Estimate
from orchestrator.results.statistics.power import (
    foreseen,
    seeds_needed,
    sees_difference,
    sees_equivalence,
)
from orchestrator.results.statistics.summary import mean_of
from orchestrator.study.contrasts import Asked, arm_name, family_of, primary_of
from orchestrator.study.paper import published_difference, rows_of

# Points of AP between seeds, where no trial of the preset has been measured. mmdetection's
# maintainers call gaps below 0.2 and 0.3 between runs on COCO usual; as an sd that is pessimistic.
# Nobody here has found a source for the small one.
_ASSUMED = (
    (0.05, "assumed"),
    (0.25, "after gaps of 0.2 to 0.3 between runs, mmdetection's issues 3624 and 3496"),
)
_LEAST_TRIALS = 3  # of one arm, for its spread to count


@dataclass(frozen=True)
class Spread:
    """points: the sd between seeds, in points of AP. source: where it is from, in words."""

    points: float
    source: str


@dataclass(frozen=True)
class Foreseen:
    """One contrast. expected: points, of the paper or the margin; 0 is not known.

    detectable, seeds: for each spread; seeds 0 is more than anybody runs, or nothing is expected.
    """

    asked: Asked
    expected: float
    from_paper: bool
    detectable: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Foresight:
    seeds: int
    spreads: tuple[Spread, ...]
    contrasts: tuple[Foreseen, ...]
    looks: LooksAhead | None = None

    def as_json(self) -> dict[str, Any]:
        """Points of AP; null where the seeds give no interval."""
        return {
            "seeds": self.seeds,
            "power": 0.8,
            "spreads": [{"points": s.points, "source": s.source} for s in self.spreads],
            "contrasts": [
                {
                    "name": one.asked.name,
                    "metric": one.asked.metric,
                    "expected": one.expected or None,
                    "detectable": [None if math.isnan(d) else d for d in one.detectable],
                    "seeds_needed": [n or None for n in one.seeds],
                }
                for one in self.contrasts
            ],
            "looks": self.looks.as_json() if self.looks else None,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, as `maskray plan` prints them."""
        head = ["contrast", "metric", "expected"]
        for spread in self.spreads:
            head += [f"sees at sd {spread.points:.2g}", "seeds"]
        rows = []
        for one in self.contrasts:
            row = [one.asked.name, one.asked.metric, _expected_text(one)]
            for detectable, seeds in zip(one.detectable, one.seeds, strict=True):
                row.append("-" if math.isnan(detectable) else f"{detectable:.2f}")
                row.append(str(seeds) if seeds else ("over 200" if one.expected else "-"))
            rows.append(row)
        return head, rows


def foresee(submission: Submission, spreads: Sequence[Spread]) -> Foresight:
    """What the submission's family can see."""
    study = submission.study
    runs = {arm_name(trial.arm): RunConfig.model_validate(trial.run) for trial in submission.trials}
    arms = list({arm_name(trial.arm): trial.arm for trial in submission.trials}.values())
    base = next((trial.arm for trial in submission.trials if trial.baseline), None)
    have: dict[str, list[str]] = {}
    for name, run in runs.items():
        for metric in metric_names(run.model, run.loop.eval_boundary):
            have.setdefault(metric, []).append(name)
    family = [
        asked
        for asked in family_of(study, arms, base, primary_of(study, have))
        if set(asked.weights) <= set(have.get(asked.metric, ()))
    ]
    ahead = None
    if isinstance(study.seeds, Looks) and base is not None:
        contrasts = [Contrast(one.name, one.metric, one.weights) for one in family]
        ahead = look_ahead(contrasts, have, arm_name(base), study.seeds)
    return Foresight(
        len(study.every_seed),
        tuple(spreads),
        _foreseen(study, family, arms, have, spreads),
        ahead,
    )


def measured_spread(preset: str, views: Sequence[StudyView]) -> Spread | None:
    """Between seeds of finished trials of the preset, pooled over arms, by the primary metric."""
    variances: list[float] = []
    for view in views:
        if not preset or view.spec.get("baseline", {}).get("preset") != preset:
            continue
        metrics = view.spec.get("metrics") or ["bbox/AP"]
        for arm in compare_arms(view.trials, [view.spec.get("primary") or metrics[0]]).arms:
            summary = next(iter(arm.metrics.values()), None)
            if summary is not None and len(summary.by_seed) >= _LEAST_TRIALS:
                variances.append(summary.deviation**2)
    if not variances:
        return None
    points = 100 * math.sqrt(mean_of(variances))
    return Spread(points, f"{len(variances)} finished arms of {preset}") if points else None


def assumed_spreads() -> list[Spread]:
    return [Spread(points, source) for points, source in _ASSUMED]


def _foreseen(
    study: Study,
    family: Sequence[Asked],
    arms: Sequence[Mapping[str, str]],
    have: Mapping[str, Sequence[str]],
    spreads: Sequence[Spread],
) -> tuple[Foreseen, ...]:
    contrasts = [Contrast(asked.name, asked.metric, asked.weights) for asked in family]

    @cache
    def at(seeds: int) -> list[Estimate]:
        return foreseen(contrasts, have, seeds, Design(study.variance))

    papers = rows_of(study, arms)
    result = []
    for i, asked in enumerate(family):
        paper = 100 * published_difference(asked.weights, asked.metric, papers)
        expected = asked.margin if asked.expected == "equivalent" else abs(paper)
        expected = 0.0 if math.isnan(expected) else expected  # the paper does not say

        def needed(spread: Spread, i: int = i, asked: Asked = asked, size: float = expected) -> int:
            if not size:
                return 0
            sees = sees_equivalence if asked.expected == "equivalent" else sees_difference
            return seeds_needed(lambda n: sees(at(n)[i], size / spread.points), MIN_SEEDS)

        sizes = tuple(at(len(study.every_seed))[i].resolvable * spread.points for spread in spreads)
        from_paper = asked.expected != "equivalent"
        result.append(Foreseen(asked, expected, from_paper, sizes, tuple(map(needed, spreads))))
    return tuple(result)


def _expected_text(one: Foreseen) -> str:
    if not one.expected:
        return one.asked.expected or "-"
    return f"{one.expected:.1f} (paper)" if one.from_paper else f"within {one.expected:g}"

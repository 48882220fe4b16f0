"""The tables of a report as rows of cells: the text and the page show the same ones.

AP in percent points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from contract.answers import StudyView
from contract.metrics import mask_inferences
from contract.study import Study
from orchestrator.results.comparison import Answer, Arm, Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.published.beside import Beside, besides
from orchestrator.results.published.calibration import calibrated
from orchestrator.results.statistics.summary import CONFIDENCE, Summary
from orchestrator.study.contrasts import arm_name
from orchestrator.study.paper import published_difference

_INTERVAL = f"{100 * CONFIDENCE:.0f}% interval"
_GROUPS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}


@dataclass(frozen=True)
class Cell:
    """`kind`: the style classes of the cell on the page."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    baseline: bool = False  # the page marks this row

    @classmethod
    def of(cls, *texts: str) -> Row:
        return cls(tuple(map(Cell, texts)))


@dataclass(frozen=True)
class Table:
    """The first `left` columns hold names and stand to the left, the others hold numbers."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]
    left: int


def arms_table(comparison: Comparison, metrics: Sequence[str]) -> Table:
    """A row for each arm: means over seeds with half intervals, each beside its difference."""
    metrics = shown_metrics(comparison, metrics)
    factors = list(comparison.arms[0].arm) if comparison.arms else []
    head = [*(factors or ["arm"]), "seeds"]
    for metric in metrics:
        head += [metric_label(metric), "diff"]
    rows = []
    for arm in comparison.arms:
        cells = [Cell(name) for name in arm.arm.values() or ("baseline",)]
        cells.append(Cell(seeds_text(arm)))
        for metric in metrics:
            # An interval before the end would be looked at again, and each look is a chance.
            mean = mean_text(arm.metrics.get(metric), bare=bool(comparison.early))
            cells += [Cell(mean), _difference_cell(comparison, arm, metric)]
        rows.append(Row(tuple(cells), arm.baseline))
    return Table(tuple(head), tuple(rows), max(1, len(factors)))


def answers_table(comparison: Comparison) -> Table:
    """A row for each contrast of the family: what it asks, its interval and its verdict."""
    head = ("contrast", "of", "minus", "metric", "diff", _INTERVAL, "seeds", "expected", "verdict")
    return Table(head, tuple(_answer_row(answer) for answer in comparison.answers), left=4)


def images_table(comparison: Comparison) -> Table:
    """The intervals of contrasts beside those over seeds and images together."""
    rows = [
        Row.of(
            answer.asked.name,
            metric_label(answer.asked.metric),
            points(answer.estimate.difference, True),
            interval_text(answer.estimate.low, answer.estimate.high),
            interval_text(*comparison.with_images[answer.asked.name]),
        )
        for answer in comparison.answers
        if answer.asked.name in comparison.with_images
    ]
    return Table(("contrast", "metric", "diff", "over seeds", "and images"), tuple(rows), left=2)


def exploratory_table(comparison: Comparison, metrics: Sequence[str]) -> Table:
    """Each arm minus the baseline by each column that no contrast of the family asks for."""
    rows = []
    for arm in comparison.arms:
        for metric in shown_metrics(comparison, metrics):
            difference = arm.differences.get(metric)
            if difference is not None and comparison.answer(arm, metric) is None:
                rows.append(
                    Row.of(
                        arm_label(arm),
                        metric_label(metric),
                        points(difference.mean, True),
                        interval_text(difference.low, difference.high),
                    )
                )
    return Table(("arm", "metric", "diff", _INTERVAL), tuple(rows), left=2)


def softmax_table(comparison: Comparison) -> Table:
    """Mask AP of softmax arms under every inference that was evaluated."""
    rows = []
    for arm in comparison.arms:
        values = [arm.metrics.get(f"segm-{name}/AP") for name in mask_inferences()]
        if any(values):  # the evaluation has these names for softmax arms alone
            configured = arm.metrics.get("segm/AP")
            bare = bool(comparison.early)
            texts = (mean_text(value, bare) for value in (configured, *values))
            rows.append(Row.of(arm_label(arm), *texts))
    names = (name.replace("_", " ") for name in mask_inferences())
    return Table(("arm", "as configured", *names), tuple(rows), left=1)


def paper_table(facts: Facts, comparison: Comparison) -> Table:
    """Our differences beside the published ones: what sets every run apart moves AP itself.

    First the arms that have a published row, then the contrasts that are not an arm minus the
    baseline. Only contrasts of the family are judged.
    """
    judged = {
        (one.asked.metric, tuple(sorted(one.asked.weights.items()))): one
        for one in besides(comparison, facts.papers)
    }
    head = ("arm", "metric", "diff", "paper's diff")
    rows = []
    for arm in comparison.arms:
        row = None if arm.baseline else facts.papers.get(arm_name(arm.arm))
        for metric in dict.fromkeys([*row.metrics, *row.gains]) if row else ():
            if metric in arm.metrics:
                weights = _against_baseline(comparison, arm)
                one = judged.pop((metric, tuple(sorted(weights.items()))), None)
                rows.append(_paper_row(facts, comparison, arm, metric, one))
    for one in judged.values():
        ours, published = points(one.difference, True), points(one.published, True)
        names = one.asked.name, metric_label(one.asked.metric)
        rows.append(Row.of(*names, ours, published, *_judged(one)))
    return Table((*head, "range for one seed", "beside the paper"), tuple(rows), left=2)


def _against_baseline(comparison: Comparison, arm: Arm) -> dict[str, float]:
    base = comparison.baseline
    return {arm_name(arm.arm): 1.0, arm_name(base.arm): -1.0} if base and base is not arm else {}


def _paper_row(
    facts: Facts, comparison: Comparison, arm: Arm, metric: str, one: Beside | None
) -> Row:
    gain = published_difference(_against_baseline(comparison, arm), metric, facts.papers)
    return Row.of(
        arm_label(arm),
        metric_label(metric),
        _difference_cell(comparison, arm, metric).text,
        points(gain, signed=True),
        *_judged(one),
    )


def _judged(one: Beside | None) -> tuple[str, str]:
    if one is None:
        return "", ""
    return interval_text(one.low, one.high), one.judgement or ("withheld" if one.withheld else "-")


def calibration_table(study: Study, comparison: Comparison) -> Table:
    """Our AP beside public numbers of the same recipe."""
    rows = [
        Row.of(
            arm_label(one.arm),
            metric_label(one.metric),
            points(one.ours),
            points(one.public),
            f"±{100 * one.band:.2g}",
            "inside" if one.inside else "outside",
        )
        for one in calibrated(study, comparison)
    ]
    return Table(("arm", "metric", "ours", "public", "band", "result"), tuple(rows), left=2)


def trials_table(view: StudyView) -> Table:
    """A row for each trial: how it ran, and where its numbers can be looked up."""
    rows = []
    for trial in view.trials:
        events = ", ".join(f"{event.kind} at step {event.step}" for event in trial.events)
        ran = trial.key, trial.trial, trial.state, str(trial.attempts), events
        rows.append(Row.of(*ran, trial.mlflow_run_id, trial.identity[:12]))
    head = ("trial", "id", "state", "attempts", "events", "MLflow run", "identity")
    return Table(head, tuple(rows), left=len(head))


# --- texts ------------------------------------------------------------------------------------


def arm_label(arm: Arm) -> str:
    """ "roi align, masks sigmoid", or "baseline" where there are no factors."""
    return ", ".join(f"{factor} {level}" for factor, level in arm.arm.items()) or "baseline"


def metric_label(metric: str) -> str:
    """ "segm/AP75" -> "mask AP75"."""
    group, _, stat = metric.partition("/")
    base, _, inference = group.partition("-")
    return f"{_GROUPS.get(base, base)} {stat}" + (f" ({inference})" if inference else "")


def shown_metrics(comparison: Comparison, metrics: Sequence[str]) -> list[str]:
    """The study's columns that at least one arm has a number for, or all while there is none."""
    present = [
        metric for metric in metrics if any(metric in arm.metrics for arm in comparison.arms)
    ]
    # A study that has just begun has its columns already.
    return present or list(metrics)


def points(value: float, signed: bool = False) -> str:
    """A fraction as percent points with one decimal; "-" where there is no number."""
    if math.isnan(value):
        return "-"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    # A value that rounds to zero keeps its sign otherwise, and -0.0 reads like a loss.
    return text.replace("-0.0", "+0.0") if signed else text.replace("-0.0", "0.0")


def seeds_text(arm: Arm) -> str:
    """ "3", or "2 of 3" where trials are missing, with a star where the notes say more."""
    done = sum(trial.state == "done" for trial in arm.trials)
    asked = sum(trial.state != "held" for trial in arm.trials)  # those wait for a look
    text = str(done) if done == asked else f"{done} of {asked}"
    return f"{text}*" if arm.marks else text


def mean_text(summary: Summary | None, bare: bool = False) -> str:
    """The mean with half of its interval, which one seed does not have; `bare` leaves it out."""
    if summary is None:
        return "-"
    half = (summary.high - summary.low) / 2
    return (
        points(summary.mean)
        if math.isnan(half) or bare
        else f"{points(summary.mean)} ±{points(half)}"
    )


def verdict_text(answer: Answer) -> str:
    """The verdict; where it is not resolved with the difference that could have been seen."""
    if not answer.verdict:
        return "withheld"
    if answer.later is not None:
        return f"{answer.verdict} (first, {answer.estimate.seeds} seeds)"
    if answer.verdict == "not resolved":
        return f"not resolved (sees {points(answer.estimate.resolvable)})"
    return answer.verdict


def _difference_cell(comparison: Comparison, arm: Arm, metric: str) -> Cell:
    if arm.baseline:
        return Cell("", "quiet")
    difference = arm.differences.get(metric)
    if difference is None:
        return Cell("-", "diff")
    answer = comparison.answer(arm, metric)
    # The difference is of all seeds; a first verdict, of fewer, says nothing of it.
    same = answer is not None and math.isclose(answer.estimate.difference, difference.mean)
    colour = _colour(answer) if answer is not None and same else ""
    return Cell(points(difference.mean, signed=True), f"diff {colour}".strip())


def _colour(answer: Answer) -> str:
    # What may be noise, or is of no matter, must not look like news.
    return answer.verdict if answer.verdict in ("better", "worse") else ""


def _answer_row(answer: Answer) -> Row:
    asked, estimate = answer.asked, answer.estimate
    expected = asked.expected + (f" (±{asked.margin:g})" if asked.margin else "")
    return Row(
        (
            Cell(asked.name),
            Cell(asked.of),
            Cell(asked.minus),
            Cell(metric_label(asked.metric)),
            Cell(points(estimate.difference, True)),
            Cell(interval_text(estimate.low, estimate.high)),
            Cell(str(estimate.seeds)),
            Cell(expected.strip() or "-"),
            Cell(verdict_text(answer), _colour(answer)),
        )
    )


def interval_text(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{end(low)} to {end(high)}"


def end(value: float, signed: bool = True) -> str:
    """An end of an interval in points. One near zero keeps the digit that shows on which side."""
    for digits in (1, 2, 3, 4):
        text = f"{100 * value:+.{digits}f}" if signed else f"{100 * value:.{digits}f}"
        if float(text):
            return text
    return points(value, signed)

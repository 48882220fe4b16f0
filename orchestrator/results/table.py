"""A study's numbers as plain text: readable in a terminal, in a README and in a mail. AP in percent points."""

from __future__ import annotations

import math
from collections.abc import Sequence

from contract.answers import StudyView
from orchestrator.results.facts import Facts
from orchestrator.results.statistics import (
    CONFIDENCE,
    MIN_PAIRS,
    Arm,
    Comparison,
    Difference,
    Summary,
)

SIGNS = {"better": "+", "worse": "-", "not shown": "0", "": ""}
_GROUPS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
SOFTMAX_INFERENCES = ("probability", "argmax", "versus_background")


def text_report(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """All that the study says, block by block; each line stands on its own."""
    study = facts.study
    blocks = [_head(view, facts)]
    blocks.append(arms_table(comparison, study.metrics))
    if comparison.machinery_only:
        blocks.append(f"Machinery only: {comparison.machinery_only}.")
    elif intervals := intervals_table(comparison, study.metrics):
        blocks.append(intervals)
    if softmax := softmax_table(comparison):
        blocks.append(softmax)
    if not facts.no_paper:
        blocks.append(paper_table(facts, comparison))
    elif study.paper_table:
        blocks.append(f"No paper column: {facts.no_paper}.")
    notes = notes_of(view, comparison)
    if notes:
        blocks.append("\n".join(["Notes", *(f"- {note}" for note in notes)]))
    return "\n\n".join(blocks)


def notes_of(view: StudyView, comparison: Comparison) -> list[str]:
    """What marks single trials or the whole table."""
    notes = [mark for arm in comparison.arms for mark in arm.marks]
    reference = baseline_of(comparison)
    if reference is None or not reference.metrics:
        notes.append("the baseline arm has no finished trial, so there are no differences")
    notes += [
        f"{trial.key}: taken from trial {trial.cached_from}"
        for trial in view.trials
        if trial.cached_from
    ]
    if not comparison.machinery_only:
        withheld = [
            arm_label(arm)
            for arm in comparison.arms
            if not arm.baseline
            and arm.differences
            and not any(d.verdict for d in arm.differences.values())
        ]
        if withheld:
            rule = f"it takes {MIN_PAIRS} seeds finished in both arms and none that failed"
            notes.append(f"no verdict on {'; '.join(withheld)}: {rule}")
    return [*notes, *(f"warning: {warning}" for warning in view.warnings)]


def baseline_of(comparison: Comparison) -> Arm | None:
    return next((arm for arm in comparison.arms if arm.baseline), None)


def arm_label(arm: Arm) -> str:
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
    return present or list(metrics)


def points(value: float, signed: bool = False) -> str:
    """A fraction as percent points with one decimal; "-" where there is no number."""
    if math.isnan(value):
        return "-"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-0.0", "+0.0") if signed else text.replace("-0.0", "0.0")


def _head(view: StudyView, facts: Facts) -> str:
    states = [trial.state for trial in view.trials]
    done = states.count("done")
    counted = f"{done} of {len(states)} trials finished"
    others = sorted(set(states) - {"done"})
    details = ", ".join(f"{states.count(state)} {state}" for state in others)
    question = f"{facts.study.question}\n" if facts.study.question else ""
    return f"{view.name} ({view.study})\n{question}{counted}{f' ({details})' if details else ''}"


# --- tables ---------------------------------------------------------------------------------------------------------


def arms_table(comparison: Comparison, metrics: Sequence[str]) -> str:
    """One row an arm: means over seeds with half intervals, and the difference to the baseline beside each."""
    metrics = shown_metrics(comparison, metrics)
    factors = list(comparison.arms[0].arm) if comparison.arms else []
    head = [*(factors or ["arm"]), "seeds"]
    for metric in metrics:
        head += [metric_label(metric), "diff"]
    rows = []
    for arm in comparison.arms:
        cells = [*(list(arm.arm.values()) or ["baseline"]), seeds_cell(arm)]
        for metric in metrics:
            cells += [mean_cell(arm.metrics.get(metric)), difference_cell(arm, metric)]
        rows.append(cells)
    return aligned(head, rows, left=max(1, len(factors)))


def intervals_table(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Each arm's difference with its interval and verdict, one line an arm and metric; empty without differences."""
    rows = []
    for arm in comparison.arms:
        for metric in shown_metrics(comparison, metrics):
            found = arm.differences.get(metric)
            if found is not None:
                rows.append([arm_label(arm), metric_label(metric), *difference_cells(found)])
    if not rows:
        return ""
    head = ["arm", "metric", "diff", f"{100 * CONFIDENCE:.0f}% interval", "p", "seeds", "verdict"]
    title = "Differences to the baseline in points, paired by seed (p: t test, Holm over the arms)"
    return f"{title}\n{aligned(head, rows, left=2)}"


def softmax_table(comparison: Comparison) -> str:
    """Mask AP of softmax arms under every inference that was evaluated; empty without such arms."""
    rows = []
    for arm in comparison.arms:
        values = [arm.metrics.get(f"segm-{name}/AP") for name in SOFTMAX_INFERENCES]
        if any(values):
            rows.append(
                [
                    arm_label(arm),
                    mean_cell(arm.metrics.get("segm/AP")),
                    *(mean_cell(v) for v in values),
                ]
            )
    if not rows:
        return ""
    names = [name.replace("_", " ") for name in SOFTMAX_INFERENCES]
    return f"Mask AP of the softmax arms by inference\n{aligned(['arm', 'as configured', *names], rows, left=1)}"


def paper_table(facts: Facts, comparison: Comparison) -> str:
    """Our means and differences beside the published ones, for the arms that have a row."""
    rows = paper_cells(facts, comparison)
    head = ["arm", "metric", "ours", "paper", "diff", "paper's diff"]
    return f"Beside the paper, table {facts.study.paper_table}\n{aligned(head, rows, left=2)}"


def paper_cells(facts: Facts, comparison: Comparison) -> list[list[str]]:
    """Arm, metric, ours, paper, our difference, paper's difference: a row an arm and metric that both have."""
    reference = baseline_of(comparison)
    base = facts.papers.get(tuple(reference.arm.items())) if reference else None
    rows = []
    for arm in comparison.arms:
        paper = facts.papers.get(tuple(arm.arm.items()))
        if paper is None:
            continue
        gains = dict(paper.gains)
        if base and not arm.baseline:
            gains |= {
                m: paper.metrics[m] - base.metrics[m] for m in paper.metrics if m in base.metrics
            }
        for metric in dict.fromkeys([*paper.metrics, *paper.gains]):
            if metric in arm.metrics:
                published = points(paper.metrics.get(metric, math.nan))
                theirs = "" if arm.baseline else points(gains.get(metric, math.nan), signed=True)
                cells = [
                    mean_cell(arm.metrics[metric]),
                    published,
                    difference_cell(arm, metric),
                    theirs,
                ]
                rows.append([arm_label(arm), metric_label(metric), *cells])
    return rows


def seeds_cell(arm: Arm) -> str:
    """ "3", or "2 of 3" where trials are missing, with a star where something is to be noted."""
    done = sum(trial.state == "done" for trial in arm.trials)
    text = str(done) if done == len(arm.trials) else f"{done} of {len(arm.trials)}"
    return f"{text}*" if arm.marks else text


def mean_cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    half = (summary.high - summary.low) / 2
    return points(summary.mean) if math.isnan(half) else f"{points(summary.mean)} ±{points(half)}"


def difference_cell(arm: Arm, metric: str) -> str:
    if arm.baseline:
        return ""
    found = arm.differences.get(metric)
    return points(found.mean, signed=True) if found else "-"


def difference_cells(found: Difference) -> list[str]:
    """Difference, interval, p, pairs, verdict."""
    interval = (
        "-" if math.isnan(found.low) else f"{points(found.low, True)} to {points(found.high, True)}"
    )
    p = (
        "-"
        if math.isnan(found.p_adjusted)
        else ("<0.001" if found.p_adjusted < 0.001 else f"{found.p_adjusted:.3f}")
    )
    return [points(found.mean, True), interval, p, str(len(found.by_seed)), found.verdict or "none"]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns padded to their widest cell, the first `left` to the left and the others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    padded = [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(line.rstrip() for line in padded)

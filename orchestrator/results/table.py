"""A study's numbers as plain text: readable in a terminal, in a README and in a mail."""

from __future__ import annotations

from collections.abc import Sequence

from contract.answers import StudyView, TrialView
from orchestrator.results.cells import (
    Table,
    answers_table,
    arms_table,
    calibration_table,
    exploratory_table,
    images_table,
    interval_text,
    metric_label,
    paper_table,
    points,
    softmax_table,
)
from orchestrator.results.comparison import Answer, Comparison
from orchestrator.results.details.headlines import headlines
from orchestrator.results.facts import Facts
from orchestrator.results.published.beside import besides
from orchestrator.results.published.calibration import calibrated, discredited
from orchestrator.results.statistics.contrasts import Estimate

BESIDE = (
    "The paper has one seed an arm. Outside of the range for one seed our result contradicts it."
)
IMAGES = "Evaluation noise: 95% over seeds, and over seeds and resampled validation images"
EXPLORATORY = "Exploratory: plain 95% intervals, each on its own; no verdicts"


def text_report(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """All that the study says, block by block; each line stands on its own."""
    study = facts.study
    lines = [line.text for line in headlines(facts, comparison)]
    blocks = [_head(view, facts), *(["\n".join(lines)] if lines else [])]
    blocks.append(_text(arms_table(comparison, study.metrics)))
    exploratory = exploratory_table(comparison, study.metrics)
    if comparison.machinery_only:
        blocks.append(f"Machinery only: {comparison.machinery_only}.")
    elif comparison.early:
        blocks.append(f"No intervals yet: {comparison.early}.")
    elif comparison.answers:
        blocks.append(f"{family_title(comparison)}\n{_text(answers_table(comparison))}")
        blocks.append(f"Scope: on {facts.scope}. Nothing else was measured.")
        if comparison.with_images:
            blocks.append(f"{IMAGES}\n{_text(images_table(comparison))}")
    if not comparison.machinery_only and not comparison.early and exploratory.rows:
        blocks.append(f"{EXPLORATORY}\n{_text(exploratory)}")
    calibration = calibration_table(study, comparison)
    if calibration.rows:
        blocks.append(f"Calibration against public numbers\n{_text(calibration)}")
    softmax = softmax_table(comparison)
    if softmax.rows:
        blocks.append(f"Mask AP of the softmax arms by inference\n{_text(softmax)}")
    if not facts.no_paper:
        published = _text(paper_table(facts, comparison))
        blocks.append(f"Beside the paper, table {study.paper_table}\n{published}\n{BESIDE}")
    elif study.paper_table:
        blocks.append(f"No paper column: {facts.no_paper}.")
    notes = notes_of(view, facts, comparison)
    if notes:
        blocks.append("\n".join(["Notes", *(f"- {note}" for note in notes)]))
    return "\n\n".join(blocks)


def family_title(comparison: Comparison) -> str:
    """What the intervals of the family hold together."""
    count = len(comparison.answers)
    together = f"all {count} hold at once in 95% of studies" if count > 1 else "95% interval"
    return f"Contrasts in points, minus the reference ({together})"


def _whose(trial: TrialView, view: StudyView) -> str:
    another = trial.ran_by and trial.ran_by != view.owner
    return f", run by {trial.ran_by}" if another else ""


def notes_of(view: StudyView, facts: Facts, comparison: Comparison) -> list[str]:
    """What a reader of the table must know of single trials, of arms, or of the whole table."""
    notes = [mark for arm in comparison.arms for mark in arm.marks]
    if comparison.baseline is None or not comparison.baseline.metrics:
        notes.append("the baseline arm has no finished trial, so there are no differences")
    notes += [
        f"{trial.key}: taken from trial {trial.cached_name or trial.cached_from}"
        f"{_whose(trial, view)}"
        for trial in view.trials
        if trial.cached_from
    ]
    notes += [*comparison.notes, *_looks(view, comparison)]
    notes += [
        f"no verdict on {answer.asked.name}: {answer.withheld}"
        for answer in comparison.answers
        if answer.withheld
    ]
    notes += [_later(view, answer, answer.later) for answer in comparison.answers if answer.later]
    missed = discredited(calibrated(facts.study, comparison))
    notes += [missed] if missed else []
    notes += _paper_notes(facts, comparison)
    return [*notes, *(f"warning: {warning}" for warning in view.warnings)]


def _looks(view: StudyView, comparison: Comparison) -> list[str]:
    """Which arms each look stopped, and what that saved. No numbers: the study may go on."""
    lines = []
    for look in comparison.looks:
        stopped = "; ".join(
            f"{arm} takes no more seeds: {why}" for arm, why in look.stopped.items()
        )
        lines.append(f"look at {look.seeds} seeds: {stopped or 'all arms go on'}")
    spared = sum(trial.state == "spared" for trial in view.trials)
    if spared:
        lines.append(f"the looks saved {spared} of {len(view.trials)} trials")
    return lines


def _later(view: StudyView, answer: Answer, later: Estimate) -> str:
    first = answer.first
    assert first is not None
    where = "" if first.study == view.study else f" in study {first.study}"
    return (
        f"{answer.asked.name}: the verdict is the first one, of {first.seeds} seeds{where}, and "
        f"stands; with {later.seeds} seeds the difference is {points(later.difference, True)}, "
        f"interval {interval_text(later.low, later.high)}: exploratory"
    )


def _paper_notes(facts: Facts, comparison: Comparison) -> list[str]:
    """In what the runs are not the paper's. Without a column, the direction is all there is."""
    notes = [f"no paper column: {line}" for line in facts.earned.barred]
    notes += [f"unlike the paper, in every difference: {line}" for line in facts.earned.noted]
    notes += [f"beside the paper: {line}" for line in facts.earned.unstated]
    if facts.no_paper:
        notes += [
            f"{one.asked.name}: {one.direction} {'as' if one.direction[0] == 's' else 'to'} the "
            f"paper's {points(one.published, True)} {metric_label(one.asked.metric)}"
            for one in besides(comparison, facts.papers)
            if one.direction
        ]
    return notes


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns padded to their widest cell: the first `left` to the left, others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    padded = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [lines[0], rule, *lines[1:]]
    ]
    # Spaces at the end of a line would show as changes where people keep tables in git.
    return "\n".join(line.rstrip() for line in padded)


def _text(table: Table) -> str:
    rows = [[cell.text for cell in row.cells] for row in table.rows]
    return aligned(table.head, rows, table.left)


def _head(view: StudyView, facts: Facts) -> str:
    states = [trial.state for trial in view.trials]
    counted = f"{states.count('done')} of {len(states)} trials finished"
    others = sorted(set(states) - {"done"})
    details = ", ".join(f"{states.count(state)} {state}" for state in others)
    question = f"{facts.study.question}\n" if facts.study.question else ""
    precision = f"\nPrecision: {facts.precision}" if facts.precision else ""
    states_line = f"{counted}{f' ({details})' if details else ''}"
    return f"{view.name} ({view.study})\n{question}{states_line}{precision}"

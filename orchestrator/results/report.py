"""The report of a study: a text table, CSV, JSON and one page of HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract.answers import StudyView
from orchestrator.results.facts import Facts, gather, images_seen
from orchestrator.results.statistics import Arm, Comparison, Difference, Summary, compare
from orchestrator.results.table import arm_label, notes_of, text_report


@dataclass(frozen=True)
class Report:
    """`folder` holds all files; `page` is the HTML, `table` the text."""

    folder: Path
    page: Path
    table: str


def build_report(study: StudyView, folder: Path) -> Report:
    """Writes report.html, table.txt, table.csv and report.json into `folder`, from what the trials left so far."""
    from orchestrator.results.page import html_page

    facts = gather(study)
    comparison = compare(study.trials, facts.study.metrics, facts.machinery_only)
    table = text_report(study, facts, comparison)
    files = {
        "report.html": html_page(study, facts, comparison),
        "table.txt": table + "\n",
        "table.csv": csv_text(comparison),
        "report.json": json.dumps(as_json(study, facts, comparison), indent=2, allow_nan=False)
        + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return Report(folder, folder / "report.html", table)


def csv_text(comparison: Comparison) -> str:
    """One line a trial and metric: the raw numbers for one's own statistics."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "baseline", "seed", "trial", "state", "metric", "value", "difference"])
    for arm in comparison.arms:
        for trial in arm.trials:
            row = [_cell(arm_label(arm)), arm.baseline, trial.seed, _cell(trial.trial), trial.state]
            if not trial.metrics:
                writer.writerow([*row, "", "", ""])
            for metric, value in trial.metrics.items():
                found = arm.differences.get(metric)
                paired = (
                    found.by_seed.get(trial.seed, "") if found and trial.state == "done" else ""
                )
                writer.writerow([*row, _cell(metric), value, paired])
    return buffer.getvalue()


def as_json(study: StudyView, facts: Facts, comparison: Comparison) -> dict[str, Any]:
    """Everything that the table says, as fractions; null where there is no number."""
    return {
        "study": study.study,
        "name": study.name,
        "question": facts.study.question,
        "state": study.state,
        "machinery_only": comparison.machinery_only,
        "no_paper": facts.no_paper,
        "notes": notes_of(study, comparison),
        "arms": [
            {
                "arm": arm.arm,
                "baseline": arm.baseline,
                "metrics": {name: _summary(summary) for name, summary in arm.metrics.items()},
                "differences": {
                    name: _difference(found) for name, found in arm.differences.items()
                },
                "paper": _paper(facts, arm),
                "trials": [
                    {
                        "trial": trial.trial,
                        "seed": trial.seed,
                        "state": trial.state,
                        "error": trial.error,
                        "events": [event.model_dump() for event in trial.events],
                        "images_seen": images_seen(facts.trials[trial.trial].run),
                    }
                    for trial in arm.trials
                ],
            }
            for arm in comparison.arms
        ],
    }


def _paper(facts: Facts, arm: Arm) -> dict[str, dict[str, float]]:
    row = facts.papers.get(tuple(arm.arm.items()))
    return {"metrics": row.metrics, "gains": row.gains} if row and not facts.no_paper else {}


def _cell(text: str) -> str:
    """Spreadsheets run cells that start like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _summary(summary: Summary) -> dict[str, Any]:
    values = {
        "mean": summary.mean,
        "deviation": summary.deviation,
        "low": summary.low,
        "high": summary.high,
    }
    return {
        **{key: _finite(value) for key, value in values.items()},
        "by_seed": _by_seed(summary.by_seed),
    }


def _difference(found: Difference) -> dict[str, Any]:
    values = {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p}
    values |= {"p_adjusted": found.p_adjusted, "p_flips": found.p_flips}
    cleaned: dict[str, Any] = {key: _finite(value) for key, value in values.items()}
    return {**cleaned, "verdict": found.verdict, "by_seed": _by_seed(found.by_seed)}


def _by_seed(values: dict[int, float]) -> dict[str, float]:
    return {str(seed): value for seed, value in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""The report of a study: a text table, CSV, JSON and one page of HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

from contract.answers import StudyView
from contract.files import finite
from orchestrator.results.cells import arm_label
from orchestrator.results.comparison import Answer, Arm, Comparison
from orchestrator.results.details.headlines import headlines
from orchestrator.results.facts import Facts, gather
from orchestrator.results.formats import latex, markdown
from orchestrator.results.looks import answers_of
from orchestrator.results.published.beside import besides
from orchestrator.results.published.calibration import calibrated
from orchestrator.results.statistics.contrasts import Estimate
from orchestrator.results.table import notes_of, text_report
from orchestrator.study.contrasts import arm_name

Format: TypeAlias = Literal["html", "md", "latex", "csv", "json", "png"]
FILES: Mapping[Format, str] = {
    "html": "report.html",
    "md": "table.md",
    "latex": "table.tex",
    "csv": "table.csv",
    "json": "report.json",
    "png": "differences.png",
}
_WRITTEN: tuple[Format, ...] = ("html", "csv", "json")  # of every report, beside table.txt


@dataclass(frozen=True)
class Report:
    """`folder` holds all files; `page` is the HTML, `table` the text."""

    folder: Path
    page: Path
    table: str


@dataclass(frozen=True)
class Contents:
    """What the trials left so far, read once; each form of the report is made of it."""

    view: StudyView
    facts: Facts
    comparison: Comparison

    @classmethod
    def of(cls, view: StudyView, withheld: str = "") -> Contents:
        """withheld: why the contrasts of the family have no answers here."""
        facts = gather(view)
        comparison = answers_of(view, facts)
        if withheld:
            comparison = replace(comparison, answers=(), notes=(withheld, *comparison.notes))
        return cls(view, facts, comparison)

    @cached_property
    def with_images(self) -> Comparison:
        """The comparison with the noise of images, which some forms do not show: it takes time."""
        if not self.comparison.answers:
            return self.comparison
        from orchestrator.results.noise.images import with_images  # loads numpy

        found = with_images(self.view, self.facts, self.comparison)
        return replace(self.comparison, with_images=found)

    def text(self) -> str:
        return text_report(self.view, self.facts, self.with_images)

    def rendered(self, form: Format) -> bytes:
        """The file of this form."""
        view, facts, comparison = self.view, self.facts, self.comparison
        match form:
            case "html":
                from orchestrator.results.page import html_page  # loads matplotlib

                return html_page(view, facts, self.with_images).encode()
            case "png":
                from orchestrator.results.page import differences_png

                return differences_png(facts, comparison)
            case "md":
                return f"{markdown(view, facts, comparison)}\n".encode()
            case "latex":
                return f"{latex(view, facts, comparison)}\n".encode()
            case "csv":
                return csv_text(comparison).encode()
            case "json":
                data = as_json(view, facts, self.with_images)
                return f"{json.dumps(data, indent=2, allow_nan=False)}\n".encode()
            case _:
                assert_never(form)


def build_report(study: StudyView, folder: Path, withheld: str = "") -> Report:
    """Writes the report of what the trials left so far.

    `folder` gets report.html, table.txt, table.csv and report.json. withheld: see `Contents.of`.
    """
    contents = Contents.of(study, withheld)
    table = contents.text()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text(f"{table}\n", encoding="utf-8")
    for form in _WRITTEN:
        (folder / FILES[form]).write_bytes(contents.rendered(form))
    return Report(folder, folder / FILES["html"], table)


# --- table.csv --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvRow:
    """One trial and metric. The names of the fields begin the head; a column a factor follows."""

    arm: str
    baseline: bool
    seed: int
    trial: str
    state: str
    metric: str = ""
    value: float | str = ""
    difference: float | str = ""  # to the baseline's trial of the same seed


def csv_text(comparison: Comparison) -> str:
    """One line for each trial and metric: the raw numbers for one's own statistics."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    own = [field.name for field in fields(CsvRow)]
    factors = list(comparison.arms[0].arm) if comparison.arms else []
    # A factor may have the name of a column: two of one name would be read as one.
    writer.writerow([*own, *(_cell(f"factor.{f}" if f in own else f) for f in factors)])
    for arm in comparison.arms:
        levels = [_cell(level) for level in arm.arm.values()]
        for row in _csv_rows(arm):
            writer.writerow([*astuple(row), *levels])
    return buffer.getvalue()


def _csv_rows(arm: Arm) -> list[CsvRow]:
    rows: list[CsvRow] = []
    for trial in arm.trials:
        bare = CsvRow(
            _cell(arm_label(arm)), arm.baseline, trial.seed, _cell(trial.trial), trial.state
        )
        rows += [] if trial.metrics else [bare]
        for metric, value in trial.metrics.items():
            paired = arm.differences.get(metric)
            # Differences pair finished trials; one that failed may still have metrics.
            pairs = paired.by_seed if paired and trial.state == "done" else {}
            difference = pairs.get(trial.seed, "")
            rows.append(replace(bare, metric=_cell(metric), value=value, difference=difference))
    return rows


def _cell(text: str) -> str:
    """Spreadsheets run cells that start like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# --- report.json ------------------------------------------------------------------------------


def as_json(study: StudyView, facts: Facts, comparison: Comparison) -> dict[str, Any]:
    """Everything that the table says, as fractions; null where there is no number."""
    return {
        "study": study.study,
        "name": study.name,
        "question": facts.study.question,
        "state": study.state,
        "machinery_only": comparison.machinery_only,
        "no_paper": facts.no_paper,
        "paper": _paper_json(facts, comparison),
        "precision": facts.precision,
        "calibration": [
            {
                "arm": arm_name(one.arm.arm),
                "metric": one.metric,
                "ours": one.ours,
                "public": one.public,
                "band": one.band,
                "inside": one.inside,
            }
            for one in calibrated(facts.study, comparison)
        ],
        "early": comparison.early,
        "scope": facts.scope,
        "headlines": [line.text for line in headlines(facts, comparison)],
        "primary": facts.primary,
        "looks": [look.model_dump() for look in comparison.looks],
        "spared": sum(trial.state == "spared" for trial in study.trials),
        "contrasts": [
            finite(_answer_json(answer) | _images_json(answer, comparison))
            for answer in comparison.answers
        ],
        "notes": notes_of(study, facts, comparison),
        "arms": [finite(_arm_json(facts, arm, bool(comparison.early))) for arm in comparison.arms],
    }


def _paper_json(facts: Facts, comparison: Comparison) -> dict[str, Any]:
    """What stands beside the paper. Without a column, contrasts have a direction alone."""
    column = not facts.no_paper
    return {
        "table": facts.study.paper_table,
        "barred": facts.earned.barred,
        "noted": facts.earned.noted,
        "unstated": facts.earned.unstated,
        "contrasts": [
            finite(
                {
                    "name": one.asked.name,
                    "metric": one.asked.metric,
                    "difference": one.difference,
                    "published": one.published,
                    "low": one.low if column else math.nan,
                    "high": one.high if column else math.nan,
                    "judgement": one.judgement if column else "",
                    "direction": "" if column else one.direction,
                }
            )
            for one in besides(comparison, facts.papers)
        ],
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    asked, estimate = answer.asked, answer.estimate
    return {
        "name": asked.name,
        "arm": asked.of,
        "reference": asked.minus,
        "metric": asked.metric,
        "weights": dict(asked.weights),
        "difference": estimate.difference,
        "low": estimate.low,
        "high": estimate.high,
        "seeds": estimate.seeds,
        "expected": asked.expected,
        "margin": asked.margin / 100,
        "verdict": answer.verdict,
        "withheld": answer.withheld,
        "resolvable": estimate.resolvable,
        "first": answer.first.model_dump() if answer.first else None,
        "later": _later_json(answer.later) if answer.later else None,
    }


def _later_json(estimate: Estimate) -> dict[str, Any]:
    """What more seeds than those of the verdict say: to explore."""
    numbers = {"difference": estimate.difference, "low": estimate.low, "high": estimate.high}
    return {**finite(numbers), "seeds": estimate.seeds}


def _images_json(answer: Answer, comparison: Comparison) -> dict[str, Any]:
    """The interval over seeds and validation images, which small validation sets have."""
    low, high = comparison.with_images.get(answer.asked.name, (math.nan, math.nan))
    return {"low_with_images": low, "high_with_images": high}


def _arm_json(facts: Facts, arm: Arm, early: bool) -> dict[str, Any]:
    # An interval before the end would be looked at again, and each look is a chance.
    hidden = {"low": None, "high": None} if early else {}
    row = None if facts.no_paper else facts.papers.get(arm_name(arm.arm))
    return {
        "arm": arm.arm,
        "baseline": arm.baseline,
        "metrics": {name: asdict(summary) | hidden for name, summary in arm.metrics.items()},
        "differences": {name: asdict(pair) | hidden for name, pair in arm.differences.items()},
        "paper": {"gains": row.gains} if row else {},
        "trials": [
            {
                "trial": trial.trial,
                "seed": trial.seed,
                "state": trial.state,
                "error": trial.error,
                "events": [event.model_dump() for event in trial.events],
                "images_seen": facts.trials[trial.trial].run.images,
            }
            for trial in arm.trials
        ],
    }

"""The report as one HTML page: no script, nothing fetched, every text of a person escaped."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from contract.answers import StudyView
from orchestrator.results.cells import (
    Table,
    answers_table,
    arms_table,
    exploratory_table,
    paper_table,
    shown_metrics,
    softmax_table,
    trials_table,
)
from orchestrator.results.comparison import Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.media import loss_curves, pictures
from orchestrator.results.plots import arms_plot, loss_plot
from orchestrator.results.table import EXPLORATORY, family_title, notes_of

_TEMPLATE = "report.html.j2"
# Autoescape for every template, whatever its name ends in: names and errors are a person's texts.
_PAGES = Environment(
    autoescape=True,
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)


def html_page(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """The whole document."""
    study = facts.study
    plots = [
        arms_plot(comparison.arms, metric, bare=bool(comparison.early))
        for metric in shown_metrics(comparison, study.metrics)
    ]
    silent = comparison.machinery_only or comparison.early
    exploratory = exploratory_table(comparison, study.metrics)
    return _PAGES.get_template(_TEMPLATE).render(
        view=view,
        study=study,
        done=sum(trial.state == "done" for trial in view.trials),
        precision=facts.precision,
        machinery_only=comparison.machinery_only,
        withheld_paper=facts.no_paper if study.paper_table else "",
        arms=arms_table(comparison, study.metrics),
        early=comparison.early,
        answers=_unless_empty(answers_table(comparison)),
        family=family_title(comparison),
        scope=facts.scope,
        exploratory=None if silent else _unless_empty(exploratory),
        exploratory_title=EXPLORATORY,
        arm_plots=[plot for plot in plots if plot],
        softmax=_unless_empty(softmax_table(comparison)),
        paper=None if facts.no_paper else _unless_empty(paper_table(facts, comparison)),
        losses=loss_plot(loss_curves(facts, comparison)),
        pictures=pictures(facts, comparison),
        notes=notes_of(view, comparison),
        trials=trials_table(view),
        spec=json.dumps(view.spec, indent=2),
    )


def _unless_empty(table: Table) -> Table | None:
    return table if table.rows else None

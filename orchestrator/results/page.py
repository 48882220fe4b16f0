"""The report as one HTML page: no script, nothing fetched, every text of a person escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence

from contract.answers import StudyView
from orchestrator.results.facts import Facts
from orchestrator.results.media import loss_curves, pictures
from orchestrator.results.plots import arms_plot, loss_plot
from orchestrator.results.statistics import Comparison
from orchestrator.results.table import (
    SOFTMAX_INFERENCES,
    arm_label,
    difference_cells,
    mean_cell,
    metric_label,
    notes_of,
    paper_cells,
    points,
    seeds_cell,
    shown_metrics,
)

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --accent: #3b82c4; --warn: #e0813a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
  color: CanvasText; background: Canvas; }
h1 { margin: 0 0 .2rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .6rem; font-size: 1.15rem; }
p { margin: .4rem 0; } .question { font-size: 1.15rem; } .quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.call { margin: 1rem 0; padding: .7rem 1rem; border-left: 4px solid var(--warn); background: #e0813a1f; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th.name, td.name { text-align: left; }
tr.baseline td { background: #e0813a14; } .diff { color: var(--accent); font-weight: 600; padding-left: 0; }
.better { color: #2e9455; font-weight: 600; } .worse { color: #cf4a4a; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } figure { margin: 0; max-width: 46rem; }
img { max-width: 100%; height: auto; border-radius: 4px; }
li { margin: .25rem 0; overflow-wrap: anywhere; } details { margin-top: .6rem; }
pre { overflow-x: auto; font-size: .85rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """The whole document."""
    title = html.escape(view.name)
    sections = [
        _header(view, facts),
        _call(facts, comparison),
        _arms(facts, comparison),
        _differences(facts, comparison),
        _plots(facts, comparison),
        _softmax(comparison),
        _paper(facts, comparison),
        _losses(facts, comparison),
        _pictures(facts, comparison),
        _notes(view, comparison),
        _trials(view),
        _study(view),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _header(view: StudyView, facts: Facts) -> str:
    done = sum(trial.state == "done" for trial in view.trials)
    question = (
        f'<p class="question">{html.escape(facts.study.question)}</p>'
        if facts.study.question
        else ""
    )
    state = f"{done} of {len(view.trials)} trials finished, study {view.state}, {view.study}, by {view.owner}"
    return f'<h1>{html.escape(view.name)}</h1>{question}<p class="quiet">{html.escape(state)}</p>'


def _call(facts: Facts, comparison: Comparison) -> str:
    lines = []
    if comparison.machinery_only:
        lines.append(f"<b>Machinery only.</b> {html.escape(comparison.machinery_only)}.")
    if facts.study.paper_table and facts.no_paper:
        lines.append(f"<b>No paper column:</b> {html.escape(facts.no_paper)}.")
    return f'<div class="call">{"<br>".join(lines)}</div>' if lines else ""


def _arms(facts: Facts, comparison: Comparison) -> str:
    metrics = shown_metrics(comparison, facts.study.metrics)
    factors = list(comparison.arms[0].arm) if comparison.arms else []
    head = [
        *(factors or ["arm"]),
        "seeds",
        *(part for metric in metrics for part in (metric_label(metric), "diff")),
    ]
    rows = []
    for arm in comparison.arms:
        cells = [_td(name, "name") for name in list(arm.arm.values()) or ["baseline"]] + [
            _td(seeds_cell(arm))
        ]
        for metric in metrics:
            found = arm.differences.get(metric)
            shown = (
                points(found.mean, signed=True) if found else "baseline" if arm.baseline else "-"
            )
            kind = (
                f"diff {found.verdict}"
                if found and found.verdict in ("better", "worse")
                else "diff"
            )
            cells += [
                _td(mean_cell(arm.metrics.get(metric))),
                _td(shown, "quiet" if arm.baseline else kind),
            ]
        rows.append(f'<tr class="{"baseline" if arm.baseline else ""}">{"".join(cells)}</tr>')
    units = "AP in percent points; diff is to the baseline arm, paired by seed; ± is half of a 95% interval."
    caption = f'<p class="quiet">{units}</p>'
    return f"<h2>Arms</h2>{_table(head, rows, max(1, len(factors)))}{caption}"


def _differences(facts: Facts, comparison: Comparison) -> str:
    if comparison.machinery_only:
        return ""
    rows = []
    for arm in comparison.arms:
        for metric in shown_metrics(comparison, facts.study.metrics):
            found = arm.differences.get(metric)
            if found is not None:
                cells = difference_cells(found)
                names = _td(arm_label(arm), "name") + _td(metric_label(metric), "name")
                rows.append(
                    f"<tr>{names}{''.join(map(_td, cells[:-1]))}{_td(cells[-1], found.verdict.replace(' ', '-'))}</tr>"
                )
    head = ["arm", "metric", "diff", "95% interval", "p", "seeds", "verdict"]
    note = (
        '<p class="quiet">p: paired t test over seeds, adjusted for the number of arms (Holm).</p>'
    )
    return f"<h2>Differences to the baseline</h2>{_table(head, rows, 2)}{note}" if rows else ""


def _plots(facts: Facts, comparison: Comparison) -> str:
    figures = [
        arms_plot(comparison.arms, metric)
        for metric in shown_metrics(comparison, facts.study.metrics)
    ]
    drawn = "".join(f"<figure>{figure}</figure>" for figure in figures if figure)
    legend = '<p class="quiet">Dots are seeds, bars means, whiskers 95% intervals; the baseline is orange.</p>'
    return f'<h2>AP by arm</h2><div class="plots">{drawn}</div>{legend}' if drawn else ""


def _softmax(comparison: Comparison) -> str:
    rows = []
    for arm in comparison.arms:
        values = [arm.metrics.get(f"segm-{name}/AP") for name in SOFTMAX_INFERENCES]
        if any(values):
            cells = [mean_cell(arm.metrics.get("segm/AP")), *map(mean_cell, values)]
            rows.append(f"<tr>{_td(arm_label(arm), 'name')}{''.join(map(_td, cells))}</tr>")
    head = ["arm", "as configured", *(name.replace("_", " ") for name in SOFTMAX_INFERENCES)]
    return (
        f"<h2>Mask AP of the softmax arms by inference</h2>{_table(head, rows, 1)}" if rows else ""
    )


def _paper(facts: Facts, comparison: Comparison) -> str:
    if facts.no_paper:
        return ""
    rows = [
        f"<tr>{_td(row[0], 'name')}{_td(row[1], 'name')}{''.join(map(_td, row[2:]))}</tr>"
        for row in paper_cells(facts, comparison)
    ]
    head = ["arm", "metric", "ours", "paper", "diff", "paper's diff"]
    title = f"Beside the paper, table {html.escape(facts.study.paper_table)}"
    return f"<h2>{title}</h2>{_table(head, rows, 2)}" if rows else ""


def _losses(facts: Facts, comparison: Comparison) -> str:
    figure = loss_plot(loss_curves(facts, comparison))
    return f"<h2>Training loss</h2><figure>{figure}</figure>" if figure else ""


def _pictures(facts: Facts, comparison: Comparison) -> str:
    figures = "".join(
        f'<figure><img alt="{html.escape(caption, quote=True)}" '
        f'src="data:{kind};base64,{base64.b64encode(raw).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, kind, raw in pictures(facts, comparison)
    )
    return f'<h2>Validation images</h2><div class="plots">{figures}</div>' if figures else ""


def _notes(view: StudyView, comparison: Comparison) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes_of(view, comparison))
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _trials(view: StudyView) -> str:
    rows = []
    for trial in view.trials:
        events = ", ".join(f"{event.kind} at step {event.step}" for event in trial.events)
        cells = [
            trial.key,
            trial.trial,
            trial.state,
            str(trial.attempts),
            events,
            trial.mlflow_run_id,
            trial.identity[:12],
        ]
        rows.append(f"<tr>{''.join(_td(cell, 'name') for cell in cells)}</tr>")
    head = ["trial", "id", "state", "attempts", "events", "MLflow run", "identity"]
    return f"<h2>Trials</h2><details><summary>{len(rows)} trials</summary>{_table(head, rows, len(head))}</details>"


def _study(view: StudyView) -> str:
    spec = html.escape(json.dumps(view.spec, indent=2))
    return f"<h2>Study</h2><details><summary>as submitted</summary><pre>{spec}</pre></details>"


def _td(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{html.escape(text)}</td>"


def _table(head: Sequence[str], rows: Sequence[str], left: int) -> str:
    kinds = ["name" if i < left else "" for i in range(len(head))]
    cells = "".join(
        f'<th class="{kind}">{html.escape(name)}</th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'

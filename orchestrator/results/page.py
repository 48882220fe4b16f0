"""The report as one HTML page: no script, nothing fetched, every text of a person escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from contract.answers import StudyView
from contract.inspection.arms import ArmsAnswer
from orchestrator.results.cells import (
    Table,
    answers_table,
    arm_label,
    arms_table,
    calibration_table,
    exploratory_table,
    images_table,
    metric_label,
    paper_table,
    shown_metrics,
    softmax_table,
    trials_table,
)
from orchestrator.results.comparison import Comparison
from orchestrator.results.details.arms import errors_table, look_at_arms
from orchestrator.results.details.headlines import headlines
from orchestrator.results.details.origin import cost_table, provenance
from orchestrator.results.details.slices import classes, sizes_table
from orchestrator.results.facts import Facts
from orchestrator.results.media import loss_curves, pictures, validation_curves
from orchestrator.results.plots.curves import Curve, curves_plot
from orchestrator.results.plots.forest import arms_plot, forest
from orchestrator.results.plots.style import colours, png, svg
from orchestrator.results.table import EXPLORATORY, IMAGES, family_title, notes_of
from orchestrator.study.contrasts import arm_name

_TEMPLATE = "report.html.j2"
_MOST_LOSSES = 9  # beside the total one
# Autoescape for every template, whatever its name ends in: names and errors are a person's texts.
_PAGES = Environment(
    autoescape=True,
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Plot:
    """`svg` is matplotlib's own text, which is safe; `title` names it to who cannot see it."""

    svg: str
    title: str


def html_page(view: StudyView, facts: Facts, comparison: Comparison) -> str:
    """The whole document."""
    study = facts.study
    palette = colours(comparison.arms)
    arms = look_at_arms(view, facts, comparison, palette)
    silent = bool(comparison.machinery_only or comparison.early)
    exploratory = exploratory_table(comparison, study.metrics)
    return _PAGES.get_template(_TEMPLATE).render(
        **_plots(facts, comparison),
        view=view,
        study=study,
        done=sum(trial.state == "done" for trial in view.trials),
        precision=facts.precision,
        machinery_only=comparison.machinery_only,
        withheld_paper=facts.no_paper if study.paper_table else "",
        headlines=headlines(facts, comparison),
        arms=arms_table(comparison, study.metrics),
        early=comparison.early,
        answers=_unless_empty(answers_table(comparison)),
        family=family_title(comparison),
        scope=facts.scope,
        exploratory=None if silent else _unless_empty(exploratory),
        exploratory_title=EXPLORATORY,
        images=_unless_empty(images_table(comparison)),
        images_title=IMAGES,
        softmax=_unless_empty(softmax_table(comparison)),
        paper=None if facts.no_paper else _unless_empty(paper_table(facts, comparison)),
        calibration=_unless_empty(calibration_table(study, comparison)),
        sizes=sizes_table(facts, comparison),
        classes=classes(facts, comparison),
        cost=cost_table(facts, comparison),
        # What the trials drew themselves, where nobody could draw the arms side by side.
        pictures=[] if arms.answer else pictures(facts, comparison),
        side_by_side=side_by_side(arms.answer, comparison) if arms.answer else {},
        min_score=arms.answer.min_score if arms.answer else 0.0,
        errors=errors_table(comparison, arms.answer) if arms.answer else None,
        notes=[*notes_of(view, facts, comparison), *([arms.why] if arms.why else [])],
        provenance=provenance(view, facts),
        trials=trials_table(view),
        spec=json.dumps(view.spec, indent=2),
    )


@dataclass(frozen=True)
class Cutout:
    """One picture of a row. colour: of its arm, empty for the truth."""

    name: str
    caption: str
    url: str
    colour: str


def side_by_side(
    answer: ArmsAnswer, comparison: Comparison
) -> dict[str, list[tuple[str, list[Cutout]]]]:
    """Group of images -> (caption, the truth and every arm)."""
    palette = colours(comparison.arms)
    labels = {arm_name(arm.arm): arm_label(arm) for arm in comparison.arms}
    groups: dict[str, list[tuple[str, list[Cutout]]]] = {}
    for row in answer.rows:
        cutouts = [
            Cutout(
                labels.get(one.arm, "truth"),
                one.caption if one.arm else "",
                f"data:image/jpeg;base64,{one.jpeg}",
                palette.get(one.arm, ""),
            )
            for one in row.pictures
        ]
        groups.setdefault(row.group, []).append((row.caption, cutouts))
    return groups


def differences_png(facts: Facts, comparison: Comparison) -> bytes:
    """The forest plot for a slide; before there are contrasts, the values of the primary metric."""
    palette = colours(comparison.arms)
    figure = forest(headlines(facts, comparison), palette) or arms_plot(
        comparison.arms, facts.primary, palette, bool(comparison.early)
    )
    if figure is None:
        raise ValueError(f"{facts.study.name}: no trial has a number yet, so there is no plot")
    return png(figure)


def _plots(facts: Facts, comparison: Comparison) -> dict[str, Any]:
    """Every drawing of the page, by the name that the template gives it."""
    palette = colours(comparison.arms)
    metrics = shown_metrics(comparison, facts.study.metrics)
    bare = bool(comparison.early)
    losses = loss_curves(facts, comparison)
    parts = [name for name in losses if name != "loss"][:_MOST_LOSSES]
    by_arm = [
        _plot(arms_plot(comparison.arms, m, palette, bare), f"{metric_label(m)} of every arm")
        for m in metrics
    ]
    return {
        "forest": _plot(forest(headlines(facts, comparison), palette), "Differences"),
        "arm_plots": [plot for plot in by_arm if plot],
        "validation": _curves(validation_curves(facts, comparison, metrics), palette, 100.0),
        "losses": _curves({n: losses[n] for n in losses if n == "loss"}, palette),
        "parts_of_loss": _curves({name: losses[name] for name in parts}, palette),
    }


def _curves(
    curves: Mapping[str, Sequence[Curve]], palette: Mapping[str, str], scale: float = 1.0
) -> list[Plot]:
    """One plot for each metric or loss."""
    drawn = []
    for name, own in curves.items():
        label = (
            f"{metric_label(name)}, points"
            if scale != 1.0
            else name.removeprefix("loss/").replace("_", " ")
        )
        drawn.append(_plot(curves_plot(own, palette, label, scale), f"{label}, by step"))
    return [plot for plot in drawn if plot]


def _plot(figure: Figure | None, title: str) -> Plot | None:
    return Plot(svg(figure, title, title), title) if figure else None


def _unless_empty(table: Table) -> Table | None:
    return table if table.rows else None

"""Plots of a report as inline SVG; their text has the page's colour, also on a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.results.cells import arm_label, metric_label
from orchestrator.results.comparison import Arm

_INK = "#010203"  # replaced by the page's text colour
_BASELINE = "#e0813a"
# All of them read on white and on black.
_COLOURS = ("#3b82c4", "#4aa564", "#c2577f", "#8f74c9", "#a98f3c", "#4aa5a5", "#b56a4c")
_MIN_SPAN_POINTS = 1.0  # of the axis of AP: a hundredth of a point must not fill the figure
_LOG_FROM = 20.0  # largest loss over smallest: a linear axis would flatten the end of training
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, small and searchable
    "text.parse_math": False,  # names of arms are not formulas
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Curve:
    """One trial's loss by step."""

    label: str
    group: str  # trials of one group share a colour
    baseline: bool
    steps: Sequence[float]
    values: Sequence[float]


def arms_plot(arms: Sequence[Arm], metric: str, bare: bool = False) -> str:
    """One line for each arm: seeds as dots, the mean as a bar, its interval as whiskers.

    bare: without whiskers. Empty without numbers.
    """
    shown = [arm for arm in arms if metric in arm.metrics]
    if not shown:
        return ""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(shown)))
        axes = figure.subplots()
        for row, arm in enumerate(reversed(shown)):  # matplotlib counts rows from below
            summary, colour = arm.metrics[metric], _BASELINE if arm.baseline else _COLOURS[0]
            if not bare and not math.isnan(summary.low):
                axes.plot(
                    [100 * summary.low, 100 * summary.high],
                    [row, row],
                    color=colour,
                    lw=1.5,
                    alpha=0.6,
                )
            axes.plot([100 * summary.mean] * 2, [row - 0.28, row + 0.28], color=colour, lw=3)
            seeds = [100 * value for value in summary.by_seed.values()]
            axes.plot(seeds, [row] * len(seeds), "o", color=colour, ms=5, alpha=0.8)
        axes.set_yticks(range(len(shown)), [arm_label(arm) for arm in reversed(shown)])
        # The same height for each arm, however many there are.
        axes.set_ylim(-0.6, len(shown) - 0.4)
        low, high = axes.get_xlim()
        if high - low < _MIN_SPAN_POINTS:  # noise must not look like a gap
            axes.set_xlim((low + high - _MIN_SPAN_POINTS) / 2, (low + high + _MIN_SPAN_POINTS) / 2)
        axes.set_xlabel(f"{metric_label(metric)}, points")
        axes.grid(axis="x", alpha=0.25)
        return _svg(figure, f"arms {metric}", f"{metric_label(metric)} of every arm")


def loss_plot(curves: Sequence[Curve]) -> str:
    """Total training loss by step, one colour an arm. Empty without curves."""
    if not curves:
        return ""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4))
        axes = figure.subplots()
        groups = list(dict.fromkeys(curve.group for curve in curves))
        others = [
            group for group in groups if not any(c.baseline for c in curves if c.group == group)
        ]
        for curve in curves:
            colour = (
                _BASELINE if curve.baseline else _COLOURS[others.index(curve.group) % len(_COLOURS)]
            )
            steps, values = smooth(curve.steps, curve.values)
            label = (
                curve.group if curve is next(c for c in curves if c.group == curve.group) else None
            )
            axes.plot(steps, values, color=colour, lw=1.3, alpha=0.9, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        _log_if_wide(axes, curves)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure, "loss", "Training loss by step")


def smooth(
    steps: Sequence[float], values: Sequence[float], points: int = 150
) -> tuple[list[float], list[float]]:
    """Steps and values as means of equally long stretches, at most `points` of them.

    Values that are not finite are left out.
    """
    pairs = [
        (s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)
    ]
    size = max(1, math.ceil(len(pairs) / points))
    blocks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [math.fsum(s for s, _ in b) / len(b) for b in blocks], [
        math.fsum(v for _, v in b) / len(b) for b in blocks
    ]


def _log_if_wide(axes: Axes, curves: Sequence[Curve]) -> None:
    values = [v for curve in curves for v in smooth(curve.steps, curve.values)[1]]
    # A logarithm needs positive values; a loss with a negative term has none to show.
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")


def _svg(figure: Figure, salt: str, title: str) -> str:
    """The figure as an SVG element. `salt` keeps ids of several figures on one page apart."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            metadata={"Date": None, "Title": title},
        )
    text = buffer.getvalue()
    # From the element on: a page holds no XML declaration.
    return (
        text[text.index("<svg") :]
        .replace(_INK, "currentColor")
        .replace("<svg ", '<svg role="img" ', 1)
    )

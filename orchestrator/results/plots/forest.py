"""The plots of numbers: differences with their intervals, and the values of every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.results.cells import arm_label, metric_label
from orchestrator.results.comparison import Arm
from orchestrator.results.details.headlines import Headline
from orchestrator.results.plots.style import INK, STYLE, WIDTH_IN, wrapped
from orchestrator.study.contrasts import arm_name

_MIN_SPAN_POINTS = 1.0  # of the axis of AP: a hundredth of a point must not fill the figure


def forest(headlines: Sequence[Headline], colours: Mapping[str, str]) -> Figure | None:
    """A line for each contrast: its difference, its interval, and the paper's difference.

    None without contrasts. An open circle has no verdict.
    """
    if not headlines:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 0.5 * len(headlines)))
        axes = figure.subplots()
        axes.axvline(0, color=INK, lw=1, alpha=0.7)
        for row, line in enumerate(reversed(headlines)):  # matplotlib counts rows from below
            _contrast(axes, row, line, _colour(line, colours))
        if any(line.beside is not None for line in headlines):
            axes.plot([], [], "D", color=INK, mfc="none", ms=6, label="the paper's difference")
            axes.legend(
                frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.3), borderpad=0
            )
        names = [wrapped(f"{line.subject}, {line.metric}") for line in reversed(headlines)]
        axes.set_yticks(range(len(headlines)), names)
        axes.set_ylim(-0.6, len(headlines) - 0.4)
        _widen(axes)
        axes.set_xlabel("difference, points")
        axes.grid(axis="x", alpha=0.25)
        return figure


def _contrast(axes: Axes, row: int, line: Headline, colour: str) -> None:
    estimate, margin = line.answer.estimate, line.answer.asked.margin
    if margin:
        axes.plot([-margin, margin], [row, row], color=INK, lw=9, alpha=0.12, solid_capstyle="butt")
    sound = bool(line.answer.verdict)
    if sound and not math.isnan(estimate.low):
        ends = [100 * estimate.low, 100 * estimate.high]
        axes.plot(ends, [row, row], color=colour, lw=2.2)
        axes.plot(ends, [row, row], "|", color=colour, ms=9, mew=2.2)
    if not math.isnan(estimate.difference):
        face = colour if sound else "none"
        axes.plot([100 * estimate.difference], [row], "o", color=colour, mfc=face, ms=7)
    if line.beside is not None:
        axes.plot([100 * line.beside.published], [row], "D", color=INK, mfc="none", ms=6)


def _colour(line: Headline, colours: Mapping[str, str]) -> str:
    """The arm's own; a contrast of several arms has the colour of the text."""
    gains = [arm for arm, weight in line.answer.asked.weights.items() if weight > 0]
    return colours.get(gains[0], INK) if len(gains) == 1 else INK


def arms_plot(
    arms: Sequence[Arm], metric: str, colours: Mapping[str, str], bare: bool = False
) -> Figure | None:
    """One line for each arm: seeds as dots, the mean as a bar, its interval as whiskers.

    bare: without whiskers. None without numbers.
    """
    shown = [arm for arm in arms if metric in arm.metrics]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 0.42 * len(shown)))
        axes = figure.subplots()
        for row, arm in enumerate(reversed(shown)):
            summary, colour = arm.metrics[metric], colours[arm_name(arm.arm)]
            if not bare and not math.isnan(summary.low):
                ends = [100 * summary.low, 100 * summary.high]
                axes.plot(ends, [row, row], color=colour, lw=1.5, alpha=0.6)
            axes.plot([100 * summary.mean] * 2, [row - 0.28, row + 0.28], color=colour, lw=3)
            seeds = [100 * value for value in summary.by_seed.values()]
            axes.plot(seeds, [row] * len(seeds), "o", color=colour, ms=5, alpha=0.8)
        axes.set_yticks(range(len(shown)), [wrapped(arm_label(arm)) for arm in reversed(shown)])
        # The same height for each arm, however many there are.
        axes.set_ylim(-0.6, len(shown) - 0.4)
        _widen(axes)
        axes.set_xlabel(f"{metric_label(metric)}, points")
        axes.grid(axis="x", alpha=0.25)
        return figure


def _widen(axes: Axes) -> None:
    """Noise must not look like a gap."""
    low, high = axes.get_xlim()
    if high - low < _MIN_SPAN_POINTS:
        middle = (low + high) / 2
        axes.set_xlim(middle - _MIN_SPAN_POINTS / 2, middle + _MIN_SPAN_POINTS / 2)

"""Curves over the steps: one an arm, with a band from its lowest to its highest seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.results.plots.style import STYLE, WIDTH_IN

_LOG_FROM = 20.0  # largest over smallest loss: a linear axis would flatten the end of training
_POINTS = 150  # of a curve of a thousand steps, each the mean of a stretch
_ALPHA = 0.2  # of a band


@dataclass(frozen=True)
class Curve:
    """One trial's values by step. `arm` is the name by which it has its colour."""

    arm: str
    label: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest of an arm's seeds at each step that they all have."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curves_plot(
    curves: Sequence[Curve], colours: Mapping[str, str], label: str, scale: float = 1.0
) -> Figure | None:
    """None without curves. scale: 100 for fractions that are shown as points."""
    if not curves:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.0))
        axes = figure.subplots()
        smallest, largest = math.inf, 0.0
        for arm in dict.fromkeys(curve.arm for curve in curves):
            own = [curve for curve in curves if curve.arm == arm]
            band, colour = band_of(own, scale), colours[arm]
            if len(own) > 1:
                axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=_ALPHA, lw=0)
            mark = "o" if len(band.steps) <= 12 else ""  # single evaluations are points to see
            axes.plot(
                band.steps, band.mean, color=colour, lw=1.6, marker=mark, ms=4, label=own[0].label
            )
            smallest, largest = min([smallest, *band.low]), max([largest, *band.high])
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _ticks(axes, smallest, largest, scale)
        axes.grid(alpha=0.25)
        # Below the axis: beside the curves it would hide some of them.
        axes.legend(
            frameon=False,
            fontsize=9,
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            ncols=2 if max(len(curve.label) for curve in curves) < 28 else 1,
        )
        return figure


def band_of(curves: Sequence[Curve], scale: float = 1.0) -> Band:
    """The seeds of one arm. They are thinned alike, so that they meet at the same steps."""
    thinned = [dict(zip(*smooth(curve.steps, curve.values), strict=True)) for curve in curves]
    shared = sorted(set(thinned[0]).intersection(*thinned[1:]))
    columns = [[scale * values[step] for values in thinned] for step in shared]
    return Band(
        shared,
        [math.fsum(column) / len(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def smooth(
    steps: Sequence[float], values: Sequence[float], points: int = _POINTS
) -> tuple[list[float], list[float]]:
    """Steps and values as means of equally long stretches, at most `points` of them.

    A value that is not finite counts in no mean; a stretch without any is left out.
    """
    pairs = list(zip(steps, values, strict=True))
    size = max(1, math.ceil(len(pairs) / points))
    blocks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    thinned = []
    for block in blocks:
        sound = [v for _, v in block if v is not None and math.isfinite(v)]
        if sound:
            middle = math.fsum(s for s, _ in block) / len(block)
            thinned.append((middle, math.fsum(sound) / len(sound)))
    return [s for s, _ in thinned], [v for _, v in thinned]


def _ticks(axes: Axes, smallest: float, largest: float, scale: float) -> None:
    """Few numbers on each axis, so that no two of them touch."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    # A logarithm needs positive values; points of AP are linear.
    if scale == 1.0 and smallest > 0 and largest > _LOG_FROM * smallest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _thousands(value: float, _: int | None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"

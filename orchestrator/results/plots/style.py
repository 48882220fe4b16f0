"""How every plot of a report looks: one colour an arm, text in the page's colour, SVG or PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from orchestrator.results.comparison import Arm
from orchestrator.study.colours import colours_of
from orchestrator.study.contrasts import arm_name

INK = "#010203"  # replaced by the page's text colour
_LABEL_COLUMNS = 26  # of a name beside an axis; a longer one takes several lines
WIDTH_IN = 5.2  # a phone shows this at two thirds, where its text is still 10 px high
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, small and searchable
    "text.parse_math": False,  # names of arms are not formulas
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def colours(arms: Sequence[Arm]) -> dict[str, str]:
    """Arm's name -> colour: the same one in every plot and in MLflow."""
    return colours_of([(arm_name(arm.arm), arm.baseline) for arm in arms])


def wrapped(label: str) -> str:
    """A long name in several lines: beside an axis it would leave no room for the plot."""
    return "\n".join(textwrap.wrap(label, _LABEL_COLUMNS)) or label


def svg(figure: Figure, salt: str, title: str) -> str:
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
        .replace(INK, "currentColor")
        .replace("<svg ", '<svg role="img" ', 1)
    )


def png(figure: Figure) -> bytes:
    """The figure on white: a PNG goes into slides and papers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()

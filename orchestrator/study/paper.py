"""The paper's tables as published, under our names of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

from contract.record import Message
from contract.study import Study
from orchestrator.study.contrasts import arm_name, parse_arm

# The paper publishes a row of this name as a gain over the baseline arm, without the AP of either.
_DIFFERENCE = "difference"
BASELINE_ROW = "baseline"  # the arm that such a gain is over; the paper publishes no row of it


class PaperRow(Message):
    """One published row: metric name -> AP as a fraction.

    A gain over the baseline arm stands in `gains`; then `metrics` is empty.
    """

    name: str
    metrics: dict[str, float] = {}
    gains: dict[str, float] = {}


class PaperTable(Message):
    """One table of the paper. The file also says its backbone, for a reader."""

    question: str
    split: str  # the images that its AP is on
    rows: dict[str, dict[str, float]]  # row -> metric -> AP in percent, as the paper prints it

    def row(self, name: str) -> PaperRow:
        """The row of this name, which the table has."""
        values = {metric: percent / 100 for metric, percent in self.rows[name].items()}
        if name == _DIFFERENCE:
            return PaperRow(name=name, gains=values)
        return PaperRow(name=name, metrics=values)


class _Paper(Message):
    """The file. Its recipe and its sources are for people."""

    tables: dict[str, PaperTable]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """The paper's tables by their number."""
    file = resources.files("orchestrator.study").joinpath("paper_tables.json")
    return _Paper.model_validate_json(file.read_text(encoding="utf-8")).tables


def rows_of(study: Study, arms: Sequence[Mapping[str, str]]) -> dict[str, PaperRow]:
    """Arm's name -> its published row. An entry that leaves factors out holds for all levels."""
    rows: dict[str, PaperRow] = {}
    for text, name in study.paper_rows.items():
        wanted = parse_arm(text, study.factors, "paper_rows").items()
        row = paper_tables()[study.paper_table].row(name)
        rows |= {arm_name(arm): row for arm in arms if wanted <= arm.items()}
    return rows


def published_difference(
    weights: Mapping[str, float], metric: str, rows: Mapping[str, PaperRow]
) -> float:
    """The published value of a contrast, as a fraction; NaN where the paper has none.

    weights: arm's name -> weight. A row that is a gain over the baseline arm stands for the
    difference between the two.
    """
    used = {arm: weight for arm, weight in weights.items() if weight}
    values = [
        weight * rows[arm].metrics[metric]
        for arm, weight in used.items()
        if arm in rows and metric in rows[arm].metrics
    ]
    if used and len(values) == len(used):
        return math.fsum(values)
    gains = [
        weight * rows[arm].gains[metric]
        for arm, weight in used.items()
        if arm in rows and metric in rows[arm].gains
    ]
    return gains[0] if len(gains) == 1 and len(used) == 2 else math.nan

"""The paper's tables as published, under our names of metrics."""

from __future__ import annotations

from functools import cache
from importlib import resources

from contract.record import Message

# The paper publishes a row of this name as a gain over the baseline arm, without the AP of either.
_DIFFERENCE = "difference"


class PaperRow(Message):
    """One published row: metric name -> AP as a fraction.

    A gain over the baseline arm stands in `gains`; then `metrics` is empty.
    """

    name: str
    metrics: dict[str, float] = {}
    gains: dict[str, float] = {}


class PaperTable(Message):
    """One table of the paper. The file also says its backbone and its split, for a reader."""

    question: str
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

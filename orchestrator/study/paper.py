"""The paper's tables as published, under our names of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict

# The paper writes sizes in capitals; pycocotools' names, which are ours, have small letters.
_STATS = {"APS": "APs", "APM": "APm", "APL": "APl"}
# The paper publishes a row of this name as a gain over the baseline arm, without the AP of either.
_DIFFERENCE = "difference"


@dataclass(frozen=True)
class PaperRow:
    """One published row: metric name -> AP as a fraction.

    A gain over the baseline arm stands in `gains`; then `metrics` is empty.
    """

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper: row name -> row."""

    question: str
    rows: Mapping[str, PaperRow]


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """The paper's tables by their number."""
    source = resources.files("orchestrator.study").joinpath("paper_tables.json")
    published = _Published.model_validate_json(source.read_text(encoding="utf-8"))
    return {number: table.parsed() for number, table in published.tables.items()}


# --- the file ---------------------------------------------------------------------------------

_Values = tuple[float | None, ...]  # AP in percent; null where the paper leaves the cell empty


class _PublishedTable(BaseModel):
    """A table of the file. Its columns are "AP" of one `metric`, or name theirs: "segm AP"."""

    # The file also keeps what only a reader of it needs: the backbone and the split.
    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str
    metric: str = ""
    columns: tuple[str, ...]
    rows: dict[str, _Values | dict[str, _Values]]  # a mapping has one list for each metric

    def parsed(self) -> PaperTable:
        return PaperTable(self.question, {name: self._row(name) for name in self.rows})

    def _row(self, name: str) -> PaperRow:
        published = self.rows[name]
        by_metric = published if isinstance(published, dict) else {self.metric: published}
        values: dict[str, float] = {}
        for metric, cells in by_metric.items():
            for column, cell in zip(self.columns, cells, strict=True):
                group, _, stat = f"{metric} {column}".strip().partition(" ")
                if cell is not None:
                    values[f"{group}/{_STATS.get(stat, stat)}"] = cell / 100
        return PaperRow(name, gains=values) if name == _DIFFERENCE else PaperRow(name, values)


class _Published(BaseModel):
    """The file; its `recipe` and `source` are for people."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    tables: dict[str, _PublishedTable]

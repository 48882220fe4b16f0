"""Every metric of every step as Parquet: parts between two checkpoints, joined at the end."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from contract.files import Files

_FOLDER = "series"
_NAME = re.compile(r"^(\d{8,})-(\d{8,})\.parquet$")


class Row(NamedTuple):
    """One finished step: `values` by metric name, times in seconds of this rank.

    A pair, so that a checkpoint's JSON holds it as [step, values].
    """

    step: int
    values: dict[str, float]


class SeriesParts:
    """The rows since the last part, in memory, and the parts before them, in the trial's folder."""

    def __init__(self, storage: Files) -> None:
        self._storage = storage
        self._rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self._rows += rows

    def take(self) -> list[Row]:
        """The rows collected so far, which the caller then writes as a part."""
        rows, self._rows = self._rows, []
        return rows

    def write_part(self, rows: Sequence[Row]) -> None:
        """Writes consecutive steps as a part. Any thread may call it."""
        if rows:
            # padded, so that names sort by step
            name = f"{_FOLDER}/{rows[0].step:08d}-{rows[-1].step:08d}.parquet"
            self._storage.write(name, _parquet(_table(rows)))

    def rewind(self, step: int) -> None:
        """Forgets the steps after `step`, which must be the end of a part, or 0."""
        self._rows = [row for row in self._rows if row.step <= step]
        for name in self._storage.names(_FOLDER):
            # beyond a checkpoint no part is of use: its steps come again
            if (match := _NAME.match(name)) and int(match[2]) > step:
                self._storage.delete(f"{_FOLDER}/{name}")

    def join(self, path: str) -> None:
        """Writes all parts as the one file `path`."""
        names = [name for name in self._storage.names(_FOLDER) if _NAME.match(name)]
        tables = [
            pq.read_table(io.BytesIO(self._storage.read(f"{_FOLDER}/{name}"))) for name in names
        ]
        if tables:
            # a metric that began later, e.g. after a resume, is null in the parts before it
            self._storage.write(path, _parquet(pa.concat_tables(tables, promote_options="default")))


def _table(rows: Sequence[Row]) -> pa.Table:
    names = sorted({name for row in rows for name in row.values})
    columns = {"step": pa.array([row.step for row in rows], pa.int64())}
    return pa.table(
        columns | {n: pa.array([row.values.get(n) for row in rows], pa.float64()) for n in names}
    )


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()

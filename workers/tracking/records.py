"""The records of a spool: one union of frozen records, parsed and written in this file alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter

from contract.record import Message

MetricPoint: TypeAlias = tuple[str, int]  # a metric's name and the step of its value


class _Line(Message):
    """One line of a spool. A metric of a run that diverges may be nan, which a Record refuses."""

    def to_json(self) -> str:
        # `json.dumps` writes nan and the spaces as every version of the spool has them
        return json.dumps(self.model_dump())


class Metrics(_Line):
    """Values of several metrics at one step. at: Unix time in milliseconds."""

    kind: Literal["metrics"] = "metrics"
    at: int
    step: int
    values: dict[str, float]


class Params(_Line):
    """The configuration by dotted names."""

    kind: Literal["params"] = "params"
    values: dict[str, str]


class Tags(_Line):
    """Tags of the trial's run; a later value replaces an earlier one."""

    kind: Literal["tags"] = "tags"
    values: dict[str, str]


class Artifact(_Line):
    """A file of the trial's folder. folder: where the tracker shows it, empty for the top."""

    kind: Literal["artifact"] = "artifact"
    path: str
    folder: str


class Status(_Line):
    """The state of the trial's run in the tracker's words. at: Unix time in milliseconds."""

    kind: Literal["status"] = "status"
    at: int
    status: Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]


class Rewind(_Line):
    """Training went back to `step`: the points after it come again, with other values."""

    kind: Literal["rewind"] = "rewind"
    step: int


class Unknown(_Line):
    """A record of a newer version. The spool keeps it for that version; no tracker is told it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str


_Known: TypeAlias = Annotated[
    Metrics | Params | Tags | Artifact | Status | Rewind, Field(discriminator="kind")
]
TrackingRecord: TypeAlias = Annotated[_Known | Unknown, Field(union_mode="left_to_right")]
_PARSER: TypeAdapter[TrackingRecord] = TypeAdapter(TrackingRecord)


def parse_line(line: bytes) -> TrackingRecord | None:
    """The record that a line of a spool holds; None for a line without a `kind`."""
    try:
        return _PARSER.validate_json(line)
    except ValueError:  # not JSON, not text, or no record
        return None


class RejectedError(Exception):
    """The tracker will never accept these records."""


class PostponedError(Exception):
    """The tracker has all records but these artifacts, whose store may take them another time."""

    def __init__(self, reasons: Sequence[tuple[Artifact, str]]) -> None:
        super().__init__("; ".join(f"{record.path}: {reason}" for record, reason in reasons))
        self.reasons = reasons


def halves(records: Sequence[TrackingRecord]) -> tuple[Sequence[TrackingRecord], ...]:
    """Two smaller parts of `records`, in order; a single record splits into its values.

    Empty if that cannot be split.
    """
    if len(records) > 1:
        middle = len(records) // 2
        return records[:middle], records[middle:]
    match records[0]:
        case (Metrics() | Params() | Tags()) as record if len(record.values) > 1:
            items = list(record.values.items())
            middle = len(items) // 2
            return tuple(
                [record.model_copy(update={"values": dict(part)})]
                for part in (items[:middle], items[middle:])
            )
    return ()


class Held:
    """What a spool or a tracker already holds. Nothing else decides whether a record is new."""

    def __init__(
        self, records: Iterable[TrackingRecord] = (), points: Iterable[MetricPoint] = ()
    ) -> None:
        self._points = set(points)
        self._lines: set[str] = set()
        for record in records:
            match record:
                case Metrics():
                    self._points.update((name, record.step) for name in record.values)
                case Rewind():
                    self.rewind(record.step)
                    self._lines.add(record.to_json())
                case _:
                    self._lines.add(record.to_json())

    def rewind(self, step: int) -> None:
        """Forgets the points after `step`: the new ones there replace them."""
        self._points = {point for point in self._points if point[1] <= step}

    def new_part(self, record: TrackingRecord) -> TrackingRecord | None:
        """`record` without the points that are held; None if nothing of it is new."""
        if not isinstance(record, Metrics):
            return None if record.to_json() in self._lines else record
        values = {
            name: value
            for name, value in record.values.items()
            if (name, record.step) not in self._points
        }
        return record.model_copy(update={"values": values}) if values else None

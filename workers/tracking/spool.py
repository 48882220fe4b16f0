"""The file in which a run keeps what its tracker has to learn, so that no dead server loses it.

A spool is a folder with `records.jsonl` (one record a line, with its original time), `cursor.json`
(how many bytes of it have been shipped), `later-*.json` (an artifact each, which its store did not
take while the cursor passed it), `rejected.jsonl` (damaged lines, and what the tracker refused for
good) and `target.json` (whom the records are for).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from contract.attempt import SPOOL_LATER, MLflowTracking, NoTracking, RunSpec, Tracking
from contract.files import Files, explained
from contract.machine.folders import own_folder
from contract.record import Message, Record
from workers.tracking.records import Artifact, TrackingRecord, parse_line

SPOOL_FOLDER = "spool"
DESTINATION_FILE = "target.json"
LATER = SPOOL_LATER.removeprefix(f"{SPOOL_FOLDER}/")


def print_warning(text: str) -> None:
    print(f"warning: {text}", flush=True)


class Postponed(Message):
    """An artifact that its store did not take, and why."""

    record: Artifact
    reason: str = ""


class TakenError(RuntimeError):
    """Another process has taken the spool over; nobody needs the records of this one any more."""


class Spool:
    """An append-only file of records. Safe between one appending and one shipping thread.

    Opening it sets aside the lines that a crash of the machine left damaged, with one warning.

    take: to write the spool. A copy then replaces the file, so that a process of an older attempt
    that still lives appends to a file that nobody sees. Without it the file is read and shipped
    beside the process that writes it.
    """

    def __init__(
        self, folder: Path, take: bool = True, warn: Callable[[str], None] = print_warning
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path, self._cursor_path = folder / "records.jsonl", folder / "cursor.json"
        self._rejected_path = folder / "rejected.jsonl"
        self._refused: set[str] = set()  # while this object has been open
        self._path.touch()
        with self._path.open("rb") as file:
            # a line without its end is still being written, or a crash tore it: no damage in it
            damaged = [
                repr(line) for line in file if line.endswith(b"\n") and parse_line(line) is None
            ]
        if damaged:
            self._set_aside((json.dumps(line) for line in damaged), "damaged")
            warn(
                f"{self._path}: {len(damaged)} damaged line(s) of a crash, "
                f"kept in {self._rejected_path}"
            )
        if take:
            self._take(bool(damaged))
        self._file = self._path.open("ab")
        self._lock = threading.Lock()

    def _take(self, damaged: bool) -> None:
        data = self._path.read_bytes()
        data = data[: data.rfind(b"\n") + 1]  # without the line that a crash tore
        files = Files(str(self.folder))
        if damaged:
            data = b"".join(line for line in io.BytesIO(data) if parse_line(line) is not None)
            # first the cursor: it counts bytes of the old file, and a crash between the two writes
            # must not leave it pointing into the middle of a line of the new one
            files.write_json(self._cursor_path.name, {"bytes": 0})
        files.write(self._path.name, data)
        if self.cursor > len(data):  # a machine that crashed lost the end of the file
            files.write_json(self._cursor_path.name, {"bytes": 0})

    def _check_mine(self) -> None:
        """Raises TakenError."""
        # whoever takes the spool replaces the file, so that the path leads to another inode
        if not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            raise TakenError(f"a newer attempt has taken {self.folder} over")

    def append(self, *records: TrackingRecord) -> None:
        """Raises RuntimeError if the disk is full."""
        lines = "".join(f"{record.to_json()}\n" for record in records).encode()
        with self._lock, explained(str(self.folder), self._path.name):
            self._file.write(lines)
            self._file.flush()  # to the system: outlives this process, not the machine

    @property
    def cursor(self) -> int:
        """How many bytes of the file have been shipped; 0 if the note is missing or damaged.

        0 ships everything again, and a record that arrives twice changes nothing.
        """
        try:
            return int(json.loads(self._cursor_path.read_text("utf-8"))["bytes"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0

    def advance(self, to: int) -> None:
        """Notes that the first `to` bytes have been shipped. Raises TakenError."""
        self._check_mine()
        aside = self._cursor_path.with_suffix(f".{os.getpid()}.part")
        # replaced, but not synced: a lost note only ships some records again
        aside.write_text(json.dumps({"bytes": to}))
        aside.replace(self._cursor_path)

    def unsent(self, limit: int = 2000) -> list[tuple[int, TrackingRecord]]:
        """Up to `limit` records after the cursor, each with the cursor's value once it is shipped.

        Raises TakenError.
        """
        self._check_mine()
        position = self.cursor
        waiting: list[tuple[int, TrackingRecord]] = []
        with self._path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n") or len(waiting) == limit:
                    break
                position += len(line)
                if (record := parse_line(line)) is not None:
                    waiting.append((position, record))
        return waiting

    def records(self) -> list[TrackingRecord]:
        """All of them, shipped or not."""
        with self._path.open("rb") as file:
            parsed = [parse_line(line) for line in file if line.endswith(b"\n")]
        return [record for record in parsed if record is not None]

    # --- what the tracker does not take ---

    def reject(self, record: TrackingRecord, reason: str) -> bool:
        """Keeps a record that the tracker refuses for good, with the reason.

        Returns False if it is kept already: a shipment that fails later is repeated.
        """
        line = record.to_json()
        if line in self._refused:
            return False
        self._refused.add(line)
        self._set_aside([line], reason)
        return True

    def postpone(self, record: Artifact, reason: str) -> None:
        """Keeps an artifact that its store may take another time, beside the cursor's order."""
        value = Postponed(record=record, reason=reason)
        Files(str(self.folder)).write(self._later(record).name, value.model_dump_json().encode())

    def postponed(self) -> list[Postponed]:
        paths = sorted(self.folder.glob(f"{LATER}*.json"))
        return [Postponed.model_validate_json(path.read_bytes()) for path in paths]

    def settle(self, record: Artifact) -> None:
        """Forgets that the artifact was postponed."""
        self._later(record).unlink(missing_ok=True)

    def _later(self, record: Artifact) -> Path:
        # a file each: the run and a `maskray sync` beside it never overwrite each other's list
        digest = hashlib.sha256(record.to_json().encode()).hexdigest()[:16]
        return self.folder / f"{LATER}{digest}.json"

    @property
    def num_refused(self) -> int:
        """How many records the tracker has refused for good while this object has been open."""
        return len(self._refused)

    def lacks(self) -> str:
        """What the tracker has not got yet, in words; empty if there is nothing.

        Raises TakenError.
        """
        unsent, later = len(self.unsent(100_000)), self.postponed()
        parts = [f"{unsent} records"] if unsent else []
        if later:
            names = ", ".join(one.record.path for one in later[:3])
            more = ", ..." if len(later) > 3 else ""
            parts.append(f"{len(later)} artifacts ({names}{more}: {later[0].reason})")
        return ", ".join(parts)

    def _set_aside(self, values: Iterable[str], reason: str) -> None:
        """values: as JSON."""
        with self._rejected_path.open("a") as file:
            file.writelines(
                f'{{"reason": {json.dumps(reason)}, "record": {value}}}\n' for value in values
            )

    def close(self) -> None:
        self._file.close()


# --- whom the records are for ---


class Destination(Record):
    """Whom a spool's records are for. The spool keeps it, so that another process can ship it."""

    tracking: Tracking
    trial: str
    name: str
    storage: str


def open_spool(spec: RunSpec, storage: Files) -> tuple[Spool, Destination]:
    """The trial's spool, taken over from whoever wrote it before, and whom its records are for.

    An attempt without a tracker leaves the records to the tracker of the attempts before.
    """
    spool = Spool(_spool_folder(spec, storage))
    files = Files(str(spool.folder))
    tracking = (
        spec.tracking if isinstance(spec.tracking, MLflowTracking) else _tracking_before(files)
    )
    destination = Destination(
        tracking=tracking, trial=spec.trial, name=spec.name, storage=spec.storage
    )
    files.write(DESTINATION_FILE, destination.model_dump_json(indent=1).encode())
    return spool, destination


def _spool_folder(spec: RunSpec, storage: Files) -> Path:
    """In the trial's own folder, or in this node's cache where that folder is remote."""
    if storage.local is not None:
        return storage.local / SPOOL_FOLDER
    folder = Path(spec.cache) / "maskray-spool" if spec.cache else own_folder("spool")
    return folder / spec.trial


def _tracking_before(files: Files) -> Tracking:
    try:
        return Destination.model_validate_json(files.read(DESTINATION_FILE)).tracking
    except (FileNotFoundError, ValueError):
        return NoTracking()

"""What a run has to tell its tracker: appended to a file first, shipped later by a thread, in order and idempotently.

A spool is a folder with `records.jsonl` (one record a line, with its original time), `cursor.json` (how many bytes of
it have been shipped) and `rejected.jsonl` (damaged lines, and what the tracker refused for good). Sending a record
twice adds nothing.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from contract.files import Files, explained

# {"kind": "metrics", "at": ms, "step": n, "values": {...}} | {"kind": "params", "values"} | {"kind": "tags", "values"}
# | {"kind": "artifact", "path", "folder"} | {"kind": "status", "at", "status"} | {"kind": "rewind", "step"}
Record: TypeAlias = dict[str, Any]
_LAST_TRIES = 3  # of a shipper that is closed


def print_warning(text: str) -> None:
    print(f"warning: {text}", flush=True)


class RejectedError(Exception):
    """The tracker will never accept these records."""


class TakenError(RuntimeError):
    """Another process has taken the spool over; what this one still has to tell is of no interest."""


class Target(Protocol):
    """Where records go. Only the shipper's thread calls it."""

    def send(self, records: Sequence[Record]) -> None:
        """Sends all of `records`, or raises: RejectedError if trying again is useless, anything else if it is not."""
        ...


class Spool:
    """An append-only file of records. Safe between one appending and one shipping thread.

    Lines that a crash of the machine left damaged are set aside when it is opened, and nobody is told them.

    take: to write it. The file is replaced by its copy, so that a process of an older attempt that still lives appends
    to a file that nobody sees. Otherwise it is read and shipped beside the process that writes it.
    """

    def __init__(
        self, folder: Path, take: bool = True, warn: Callable[[str], None] = print_warning
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path, self._cursor_path = folder / "records.jsonl", folder / "cursor.json"
        self._rejected_path = folder / "rejected.jsonl"
        self._path.touch()
        with self._path.open("rb") as file:
            damaged = [
                repr(line) for line in file if line.endswith(b"\n") and _parsed(line) is None
            ]
        if damaged:
            self.reject(damaged, "damaged")
            warn(
                f"{self._path}: {len(damaged)} damaged line(s) of a crash, kept in {self._rejected_path}"
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
            data = b"".join(line for line in io.BytesIO(data) if _parsed(line) is not None)
            files.write_json(
                self._cursor_path.name, {"bytes": 0}
            )  # first: it counts bytes of the old file
        files.write(self._path.name, data)
        if self.cursor > len(data):  # a machine that crashed lost the end of the file
            files.write_json(self._cursor_path.name, {"bytes": 0})

    def _check_mine(self) -> None:
        """Raises TakenError."""
        if not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            raise TakenError(f"a newer attempt has taken {self.folder} over")

    def append(self, record: Record) -> None:
        """Raises RuntimeError if the disk is full."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock, explained(str(self.folder), self._path.name):
            self._file.write(line)
            self._file.flush()  # to the system: outlives this process, not the machine

    @property
    def cursor(self) -> int:
        """0, which ships everything again and so changes nothing, if the file is not there or damaged."""
        try:
            return int(json.loads(self._cursor_path.read_text())["bytes"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0

    def advance(self, to: int) -> None:
        self._check_mine()
        aside = self._cursor_path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps({"bytes": to}))
        aside.replace(self._cursor_path)

    def unsent(self, limit: int = 2000) -> list[tuple[int, Record]]:
        """Up to `limit` records after the cursor, each with the cursor's value once it has been shipped.

        Raises TakenError.
        """
        self._check_mine()
        position = self.cursor
        found: list[tuple[int, Record]] = []
        with self._path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n") or len(found) == limit:
                    break
                position += len(line)
                if (record := _parsed(line)) is not None:
                    found.append((position, record))
        return found

    def records(self) -> list[Record]:
        with self._path.open("rb") as file:
            parsed = [_parsed(line) for line in file if line.endswith(b"\n")]
        return [record for record in parsed if record is not None]

    def reject(self, records: Iterable[Record | str], reason: str) -> None:
        """records: as they were told, or the text of a line that is none."""
        with self._rejected_path.open("a") as file:
            file.writelines(
                json.dumps({"reason": reason, "record": record}) + "\n" for record in records
            )

    def close(self) -> None:
        self._file.close()


def _parsed(line: bytes) -> Record | None:
    """None if the line is no record."""
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or no text at all
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def metric_points(records: Iterable[Record]) -> set[tuple[str, int]]:
    """(metric, step) of every point in `records`, less those that a later rewind took back."""
    points: set[tuple[str, int]] = set()
    for record in records:
        match record["kind"]:
            case "metrics":
                points.update((name, record["step"]) for name in record["values"])
            case "rewind":
                points = {point for point in points if point[1] <= record["step"]}
    return points


def ship_once(spool: Spool, target: Target, warn: Callable[[str], None]) -> bool:
    """Sends one batch of unsent records. Returns whether there was anything; raises what the target raised."""
    batch = spool.unsent()
    if not batch:
        return False
    records = [record for _, record in batch]
    try:
        target.send(records)
    except RejectedError:
        for record in records:  # one by one, so that one bad record does not take others with it
            try:
                target.send([record])
            except RejectedError as error:
                spool.reject([record], str(error))
                warn(
                    f"tracking refused a record of kind {record['kind']}: {error}; kept in {spool.folder}"
                )
    spool.advance(batch[-1][0])
    return True


class Shipper:
    """A thread that ships a spool until it is closed; failures wait and try again, and reach nobody but the log."""

    def __init__(
        self, spool: Spool, target: Target, warn: Callable[[str], None], idle_s: float = 2.0
    ) -> None:
        self._spool, self._target, self._warn, self._idle_s = spool, target, warn, idle_s
        self._closing = threading.Event()
        self._nudged = threading.Event()  # to look at once, not after the wait
        self._failures = 0
        self._taken = False
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> None:
        """Waits until what is in the spool has arrived; not for a target that fails, nor beyond `timeout_s`.

        Raises TakenError.
        """
        self._nudged.set()
        end = time.monotonic() + timeout_s
        while (
            self._thread.is_alive()
            and not self._failures
            and time.monotonic() < end
            and self._spool.unsent(1)
        ):
            time.sleep(0.02)

    def close(self, timeout_s: float) -> bool:
        """Ships what is left for up to `timeout_s`. Returns whether all of it arrived."""
        self._closing.set()
        self._nudged.set()
        self._thread.join(timeout_s)
        return self._taken or (not self._thread.is_alive() and not self._spool.unsent(1))

    def _run(self) -> None:
        last_tries = _LAST_TRIES
        while True:
            closing = self._closing.is_set()
            try:
                shipped = ship_once(self._spool, self._target, self._warn)
            except TakenError as error:
                self._taken = True
                self._warn(str(error))
                return
            except Exception as error:  # noqa: BLE001 - any failure of the network or the server: keep, try again
                self._failures += 1
                if self._failures == 1:
                    self._warn(
                        f"tracking is unreachable, records wait in {self._spool.folder}: {error}"
                    )
                if closing:
                    last_tries -= 1
                    if not last_tries:
                        return
                    time.sleep(1.0)  # a server that was restarted refuses the old connections first
                else:
                    self._wait(min(2.0**self._failures, 30.0))
            else:
                if self._failures and shipped:
                    self._warn("tracking is reachable again")
                    self._failures = 0
                if not shipped:
                    if closing:
                        return
                    self._wait(self._idle_s)

    def _wait(self, longest_s: float) -> None:
        self._nudged.wait(longest_s)
        self._nudged.clear()

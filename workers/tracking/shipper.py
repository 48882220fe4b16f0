"""How a spool's records reach the tracker: a thread that sends them in order, and keeps trying.

Sending a record twice adds nothing, so a shipment that a kill interrupts is simply repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, assert_never

from contract.attempt import MLflowTracking, NoTracking, Tracking
from contract.files import Files
from contract.words import one_line
from workers.tracking.mlflow_tracker import MLflowTracker
from workers.tracking.records import PostponedError, RejectedError, TrackingRecord, halves
from workers.tracking.spool import Destination, Spool, TakenError

_LAST_TRIES = 3  # of a shipper that is closed
_LONGEST_WAIT_S = 30.0  # between two tries of a tracker that fails


class Tracker(Protocol):
    """Where records go. Only the shipper's thread calls `send`."""

    run_id: str  # the tracker's own name of the trial's run, empty until it was reached

    def send(self, records: Sequence[TrackingRecord]) -> None:
        """Sends all of `records`, or raises.

        RejectedError says that trying again is useless, PostponedError that all is sent but some
        artifacts, any other error that trying again is not useless.
        """
        ...


def ship_once(spool: Spool, tracker: Tracker, warn: Callable[[str], None]) -> int:
    """Sends one batch of unsent records. Returns their number; raises what the tracker raised."""
    batch = spool.unsent()
    if not batch:
        return 0
    _deliver(spool, tracker, [record for _, record in batch], warn)
    spool.advance(batch[-1][0])
    return len(batch)


def _deliver(
    spool: Spool, tracker: Tracker, records: Sequence[TrackingRecord], warn: Callable[[str], None]
) -> None:
    try:
        tracker.send(records)
    except PostponedError as error:
        for artifact, reason in error.reasons:
            spool.postpone(artifact, reason)
            warn(f"{artifact.path} is not in the tracker yet, it is tried again: {reason}")
    except RejectedError as error:
        # ever smaller parts, so that one bad value takes no other with it
        parts = halves(records)
        for part in parts:
            _deliver(spool, tracker, part, warn)
        if not parts and spool.reject(records[0], str(error)):
            warn(
                f"tracking refused a record of kind {records[0].kind}: {error}; "
                f"kept in {spool.folder}"
            )


def ship_postponed(spool: Spool, tracker: Tracker, warn: Callable[[str], None]) -> int:
    """Sends the artifacts that their store did not take before. Returns how many it takes now."""
    arrived = 0
    for record in [postponed.record for postponed in spool.postponed()]:
        try:
            tracker.send([record])
        except PostponedError:
            continue
        except RejectedError as error:
            spool.reject(record, str(error))
            warn(f"{record.path}: {error}")
        else:
            arrived += 1
        spool.settle(record)
    return arrived


class Shipper:
    """A thread that ships a spool until it is closed.

    A failure waits and tries again. It reaches nobody but the log: a dead tracker costs the
    training loop nothing.
    """

    def __init__(
        self, spool: Spool, tracker: Tracker, warn: Callable[[str], None], idle_s: float = 2.0
    ) -> None:
        self._spool, self._tracker, self._warn, self._idle_s = spool, tracker, warn, idle_s
        self._closing = threading.Event()
        self._nudged = threading.Event()  # to look at once, not after the wait
        self._failures = 0
        self._why = ""  # the last failure; empty once records arrive again
        self._taken = False
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        return self._tracker.run_id

    def unsent(self) -> list[TrackingRecord]:
        """What a lost disk would lose: a checkpoint carries it along. Raises TakenError."""
        unsent = [record for _, record in self._spool.unsent(100_000)]
        return [*unsent, *(postponed.record for postponed in self._spool.postponed())]

    def flush(self, timeout_s: float) -> None:
        """Waits until the spool's records have arrived, for at most `timeout_s`.

        It does not wait for a tracker that fails. Raises TakenError.
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
        return self._taken or (not self._thread.is_alive() and not self.lacks())

    def lacks(self) -> str:
        """What has not arrived, and why, in words; empty if all of it has. Raises TakenError."""
        lacks = self._spool.lacks()
        return f"{lacks}: {self._why}" if lacks and self._why else lacks

    def _run(self) -> None:
        last_tries = _LAST_TRIES
        look_again = time.monotonic()  # at artifacts that their store refused
        while True:
            closing = self._closing.is_set()
            try:
                shipped = ship_once(self._spool, self._tracker, self._warn)
                if not shipped and (closing or time.monotonic() >= look_again):
                    ship_postponed(self._spool, self._tracker, self._warn)
                    look_again = time.monotonic() + _LONGEST_WAIT_S
            except TakenError as error:
                self._taken = True
                self._warn(str(error))
                return
            except Exception as error:  # noqa: BLE001 - the network or the server: keep, try again
                self._failures += 1
                self._why = one_line(error)
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
                    self._wait(min(2.0**self._failures, _LONGEST_WAIT_S))
            else:
                if self._failures and shipped:
                    self._warn("tracking is reachable again")
                    self._failures, self._why = 0, ""
                if not shipped:
                    if closing:
                        return
                    self._wait(self._idle_s)

    def _wait(self, longest_s: float) -> None:
        self._nudged.wait(longest_s)
        self._nudged.clear()


class NoShipper:
    """The silent twin of a run without a tracker: the records wait in the spool.

    owed: an earlier attempt had a tracker, so that somebody still wants them.
    """

    run_id = ""

    def __init__(self, owed: bool = False) -> None:
        self._owed = owed

    def unsent(self) -> list[TrackingRecord]:
        # none: without a tracker the spool only grows, and so would every checkpoint
        return []

    def flush(self, _timeout_s: float) -> None:
        pass

    def close(self, _timeout_s: float) -> bool:
        return not self._owed

    def lacks(self) -> str:
        return "this attempt has no tracker" if self._owed else ""


AnyShipper: TypeAlias = Shipper | NoShipper


def start_shipper(
    tracking: Tracking,
    spool: Spool,
    destination: Destination,
    storage: Files,
    warn: Callable[[str], None],
) -> AnyShipper:
    """tracking: of this attempt; `destination` may name the tracker of an earlier one."""
    match tracking:
        case NoTracking():
            return NoShipper(owed=not isinstance(destination.tracking, NoTracking))
        case MLflowTracking():
            tracker = MLflowTracker(tracking, destination.trial, destination.name, storage, warn)
            return Shipper(spool, tracker, warn)
        case _:
            assert_never(tracking)

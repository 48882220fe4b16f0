"""Requests to end early: signals, the trial's stop file, a notice that the node goes away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from contract.attempt import ATTEMPT_STOP_FILE, PREEMPT_FILE, STOP_FILE, Outcome
from contract.files import Files

Reason = Literal["", "stopped", "preempted"]
# How often the files are looked at. Behind a URI each look is a request to a store.
_LOCAL_PERIOD_S, _REMOTE_PERIOD_S = 0.25, 2.0


class StopRequest:
    """Whether somebody asked this rank to end, and why. Rank 0 alone watches the files."""

    def __init__(self) -> None:
        self.reason: Reason = ""

    def ask(self, reason: Reason) -> None:
        self.reason = self.reason or reason  # the first reason stays

    def asked(self) -> bool:
        return bool(self.reason)

    @property
    def flags(self) -> tuple[float, float]:
        """(stopped, preempted) as 0 and 1, to be summed over the ranks."""
        return float(self.reason == "stopped"), float(self.reason == "preempted")


def reason_of(flags: Sequence[float]) -> Reason:
    """The common reason from flags summed over the ranks; a person's stop counts first."""
    stopped, preempted = flags
    return "stopped" if stopped else "preempted" if preempted else ""


@contextmanager
def signals_asking(request: StopRequest) -> Iterator[None]:
    """Within the block SIGINT asks for a stop and SIGTERM says preempted. Main thread only."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: request.ask("stopped")),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: request.ask("preempted")),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def grace_enforced(
    request: StopRequest, grace_s: float, leave: Callable[[Reason], None]
) -> Iterator[None]:
    """Within the block a stop request starts a clock; `leave` is called after `grace_s` seconds.

    leave: ends the process, whatever it hangs in.
    """
    ended = threading.Event()

    def watch() -> None:
        # a look now and then: signal handlers set the reason, a plain field without a lock
        while not request.reason:
            if ended.wait(0.25):
                return
        if not ended.wait(grace_s):
            leave(request.reason)

    thread = threading.Thread(target=watch, name="grace", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # A thread that held the last reference to a process group ended with the interpreter, and
        # the rank aborted: about every second run on two ranks (docs/log.md).
        thread.join()


def late_outcome(reason: Reason, grace_s: float) -> Outcome:
    """The outcome of an attempt that did not end within `grace_s` after a stop request."""
    return Outcome(
        state="stopped" if reason == "stopped" else "preempted",
        error=f"not at its end {grace_s:.0f} s after the request; "
        "it resumes from its last checkpoint",
    )


@contextmanager
def files_asking(
    request: StopRequest,
    storage: Files,
    attempt: int,
    notice: Callable[[], bool],
    warn: Callable[[str], None],
) -> Iterator[None]:
    """Within the block a thread looks for the stop files of the trial and of the attempt.

    notice: whether the node is about to go; the thread asks it, too.
    """
    ended = threading.Event()
    period_s = _LOCAL_PERIOD_S if storage.local is not None else _REMOTE_PERIOD_S
    stop_files = (STOP_FILE, ATTEMPT_STOP_FILE.format(attempt=attempt))
    preempt_file = PREEMPT_FILE.format(attempt=attempt)

    def watch() -> None:
        failing = False
        while not ended.wait(period_s) and not request.reason:
            try:
                if any(storage.exists(path) for path in stop_files):
                    request.ask("stopped")
                elif storage.exists(preempt_file) or notice():
                    request.ask("preempted")
                failing = False
            except (OSError, RuntimeError) as error:
                if not failing:  # one warning for each outage, not one for each look
                    warn(f"cannot look for stop requests in {storage.uri}: {error}")
                failing = True

    thread = threading.Thread(target=watch, name="stop-files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # for the same reason as in `grace_enforced`

"""Requests to end early: signals, the trial's stop file, a notice that the node goes away."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from contract.attempt import STOP_FILE, Outcome
from contract.files import Files

Reason = Literal["", "stopped", "preempted"]
# written by the driver of an attempt when it is asked itself
ATTEMPT_STOP_FILE, PREEMPT_FILE = "attempts/{attempt}/stop", "attempts/{attempt}/preempt"
_LAG_STEPS = 2  # on a GPU a flag is read when its copy has long arrived


class StopRequest:
    """What this rank knows. Rank 0 alone watches the files."""

    def __init__(self) -> None:
        self.reason: Reason = ""

    def ask(self, reason: Reason) -> None:
        self.reason = self.reason or reason

    @property
    def flags(self) -> tuple[float, float]:
        """(stopped, preempted) as 0 and 1, to be added over the ranks."""
        return float(self.reason == "stopped"), float(self.reason == "preempted")


def reason_of(flags: Sequence[float]) -> Reason:
    """The common reason from flags added over the ranks."""
    stopped, preempted = flags
    return "stopped" if stopped else "preempted" if preempted else ""


class FlagReader:
    """Reads flags from the device without waiting for it: on a GPU, those of two steps before."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waiting: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def read(self, flags: Tensor) -> Reason:
        """Takes this step's flags; returns the reason that all ranks read in this step."""
        if not self._on_gpu:
            return reason_of(flags.tolist())
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((host, event))
        if len(self._waiting) <= _LAG_STEPS:
            return ""
        oldest, copied = self._waiting.popleft()
        copied.synchronize()
        return reason_of(oldest.tolist())


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
    """Within the block `leave`, which ends the process, is called `grace_s` seconds after a stop was asked for."""
    ended = threading.Event()

    def watch() -> None:
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
        thread.join()  # what it holds must not outlive the interpreter


def late_outcome(reason: Reason, grace_s: float) -> Outcome:
    """Of an attempt that was asked to end and did not within `grace_s`."""
    return Outcome(
        state="stopped" if reason == "stopped" else "preempted",
        error=f"not at its end {grace_s:.0f} s after the request; it resumes from its last checkpoint",
    )


@contextmanager
def files_asking(
    request: StopRequest,
    storage: Files,
    attempt: int,
    notice: Callable[[], bool],
    warn: Callable[[str], None],
) -> Iterator[None]:
    """Within the block the trial's stop file, the attempt's own requests and `notice` are looked at now and then."""
    ended = threading.Event()
    period_s = 0.25 if storage.local is not None else 2.0

    def watch() -> None:
        failing = False
        while not ended.wait(period_s) and not request.reason:
            try:
                if storage.exists(STOP_FILE) or storage.exists(
                    ATTEMPT_STOP_FILE.format(attempt=attempt)
                ):
                    request.ask("stopped")
                elif storage.exists(PREEMPT_FILE.format(attempt=attempt)) or notice():
                    request.ask("preempted")
                failing = False
            except (OSError, RuntimeError) as error:
                if not failing:
                    warn(f"cannot look for stop requests in {storage.uri}: {error}")
                failing = True

    thread = threading.Thread(target=watch, name="stop-files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

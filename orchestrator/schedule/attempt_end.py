"""What the end of an attempt means for its trial: a pure function of what was seen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from contract.attempt import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INPUT,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_STOPPED,
    Outcome,
)
from orchestrator.settings import Limits

ErrorClass = Literal["none", "person", "out_of_memory", "node", "collective", "diverged", "unknown"]

_BY_EXIT: Mapping[int, ErrorClass] = {
    EXIT_INPUT: "person",
    EXIT_OUT_OF_MEMORY: "out_of_memory",
    EXIT_DIVERGED: "diverged",
    EXIT_PREEMPTED: "node",
    EXIT_STOPPED: "none",
}
_REMEDY: Mapping[str, str] = {
    "person": "correct the study and submit it again",
    "out_of_memory": "lower loop.max_images_per_forward, use bf16, or give each rank more memory",
    "diverged": "lower the rate, lengthen the warm-up or clip gradients",
}


@dataclass(frozen=True)
class Ended:
    """An attempt that is over, as the files of its folder, Ray and the ledger tell it."""

    outcome: Outcome | None  # what its ranks left behind
    has_result: bool  # a result.json of this attempt
    exit_code: int | None  # of the driver; None if Ray does not know
    message: str  # Ray's
    wish: str  # why it was asked to stop: "", cancel, pause, stall, budget
    step: int  # the last one seen
    best_step: int  # of all earlier attempts
    failures: int  # earlier ones that counted
    lost: int  # earlier nodes lost in a row without a step gained
    last_error: str  # of the attempt before
    max_attempts: int


@dataclass(frozen=True)
class Verdict:
    """`state`: of the trial from now on. `attempt`: of the attempt."""

    state: Literal["done", "failed", "cancelled", "queued"]
    attempt: Literal["done", "failed", "stopped", "lost"]
    cause: str
    error: str = ""
    error_class: ErrorClass = "none"
    failures: int = 0
    lost: int = 0
    delay_s: float = 0.0  # before it may start again


def judge(ended: Ended, limits: Limits) -> Verdict:
    """Finish, retry or give up: done beats everything, then a person's wish, then the class of the error."""
    finished = ended.outcome is None or ended.outcome.state == "done"
    if ended.has_result and finished:
        return Verdict("done", "done", "finished", failures=ended.failures)
    if ended.wish == "cancel":
        return Verdict("cancelled", "stopped", "cancelled by a person", failures=ended.failures)
    if ended.wish == "budget":
        return Verdict(
            "cancelled", "stopped", "the study's budget is used up", failures=ended.failures
        )
    error_class, error = _class_of(ended)
    if ended.wish == "pause" and error_class in ("none", "node"):
        return Verdict("queued", "stopped", "paused", failures=ended.failures)
    if ended.wish == "stall" and error_class in ("none", "node", "unknown"):
        error_class, error = (
            "collective",
            f"its step stood still for {limits.stall_s:.0f} s: a rank hangs",
        )
    match error_class:
        case "person" | "out_of_memory" | "diverged":
            error = error if ended.outcome else f"{error}; {_REMEDY[error_class]}"
            return Verdict(
                "failed",
                "failed",
                "an error that a retry repeats",
                error,
                error_class,
                ended.failures + 1,
            )
        case "node" | "none":
            return _after_loss(ended, error, limits)
        case _:
            return _after_failure(ended, error_class, error, limits)


def suspects(verdict: Verdict, nodes: Sequence[str], preempted: bool) -> list[str]:
    """The nodes that the next attempt had better avoid, most suspicious first. `nodes`: of the ranks, by rank.

    After a hang or a broken collective: that of the rank whose error it is, then those of its peers; one of them may
    have been the cause. After a preemption all, since one is about to go, and Ray does not say over HTTP which. Nothing
    after any other end.
    """
    if verdict.state != "queued" or not (verdict.error_class == "collective" or preempted):
        return []
    named = re.match(r"rank (\d+): ", verdict.error)
    rank = int(named.group(1)) if named else len(nodes)
    return list(dict.fromkeys([*nodes[rank : rank + 1], *nodes]))


def _after_loss(ended: Ended, error: str, limits: Limits) -> Verdict:
    lost = 1 if ended.step > ended.best_step else ended.lost + 1
    if lost >= limits.lost_without_progress:
        text = f"{error}; lost {lost} times in a row without a step gained"
        return Verdict("failed", "lost", "gives up", text, "node", ended.failures, lost)
    delay = limits.backoff_s * 2 ** (lost - 2) if lost > 1 else 0.0
    return Verdict(
        "queued", "lost", f"{error}; starts again", error, "node", ended.failures, lost, delay
    )


def _after_failure(ended: Ended, error_class: ErrorClass, error: str, limits: Limits) -> Verdict:
    failures = ended.failures + 1
    if error_class == "unknown" and error == ended.last_error:
        return Verdict(
            "failed", "failed", "failed the same way twice", error, error_class, failures
        )
    if failures >= ended.max_attempts:
        return Verdict("failed", "failed", f"failed {failures} times", error, error_class, failures)
    delay = limits.backoff_s * 2 ** (failures - 1)
    cause = f"{error}; tries again in {delay:.0f} s"
    return Verdict("queued", "failed", cause, error, error_class, failures, 0, delay)


def _class_of(ended: Ended) -> tuple[ErrorClass, str]:
    """The ranks' own account, else the driver's exit status, else a lost process."""
    outcome = ended.outcome
    if outcome is not None and outcome.state in ("failed", "preempted"):
        preempted = outcome.state == "preempted"
        error_class: ErrorClass = "node" if preempted else outcome.error_class
        text = outcome.error or (
            "its node was taken away" if preempted else "failed without a reason"
        )
        return ("unknown" if error_class == "none" else error_class), text
    if outcome is not None and outcome.state == "stopped":
        return "none", "it was stopped from outside"
    code = ended.exit_code
    if code is None or code < 0 or code >= 128:
        return "node", f"its processes were lost{f' ({ended.message})' if ended.message else ''}"
    if code == EXIT_DONE:
        return "unknown", "its driver ended without a result"
    return _BY_EXIT.get(code, "unknown"), f"its driver ended with status {code}"

"""What the end of an attempt means for its trial: a pure function of files, Ray and ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from contract.attempt import ErrorClass, ExitStatus, Outcome, Wish
from orchestrator.settings import Limits

_BY_EXIT: Mapping[int, ErrorClass] = {
    ExitStatus.INPUT: "person",
    ExitStatus.OUT_OF_MEMORY: "out_of_memory",
    ExitStatus.DIVERGED: "diverged",
    ExitStatus.PREEMPTED: "node",
    ExitStatus.STOPPED: "none",
}
_REMEDY: Mapping[ErrorClass, str] = {
    "person": "correct the study and submit it again",
    "out_of_memory": "lower loop.max_images_per_forward, use bf16 (fp16 on a GPU without it), "
    "or give each rank more memory",
    "diverged": "lower the rate, lengthen the warm-up or clip gradients",
}


@dataclass(frozen=True)
class EndedAttempt:
    """An attempt that is over, as the files of its folder, Ray and the ledger describe it."""

    outcome: Outcome | None  # what its ranks left behind
    has_result: bool  # a result.json of this attempt
    exit_code: int | None  # of the driver; None if Ray does not know
    message: str  # Ray's
    wish: Wish  # why it was asked to stop
    step: int  # the last one that a file names
    best_step: int  # of all earlier attempts
    failures: int  # earlier ones that counted
    lost: int  # earlier nodes lost in a row without a step gained
    last_error: str  # of the attempt before
    max_attempts: int
    unsound: str = ""  # what in its folder cannot be believed, in words; empty if nothing


@dataclass(frozen=True)
class NextState:
    """`state`: of the trial from now on. `attempt`: of the attempt."""

    state: Literal["done", "failed", "cancelled", "queued"]
    attempt: Literal["done", "failed", "stopped", "lost"]
    cause: str
    error: str = ""
    error_class: ErrorClass = "none"
    failures: int = 0
    lost: int = 0
    delay_s: float = 0.0  # before it may start again


def after_attempt(ended: EndedAttempt, limits: Limits) -> NextState:
    """Finish, retry or give up: a result comes first, then a wish, then the class of the error."""
    if ended.unsound and ended.wish not in ("cancel", "budget"):
        error = f"{ended.unsound}; correct the code that wrote it, remove the file and retry"
        return NextState(
            "failed", "failed", "its files are unsound", error, "person", ended.failures + 1
        )
    # The result is written before the outcome, which a lost node may take with it.
    finished = ended.outcome is None or ended.outcome.state == "done"
    if ended.has_result and finished:
        return NextState("done", "done", "finished", failures=ended.failures)
    if ended.wish == "cancel":
        return NextState("cancelled", "stopped", "cancelled by a person", failures=ended.failures)
    if ended.wish == "budget":
        return NextState(
            "cancelled", "stopped", "the study's budget is used up", failures=ended.failures
        )
    error_class, error = _class_of(ended)
    if ended.wish == "pause" and error_class in ("none", "node"):
        return NextState("queued", "stopped", "paused", failures=ended.failures)
    if ended.wish == "stall" and error_class in ("none", "node", "unknown"):
        # such ranks end like stopped or lost ones: their own account does not say that they hung
        error_class = "collective"
        error = f"its step stood still for {limits.stall_s:.0f} s: a rank hangs"
    match error_class:
        case "person" | "out_of_memory" | "diverged":
            # the ranks' own sentence ends with its remedy, Ray's message has none
            error = error if ended.outcome else f"{error}; {_REMEDY[error_class]}"
            return NextState(
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


def suspects(after: NextState, nodes: Sequence[str], outcome: Outcome | None) -> list[str]:
    """The nodes that the next attempt should avoid, most suspicious first.

    nodes: of the ranks, by rank.

    After a hang or a broken collective: the node of the rank whose error it is, then those of its
    peers, because one of them may have been the cause. After a preemption all: one is about to go,
    and Ray does not say over HTTP which one. After a GPU broke its node alone, which is still there
    for Ray. None after any other end.
    """
    if after.state != "queued":
        return []
    preempted = outcome is not None and outcome.state == "preempted"
    # A hang has an error of our own words, which is no rank's. An older code package names no rank.
    named = outcome is not None and outcome.rank >= 0 and outcome.error == after.error
    rank = outcome.rank if outcome is not None and named else len(nodes)
    if outcome is not None and outcome.avoid_node:
        return [*nodes[rank : rank + 1]]
    if not (after.error_class == "collective" or preempted):
        return []
    return list(dict.fromkeys([*nodes[rank : rank + 1], *nodes]))


def _after_loss(ended: EndedAttempt, error: str, limits: Limits) -> NextState:
    # A lost node is nobody's error: it costs no attempt while the trial gains steps.
    lost = 1 if ended.step > ended.best_step else ended.lost + 1
    if lost >= limits.lost_without_progress:
        text = f"{error}; lost {lost} times in a row without a step gained"
        return NextState("failed", "lost", "gives up", text, "node", ended.failures, lost)
    delay = limits.backoff_s * 2 ** (lost - 2) if lost > 1 else 0.0
    return NextState(
        "queued", "lost", f"{error}; starts again", error, "node", ended.failures, lost, delay
    )


def _after_failure(
    ended: EndedAttempt, error_class: ErrorClass, error: str, limits: Limits
) -> NextState:
    failures = ended.failures + 1
    # an error of no known class may be chance; the same words twice are not
    if error_class == "unknown" and error == ended.last_error:
        return NextState(
            "failed", "failed", "failed the same way twice", error, error_class, failures
        )
    if failures >= ended.max_attempts:
        return NextState(
            "failed", "failed", f"failed {failures} times", error, error_class, failures
        )
    delay = limits.backoff_s * 2 ** (failures - 1)
    cause = f"{error}; tries again in {delay:.0f} s"
    return NextState("queued", "failed", cause, error, error_class, failures, 0, delay)


def _class_of(ended: EndedAttempt) -> tuple[ErrorClass, str]:
    """The class and the words of the error, as the ranks tell them.

    Without their account it is the driver's exit status, and without that a lost process.
    """
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
    # a negative status, and one from 128 on, is a signal: the driver did not end by itself
    if code is None or code < 0 or code >= 128:
        return "node", f"its processes were lost{f' ({ended.message})' if ended.message else ''}"
    if code == ExitStatus.DONE:
        return "unknown", "its driver ended without a result"
    return _BY_EXIT.get(code, "unknown"), f"its driver ended with status {code}"

"""What is written while attempts start, run and end.

Each change names the attempt that it is about. A trial that is at another one by then stays as it
is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict, Unpack

from sqlalchemy import insert, update

from contract.attempt import AttemptState, Progress, Wish
from contract.study import LIVE_TRIALS
from orchestrator.ledger import queries
from orchestrator.ledger.changes import TrialChange, end_study_if_over, move_trial
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.rows import LiveAttempt
from orchestrator.ledger.tables import ATTEMPTS, TRIALS

NUMBER = re.compile("[1-9][0-9]{0,5}")  # of an attempt


class AttemptChange(TypedDict, total=False):
    """The columns of an attempt that change after its start."""

    state: AttemptState
    cause: str
    running_at: float
    stop_asked_at: float
    ended_at: float
    step: int
    first_step: int


def start_attempt(
    ledger: Ledger, trial: str, now: float, cause: str, avoid: Sequence[str] = ()
) -> int:
    """The number of a new attempt of a queued trial of an active study, 0 if it is neither by now.

    avoid: nodes that none of its ranks may sit on.
    """
    with ledger.writing() as transaction:
        row = queries.trial_row(transaction, trial)
        study = queries.lock_study(transaction, row.study) if row is not None else None
        if row is None or study is None or study.state != "active":
            return 0
        # an attempt's number never comes twice, so its submission id is one that Ray does not know
        # yet
        number = row.attempts + 1
        if not move_trial(
            transaction,
            trial,
            ["queued"],
            at_attempt=row.attempts,
            state="starting",
            attempts=number,
            moved_at=now,
        ):
            return 0
        transaction.execute(
            insert(ATTEMPTS).values(
                trial=trial,
                number=number,
                submission_id=f"{trial}-{number}",
                state="submitting",
                started_at=now,
                avoid=" ".join(avoid),
            )
        )
        record(transaction, "starting", cause, study=row.study, trial=trial, attempt=number, at=now)
    return number


def adopt_attempt(ledger: Ledger, trial: str, submission_id: str, now: float) -> bool:
    """Takes a job that a restored ledger has forgotten as the waiting trial's next attempt.

    False, and nothing changes, if the trial does not wait or the job is no newer attempt of it.
    """
    name, _, digits = submission_id.rpartition("-")
    if name != trial or not NUMBER.fullmatch(digits):
        return False
    number = int(digits)
    with ledger.writing() as transaction:
        row = queries.trial_row(transaction, trial)
        study = queries.lock_study(transaction, row.study) if row is not None else None
        if row is None or study is None or study.state != "active":
            return False
        known = queries.attempt_row(transaction, trial, number)
        if known is not None or number < row.attempts:
            return False
        change: TrialChange = {"state": "starting", "attempts": number, "moved_at": now}
        if not move_trial(transaction, trial, ["queued"], **change):
            return False
        transaction.execute(
            insert(ATTEMPTS).values(
                trial=trial,
                number=number,
                submission_id=submission_id,
                state="submitted",
                started_at=now,
            )
        )
        why = f"job {submission_id} ran when the ledger was restored: adopted"
        record(transaction, "adopted", why, study=row.study, trial=trial, attempt=number, at=now)
    return True


def note_submitted(ledger: Ledger, submission_id: str) -> None:
    """Ray has the attempt's job."""
    query = update(ATTEMPTS).where(ATTEMPTS.c.submission_id == submission_id)
    with ledger.writing() as transaction:
        # the loop may have seen it run, or end, before this line
        query = query.where(ATTEMPTS.c.state == "submitting")
        transaction.execute(query.values(state="submitted"))


def note_progress(ledger: Ledger, live: LiveAttempt, seen: Progress | None, now: float) -> bool:
    """Notes that the attempt runs, and what its ranks say. False if the ledger knows all of it."""
    attempt, before = live.attempt, live.trial.progress
    # Only what changed is written: most ticks find nothing new in most trials.
    of_trial: TrialChange = {}
    of_attempt: AttemptChange = {}
    if seen is not None:
        data = seen.model_dump()
        if data != live.trial.progress_json:
            of_trial["progress"] = data
        if before is None or _place(seen) != _place(before):
            # the service's clock, with which a stall is measured
            of_trial["moved_at"] = now
            of_attempt["step"] = seen.step
        if attempt.first_step < 0:
            of_attempt["first_step"] = seen.step
    starts = attempt.state != "running"
    if starts:
        of_attempt |= {"state": "running", "running_at": now}
        of_trial["moved_at"] = now
    if not of_trial and not of_attempt:
        return False
    with ledger.writing() as transaction:
        if of_attempt:
            _change(transaction, live, **of_attempt)
        trial, number = attempt.trial, attempt.number
        # of any live state: a trial that is being stopped still trains up to its last checkpoint
        if of_trial:
            move_trial(transaction, trial, LIVE_TRIALS, at_attempt=number, **of_trial)
        if starts and move_trial(
            transaction, trial, ["starting"], at_attempt=number, state="running"
        ):
            _record(transaction, live, "running", "its driver runs", now)
    return True


def _place(progress: Progress) -> tuple[int, str, int]:
    """What must change from time to time in an attempt that does not hang."""
    return progress.attempt, progress.phase, progress.step


def note_stop(ledger: Ledger, live: LiveAttempt, now: float) -> None:
    """Ray was asked to stop the attempt's job."""
    with ledger.writing() as transaction:
        _change(transaction, live, stop_asked_at=now)


def end_attempt(
    ledger: Ledger,
    live: LiveAttempt,
    of_trial: TrialChange,
    of_attempt: AttemptChange,
    event: tuple[str, str],
    now: float,
    wish: Wish,
) -> bool:
    """Notes what became of an attempt and of its trial. event: its kind and cause.

    False, and nothing changes, if the trial's wish is another one than `wish` by now.
    """
    seconds = now - (live.attempt.running_at or now)
    # the database adds, because the row that we hold may be older than what the column has now
    paid = TRIALS.c.rank_seconds + live.study.spec.resources.ranks * seconds
    change: TrialChange = {**of_trial, "rank_seconds": paid}
    with ledger.writing() as transaction:
        queries.lock_study(transaction, live.study.id)
        if not move_trial(
            transaction,
            live.trial.id,
            LIVE_TRIALS,
            at_attempt=live.attempt.number,
            with_wish=wish,
            **change,
        ):
            return False
        _change(transaction, live, **of_attempt)
        _record(transaction, live, *event, now)
        end_study_if_over(transaction, live.study.id, now)
    return True


def _change(transaction: Transaction, live: LiveAttempt, **change: Unpack[AttemptChange]) -> None:
    attempt = live.attempt
    query = update(ATTEMPTS).where(ATTEMPTS.c.trial == attempt.trial)
    transaction.execute(query.where(ATTEMPTS.c.number == attempt.number).values(**change))


def _record(transaction: Transaction, live: LiveAttempt, kind: str, cause: str, now: float) -> None:
    trial, number = live.trial.id, live.attempt.number
    record(transaction, kind, cause, study=live.study.id, trial=trial, attempt=number, at=now)

"""What a person may do to a study or a trial after it was submitted.

A command changes the ledger alone; the loop then changes the cluster. To cancel, pause, resume and
retry return whether there was anything to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import ColumnElement, delete, select, update

from contract.study import FINAL_STATES, LIVE_TRIALS, Looks, StudyState, TrialState
from orchestrator.ledger import queries
from orchestrator.ledger.changes import end_study_if_over, move_trials
from orchestrator.ledger.events import STUDY_FORGOTTEN, record
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS

_STARTED: Sequence[TrialState] = ("starting", "running")  # and nobody has asked to stop them


def cancel_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Waiting trials never start, running ones write a checkpoint and stop."""
    queries.lock_study(transaction, study)
    changed = _cancel(transaction, TRIALS.c.study == study, by, now)
    end_study_if_over(transaction, study, now)
    return changed > 0


def cancel_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    study = _lock_study_of(transaction, trial)
    changed = _cancel(transaction, TRIALS.c.id == trial, by, now)
    end_study_if_over(transaction, study, now)
    return changed > 0


def _cancel(transaction: Transaction, which: ColumnElement[bool], by: str, now: float) -> int:
    waits = which & TRIALS.c.state.in_(("held", "queued"))
    why = ("cancelled", f"by {by}, before it ran")
    changed = move_trials(transaction, waits, why, now, state="cancelled")
    # also one that stops for another reason: a paused or hanging trial would start again
    lives = which & TRIALS.c.state.in_(LIVE_TRIALS) & (TRIALS.c.wish != "cancel")
    why = ("stopping", f"cancelled by {by}")
    return changed + move_trials(transaction, lives, why, now, state="stopping", wish="cancel")


def pause_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Running trials write a checkpoint and wait in their old place."""
    queries.lock_study(transaction, study)
    if not _move_study(transaction, study, ["active"], "paused"):
        return False
    record(transaction, "study-paused", f"by {by}", study=study, at=now)
    # trials that stop already keep their wish: a cancelled one must not come back with the study
    started = (TRIALS.c.study == study) & TRIALS.c.state.in_(_STARTED)
    why = ("stopping", f"paused by {by}")
    move_trials(transaction, started, why, now, state="stopping", wish="pause")
    return True


def resume_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """A paused study goes on."""
    queries.lock_study(transaction, study)
    if not _move_study(transaction, study, ["paused"], "active"):
        return False
    record(transaction, "study-resumed", f"by {by}", study=study, at=now)
    end_study_if_over(transaction, study, now)
    return True


def retry_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Failed and cancelled trials go on from their last checkpoint, their failures forgotten.

    Seeds that waited for a look when they were cancelled wait for it again.
    """
    row = queries.lock_study(transaction, study)
    assert row is not None
    of_study = TRIALS.c.study == study
    held = 0
    if isinstance(seeds := row.spec.seeds, Looks):
        taken = row.looks[-1]["seeds"] if row.looks else 0
        following = next((number for number in seeds.looks if number > taken), seeds.most)
        cancelled = of_study & (TRIALS.c.state == "cancelled") & (TRIALS.c.attempts == 0)
        held = _wait_again(transaction, cancelled & (TRIALS.c.seed >= following), "held", by, now)
    ended = of_study & TRIALS.c.state.in_(("failed", "cancelled"))
    return _reopened(transaction, study, held + _wait_again(transaction, ended, "queued", by, now))


def retry_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    """As `retry_study`, for one trial, also one that a look spared.

    Its study becomes active again if it was over.
    """
    study = _lock_study_of(transaction, trial)
    ended = TRIALS.c.state.in_(("failed", "cancelled", "spared"))
    which = (TRIALS.c.id == trial) & ended
    return _reopened(transaction, study, _wait_again(transaction, which, "queued", by, now))


def _wait_again(
    transaction: Transaction,
    which: ColumnElement[bool],
    state: Literal["held", "queued"],
    by: str,
    now: float,
) -> int:
    return move_trials(
        transaction,
        which,
        (state, f"retried by {by}"),
        now,
        state=state,
        failures=0,
        lost=0,
        error="",
        error_class="",
        wish="",
        not_before=0.0,
        queued_at=now,
        mlflow_closed=False,  # the run of the next attempt has to be ended too
    )


def _reopened(transaction: Transaction, study: str, changed: int) -> bool:
    """Whether there was anything to change; then the study is active, if it was over."""
    if not changed:
        return False
    query = update(STUDIES).where(STUDIES.c.id == study, STUDIES.c.state.in_(FINAL_STATES))
    # MLflow and the webhook hear of the next end too
    again = query.values(
        state="active", ended_at=0.0, mlflow_closed=False, webhook_sent=False, judged=False
    )
    transaction.execute(again)
    return True


def set_priority(transaction: Transaction, study: str, priority: int, by: str, now: float) -> None:
    """Of all trials of the study that still wait."""
    transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(priority=priority))
    record(transaction, "priority", f"{priority}, by {by}", study=study, at=now)


def forget_study(transaction: Transaction, study: str, by: str, now: float) -> None:
    """Takes a study that is over out of the ledger; its files and MLflow runs stay.

    Raises ValueError if the study is not over.
    """
    row = queries.lock_study(transaction, study)
    assert row is not None
    if row.state not in FINAL_STATES:
        raise ValueError(f"study {study} is {row.state}: cancel it before you forget it")
    trials = select(TRIALS.c.id).where(TRIALS.c.study == study)
    transaction.execute(delete(ATTEMPTS).where(ATTEMPTS.c.trial.in_(trials)))
    transaction.execute(delete(TRIALS).where(TRIALS.c.study == study))
    transaction.execute(delete(STUDIES).where(STUDIES.c.id == study))
    transaction.execute(delete(EVENTS).where(EVENTS.c.study == study))
    why = f"by {by}; its files stay in {row.storage}"
    record(transaction, STUDY_FORGOTTEN, why, study=study, at=now)


def _lock_study_of(transaction: Transaction, trial: str) -> str:
    row = queries.trial_row(transaction, trial)
    assert row is not None
    queries.lock_study(transaction, row.study)
    return row.study


def _move_study(
    transaction: Transaction, study: str, states: Sequence[StudyState], state: StudyState
) -> bool:
    query = update(STUDIES).where(STUDIES.c.id == study, STUDIES.c.state.in_(states))
    return transaction.execute(query.values(state=state)).rowcount == 1

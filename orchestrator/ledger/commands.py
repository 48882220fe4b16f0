"""What a person may do to a study or a trial after it was submitted.

A command changes the ledger alone; the loop then changes the cluster. To cancel, pause, resume and
retry return whether there was anything to change.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update

from contract.study import FINAL_STATES, LIVE_TRIALS, StudyState, TrialState
from orchestrator.ledger import queries
from orchestrator.ledger.changes import end_study_if_over, move_trial
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS

_STARTED: Sequence[TrialState] = ("starting", "running")  # and nobody has asked to stop them


def cancel_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Waiting trials never start, running ones write a checkpoint and stop."""
    trials = _trials(transaction, study, ("queued", *LIVE_TRIALS))
    # a list and not a generator: `any` would end at the first trial that changed
    changed = [cancel_trial(transaction, trial, by, now) for trial in trials]
    end_study_if_over(transaction, study, now)
    return any(changed)


def cancel_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    study = _study_of(transaction, trial)
    if move_trial(transaction, trial, ["queued"], state="cancelled"):
        why = f"by {by}, before it ran"
        record(transaction, "cancelled", why, study=study, trial=trial, at=now)
        end_study_if_over(transaction, study, now)
        return True
    # also one that stops for another reason: a paused or hanging trial would start again
    if move_trial(transaction, trial, LIVE_TRIALS, state="stopping", wish="cancel"):
        why = f"cancelled by {by}"
        record(transaction, "stopping", why, study=study, trial=trial, at=now)
        return True
    return False


def pause_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Running trials write a checkpoint and wait in their old place."""
    if not _move_study(transaction, study, ["active"], "paused"):
        return False
    record(transaction, "study-paused", f"by {by}", study=study, at=now)
    # trials that stop already keep their wish: a cancelled one must not come back with the study
    for trial in _trials(transaction, study, _STARTED):
        if move_trial(transaction, trial, _STARTED, state="stopping", wish="pause"):
            why = f"paused by {by}"
            record(transaction, "stopping", why, study=study, trial=trial, at=now)
    return True


def resume_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """A paused study goes on."""
    if not _move_study(transaction, study, ["paused"], "active"):
        return False
    record(transaction, "study-resumed", f"by {by}", study=study, at=now)
    end_study_if_over(transaction, study, now)
    return True


def retry_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Failed and cancelled trials go on from their last checkpoint, their failures forgotten."""
    trials = _trials(transaction, study, ("failed", "cancelled"))
    changed = [retry_trial(transaction, trial, by, now) for trial in trials]
    return any(changed)


def retry_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    """As `retry_study`, for one trial. Its study becomes active again if it was over."""
    study = _study_of(transaction, trial)
    if not move_trial(
        transaction,
        trial,
        ["failed", "cancelled"],
        state="queued",
        failures=0,
        lost=0,
        error="",
        error_class="",
        wish="",
        not_before=0.0,
        queued_at=now,
        mlflow_closed=False,  # the run of the next attempt has to be ended too
    ):
        return False
    record(transaction, "queued", f"retried by {by}", study=study, trial=trial, at=now)
    query = update(STUDIES).where(STUDIES.c.id == study, STUDIES.c.state.in_(FINAL_STATES))
    # MLflow and the webhook hear of the next end too
    again = query.values(state="active", ended_at=0.0, mlflow_closed=False, webhook_sent=False)
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
    row = queries.study_row(transaction, study)
    assert row is not None
    if row.state not in FINAL_STATES:
        raise ValueError(f"study {study} is {row.state}: cancel it before you forget it")
    trials = select(TRIALS.c.id).where(TRIALS.c.study == study)
    transaction.execute(delete(ATTEMPTS).where(ATTEMPTS.c.trial.in_(trials)))
    transaction.execute(delete(TRIALS).where(TRIALS.c.study == study))
    transaction.execute(delete(STUDIES).where(STUDIES.c.id == study))
    transaction.execute(delete(EVENTS).where(EVENTS.c.study == study))
    why = f"by {by}; its files stay in {row.storage}"
    record(transaction, "study-forgotten", why, study=study, at=now)


def _study_of(transaction: Transaction, trial: str) -> str:
    row = queries.trial_row(transaction, trial)
    assert row is not None
    return row.study


def _trials(transaction: Transaction, study: str, states: Sequence[TrialState]) -> list[str]:
    rows = queries.trials(transaction, study)
    return [trial.id for trial in rows if trial.state in states]


def _move_study(
    transaction: Transaction, study: str, states: Sequence[StudyState], state: StudyState
) -> bool:
    query = update(STUDIES).where(STUDIES.c.id == study, STUDIES.c.state.in_(states))
    return transaction.execute(query.values(state=state)).rowcount == 1

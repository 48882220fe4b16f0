"""What a person may do to a study or a trial after it was submitted. All of it is ledger; the loop makes it true.

Cancelling, pausing, resuming and retrying return whether there was anything to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update

from orchestrator.ledger import store
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS

LIVE = ("starting", "running")
ENDED_STUDY = ("done", "failed", "cancelled")


def cancel_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Waiting trials never start, running ones checkpoint and stop. A study that is over stays as it is."""
    trials = _trials(transaction, study, ("queued", *LIVE, "stopping"))
    changed = [cancel_trial(transaction, trial, by, now) for trial in trials]
    store.end_study_if_over(transaction, study, now)
    return any(changed)


def cancel_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    row = store.trial_row(transaction, trial)
    assert row is not None
    if store.move_trial(transaction, trial, ["queued"], {"state": "cancelled"}):
        store.record(
            transaction,
            "cancelled",
            f"by {by}, before it ran",
            study=row["study"],
            trial=trial,
            at=now,
        )
        store.end_study_if_over(transaction, row["study"], now)
    elif store.move_trial(
        transaction, trial, [*LIVE, "stopping"], {"state": "stopping", "wish": "cancel"}
    ):
        store.record(
            transaction, "stopping", f"cancelled by {by}", study=row["study"], trial=trial, at=now
        )
    else:
        return False
    return True


def pause_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Running trials checkpoint and wait in their old place."""
    changed = transaction.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state == "active")
        .values(state="paused")
    ).rowcount
    if not changed:
        return False
    store.record(transaction, "study-paused", f"by {by}", study=study, at=now)
    for trial in _trials(transaction, study, LIVE):
        if store.move_trial(transaction, trial, LIVE, {"state": "stopping", "wish": "pause"}):
            store.record(
                transaction, "stopping", f"paused by {by}", study=study, trial=trial, at=now
            )
    return True


def resume_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    changed = transaction.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state == "paused")
        .values(state="active")
    ).rowcount
    if changed:
        store.record(transaction, "study-resumed", f"by {by}", study=study, at=now)
        store.end_study_if_over(transaction, study, now)
    return bool(changed)


def retry_study(transaction: Transaction, study: str, by: str, now: float) -> bool:
    """Failed and cancelled trials go on from their last checkpoint, with a fresh count of failures."""
    trials = _trials(transaction, study, ("failed", "cancelled"))
    changed = [retry_trial(transaction, trial, by, now) for trial in trials]
    return any(changed)


def retry_trial(transaction: Transaction, trial: str, by: str, now: float) -> bool:
    row = store.trial_row(transaction, trial)
    assert row is not None
    values: dict[str, Any] = {
        "state": "queued",
        "failures": 0,
        "lost": 0,
        "error": "",
        "error_class": "",
        "wish": "",
        "not_before": 0.0,
        "queued_at": now,
        "mlflow_closed": False,
    }
    if not store.move_trial(transaction, trial, ["failed", "cancelled"], values):
        return False
    store.record(transaction, "queued", f"retried by {by}", study=row["study"], trial=trial, at=now)
    transaction.execute(
        update(STUDIES)
        .where(STUDIES.c.id == row["study"], STUDIES.c.state.in_(ENDED_STUDY))
        .values(state="active", ended_at=0.0, mlflow_closed=False, webhook_sent=False)
    )
    return True


def set_priority(transaction: Transaction, study: str, priority: int, by: str, now: float) -> None:
    transaction.execute(update(STUDIES).where(STUDIES.c.id == study).values(priority=priority))
    store.record(transaction, "priority", f"{priority}, by {by}", study=study, at=now)


def forget_study(transaction: Transaction, study: str, by: str, now: float) -> None:
    """Takes a study that is over out of the ledger; its files and MLflow runs stay. Raises ValueError if it runs."""
    row = store.study_row(transaction, study)
    assert row is not None
    if row["state"] not in ENDED_STUDY:
        raise ValueError(f"study {study} is {row['state']}: cancel it before you forget it")
    for table in (ATTEMPTS, TRIALS):
        column = table.c.trial if table is ATTEMPTS else table.c.id
        trials = select(TRIALS.c.id).where(TRIALS.c.study == study)
        transaction.execute(delete(table).where(column.in_(trials)))
    transaction.execute(delete(STUDIES).where(STUDIES.c.id == study))
    transaction.execute(delete(EVENTS).where(EVENTS.c.study == study))
    store.record(
        transaction,
        "study-forgotten",
        f"by {by}; its files stay in {row['storage']}",
        study=study,
        at=now,
    )


def _trials(transaction: Transaction, study: str, states: Sequence[str]) -> list[str]:
    query = (
        select(TRIALS.c.id)
        .where(TRIALS.c.study == study, TRIALS.c.state.in_(states))
        .order_by(TRIALS.c.position)
    )
    return list(transaction.execute(query).scalars())

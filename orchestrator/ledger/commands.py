"""What a person may do to a study or a trial after it was submitted. All of it is ledger; the loop makes it true.

Cancelling, pausing, resuming and retrying return whether there was anything to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, select, update

from orchestrator.ledger import store as ledger
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS

LIVE = ("starting", "running")
ENDED_STUDY = ("done", "failed", "cancelled")


def cancel_study(connection: Connection, study: str, by: str, now: float) -> bool:
    """Waiting trials never start, running ones checkpoint and stop. A study that is over stays as it is."""
    trials = _trials(connection, study, ("queued", *LIVE, "stopping"))
    changed = [cancel_trial(connection, trial, by, now) for trial in trials]
    ledger.end_study_if_over(connection, study, now)
    return any(changed)


def cancel_trial(connection: Connection, trial: str, by: str, now: float) -> bool:
    row = ledger.trial_row(connection, trial)
    assert row is not None
    if ledger.move_trial(connection, trial, ["queued"], {"state": "cancelled"}):
        ledger.record(
            connection,
            "cancelled",
            f"by {by}, before it ran",
            study=row["study"],
            trial=trial,
            at=now,
        )
        ledger.end_study_if_over(connection, row["study"], now)
    elif ledger.move_trial(
        connection, trial, [*LIVE, "stopping"], {"state": "stopping", "wish": "cancel"}
    ):
        ledger.record(
            connection, "stopping", f"cancelled by {by}", study=row["study"], trial=trial, at=now
        )
    else:
        return False
    return True


def pause_study(connection: Connection, study: str, by: str, now: float) -> bool:
    """Running trials checkpoint and wait in their old place."""
    changed = connection.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state == "active")
        .values(state="paused")
    ).rowcount
    if not changed:
        return False
    ledger.record(connection, "study-paused", f"by {by}", study=study, at=now)
    for trial in _trials(connection, study, LIVE):
        if ledger.move_trial(connection, trial, LIVE, {"state": "stopping", "wish": "pause"}):
            ledger.record(
                connection, "stopping", f"paused by {by}", study=study, trial=trial, at=now
            )
    return True


def resume_study(connection: Connection, study: str, by: str, now: float) -> bool:
    changed = connection.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state == "paused")
        .values(state="active")
    ).rowcount
    if changed:
        ledger.record(connection, "study-resumed", f"by {by}", study=study, at=now)
        ledger.end_study_if_over(connection, study, now)
    return bool(changed)


def retry_study(connection: Connection, study: str, by: str, now: float) -> bool:
    """Failed and cancelled trials go on from their last checkpoint, with a fresh count of failures."""
    trials = _trials(connection, study, ("failed", "cancelled"))
    changed = [retry_trial(connection, trial, by, now) for trial in trials]
    return any(changed)


def retry_trial(connection: Connection, trial: str, by: str, now: float) -> bool:
    row = ledger.trial_row(connection, trial)
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
    if not ledger.move_trial(connection, trial, ["failed", "cancelled"], values):
        return False
    ledger.record(connection, "queued", f"retried by {by}", study=row["study"], trial=trial, at=now)
    connection.execute(
        update(STUDIES)
        .where(STUDIES.c.id == row["study"], STUDIES.c.state.in_(ENDED_STUDY))
        .values(state="active", ended_at=0.0, mlflow_closed=False, webhook_sent=False)
    )
    return True


def set_priority(connection: Connection, study: str, priority: int, by: str, now: float) -> None:
    connection.execute(update(STUDIES).where(STUDIES.c.id == study).values(priority=priority))
    ledger.record(connection, "priority", f"{priority}, by {by}", study=study, at=now)


def forget_study(connection: Connection, study: str, by: str, now: float) -> None:
    """Takes a study that is over out of the ledger; its files and MLflow runs stay. Raises ValueError if it runs."""
    row = ledger.study_row(connection, study)
    assert row is not None
    if row["state"] not in ENDED_STUDY:
        raise ValueError(f"study {study} is {row['state']}: cancel it before you forget it")
    for table in (ATTEMPTS, TRIALS):
        column = table.c.trial if table is ATTEMPTS else table.c.id
        trials = select(TRIALS.c.id).where(TRIALS.c.study == study)
        connection.execute(delete(table).where(column.in_(trials)))
    connection.execute(delete(STUDIES).where(STUDIES.c.id == study))
    connection.execute(delete(EVENTS).where(EVENTS.c.study == study))
    ledger.record(
        connection,
        "study-forgotten",
        f"by {by}; its files stay in {row['storage']}",
        study=study,
        at=now,
    )


def _trials(connection: Connection, study: str, states: Sequence[str]) -> list[str]:
    query = (
        select(TRIALS.c.id)
        .where(TRIALS.c.study == study, TRIALS.c.state.in_(states))
        .order_by(TRIALS.c.position)
    )
    return list(connection.execute(query).scalars())

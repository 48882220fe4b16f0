"""What happened: one event for each change, written in the transaction of the change."""

from __future__ import annotations

import time

from sqlalchemy import insert

from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import EVENTS

STUDY_FORGOTTEN = "study-forgotten"  # the one event that outlives its study
COPY_REMOVED = "copy-removed"  # of a trial's weights, from MLflow
_LONGEST = 2000  # characters of a cause: an error of a stranger's code has no bound


def record(
    transaction: Transaction,
    kind: str,
    cause: str,
    *,
    study: str,
    trial: str = "",
    attempt: int = 0,
    at: float = 0.0,
) -> None:
    """at: Unix time; 0 is now."""
    transaction.execute(
        insert(EVENTS).values(
            kind=kind,
            cause=cause[:_LONGEST],
            at=at or time.time(),
            study=study,
            trial=trial,
            attempt=attempt,
        )
    )

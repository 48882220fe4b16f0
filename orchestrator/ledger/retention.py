"""What may be deleted of studies that are over: checkpoints first, everything only when asked for.

Deletes nothing by itself: `plan_retention` says what would go, `apply_retention` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from contract.attempt import CHECKPOINT_FOLDER
from contract.files import join
from contract.study import FINAL_STATES
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.settings import service_files

_ENDED_STUDY = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Removal:
    """A folder that a policy lets go. `bytes` as found when the plan was made."""

    study: str
    trial: str
    folder: str
    bytes: int


def plan_retention(
    transaction: Transaction, now: float, checkpoints_days: float, trial: str = ""
) -> list[Removal]:
    """The checkpoints of trials whose study ended more than `checkpoints_days` ago, largest first.

    Results, logs, artifacts and the last weights stay; a trial that failed can then only be retried from its start.
    A trial whose folder a cached one points to is its own folder: it is listed once. trial: of this one alone.
    """
    query = (
        select(TRIALS.c.id, TRIALS.c.study, TRIALS.c.folder)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(
            STUDIES.c.state.in_(_ENDED_STUDY),
            STUDIES.c.ended_at > 0,
            STUDIES.c.ended_at < now - 86400 * checkpoints_days,
            TRIALS.c.state.in_(FINAL_STATES),
            TRIALS.c.cached_from == "",
        )
    )
    if trial:
        query = query.where(TRIALS.c.id == trial)
    found = []
    for row in transaction.execute(query).mappings():
        folder = join(row["folder"], CHECKPOINT_FOLDER)
        size = service_files(folder).folder_bytes()
        if size:
            found.append(Removal(row["study"], row["id"], folder, size))
    return sorted(found, key=lambda removal: (-removal.bytes, removal.trial))


def apply_retention(
    ledger: Ledger, removals: Sequence[Removal], now: float, checkpoints_days: float
) -> int:
    """Deletes what a plan lists, except of trials that were retried since; the bytes that are free now."""
    freed = 0
    for removal in removals:
        with ledger.reading() as transaction:
            still = plan_retention(transaction, now, checkpoints_days, removal.trial)
        if still:
            service_files(removal.folder).delete()
            freed += removal.bytes
    return freed

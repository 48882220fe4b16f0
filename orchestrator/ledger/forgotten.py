"""The folders of forgotten studies: `maskray forget` takes a study out of the ledger alone.

A plan says what would be deleted, and deletes nothing. Its `apply` deletes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from contract.files import split, uri_join
from orchestrator.ledger.events import STUDY_FORGOTTEN, record
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.retention import Removal
from orchestrator.ledger.tables import EVENTS, STUDIES, TRIALS
from orchestrator.trial_folder import TrialFolder


def plan_forgotten(transaction: Transaction, storage: str) -> list[Removal]:
    """Folders below `storage` that `maskray forget` left there, largest first."""
    found = _forgotten(transaction) & set(TrialFolder(storage).names())
    removals = [
        Removal(study, "", uri_join(storage, study), TrialFolder(storage).bytes_below(study))
        for study in found
    ]
    return sorted(removals, key=lambda removal: (-removal.bytes, removal.study))


def apply_forgotten(ledger: Ledger, removals: Sequence[Removal], now: float) -> int:
    """Deletes what a plan lists; the bytes that are free now."""
    freed = 0
    for removal in removals:
        with ledger.reading() as transaction:
            still = removal.study in _forgotten(transaction)
        if still:
            TrialFolder(split(removal.folder)[0]).delete(removal.study)
            text = f"{removal.folder}, {removal.bytes} bytes"
            with ledger.writing() as transaction:
                record(transaction, "folder-removed", text, study=removal.study, at=now)
            freed += removal.bytes
    return freed


def _forgotten(transaction: Transaction) -> set[str]:
    """The forgotten studies of which no other study has a result.

    Only an event proves it: another service may keep its studies below the same storage.
    """
    events = select(EVENTS.c.study).where(EVENTS.c.kind == STUDY_FORGOTTEN)
    forgotten = set(transaction.execute(events).scalars())
    # A backup that was restored knows studies again that were forgotten after it.
    forgotten -= set(transaction.execute(select(STUDIES.c.id)).scalars())
    borrowed = transaction.execute(
        select(TRIALS.c.cached_from).where(TRIALS.c.cached_from != "").distinct()
    )
    return forgotten - {trial.rpartition("-")[0] for trial in borrowed.scalars()}

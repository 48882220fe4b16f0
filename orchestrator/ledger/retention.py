"""What may be deleted of studies that are over: their checkpoints.

`plan_retention` says what a policy would delete, and deletes nothing. `apply_retention` deletes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from contract.attempt import CHECKPOINT_FOLDER
from contract.files import split, uri_join
from contract.study import FINAL_STATES
from contract.words import one_line
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.trial_folder import TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")
_DAY_S = 86400


@dataclass(frozen=True)
class Removal:
    """A folder that a policy deletes. `bytes`: its size when the plan was made."""

    study: str
    trial: str  # empty for the folder of a whole study
    folder: str
    bytes: int


def plan_retention(
    transaction: Transaction, now: float, checkpoints_days: float, trial: str = ""
) -> list[Removal]:
    """The checkpoints of trials whose study ended more than `checkpoints_days` ago, largest first.

    Results, logs, artifacts and the last weights stay. A trial that failed can then only be retried
    from its start.
    trial: if named, the plan is for this one alone.
    """
    query = (
        select(TRIALS.c.id, TRIALS.c.study, TRIALS.c.folder)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(
            STUDIES.c.state.in_(FINAL_STATES),
            STUDIES.c.ended_at > 0,
            STUDIES.c.ended_at < now - _DAY_S * checkpoints_days,
            TRIALS.c.state.in_(FINAL_STATES),
            # a trial that took its result from another one shows that one's folder, which is not
            # its own to delete
            TRIALS.c.cached_from == "",
        )
    )
    if trial:
        query = query.where(TRIALS.c.id == trial)
    removals = []
    for row in transaction.execute(query):
        try:
            size = TrialFolder(row.folder).bytes_below(CHECKPOINT_FOLDER)
        except (OSError, TrialFileError) as error:
            _stays(row.id, error)
            continue
        if size:
            folder = uri_join(row.folder, CHECKPOINT_FOLDER)
            removals.append(Removal(row.study, row.id, folder, size))
    return sorted(removals, key=lambda removal: (-removal.bytes, removal.trial))


def apply_retention(
    ledger: Ledger, removals: Sequence[Removal], now: float, checkpoints_days: float
) -> int:
    """Deletes what a plan lists; the bytes that are free now."""
    freed = 0
    for removal in removals:
        # a person may have retried the trial since the plan was made: then it needs its checkpoints
        with ledger.reading() as transaction:
            still = plan_retention(transaction, now, checkpoints_days, removal.trial)
        if still:
            try:
                TrialFolder(split(removal.folder)[0]).delete(CHECKPOINT_FOLDER)
            except (OSError, TrialFileError) as error:
                _stays(removal.trial, error)
                continue
            text = f"{removal.bytes} bytes, of a study that ended {checkpoints_days:g} days ago"
            with ledger.writing() as transaction:
                study, trial = removal.study, removal.trial
                record(transaction, "checkpoints-removed", text, study=study, trial=trial, at=now)
            freed += removal.bytes
    return freed


def _stays(trial: str, error: OSError | TrialFileError) -> None:
    """Of one trial's folder: the others must not wait for it."""
    LOG.warning("trial %s: %s; its checkpoints stay", trial, one_line(error))

"""What may be deleted: checkpoints of studies that are over, and what no study has any more.

`plan_retention` says what a policy would delete, and deletes nothing. `apply_retention` deletes it.
`keep_storage_small` is the policy of a service, which runs by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from contract.attempt import CHECKPOINT_FOLDER
from contract.files import Files, split, uri_join
from contract.study import FINAL_STATES
from contract.words import one_line
from orchestrator.ledger.events import STUDY_FORGOTTEN, record
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import EVENTS, STUDIES, TRIALS
from orchestrator.settings import (
    ServiceSettings,
    code_files,
    code_name,
    service_files,
    storage_root,
)
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
            _stays(f"checkpoints of trial {row.id}", error)
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
                _stays(f"checkpoints of trial {removal.trial}", error)
                continue
            text = f"{removal.bytes} bytes, of a study that ended {checkpoints_days:g} days ago"
            with ledger.writing() as transaction:
                study, trial = removal.study, removal.trial
                record(transaction, "checkpoints-removed", text, study=study, trial=trial, at=now)
            freed += removal.bytes
    return freed


def _stays(what: str, error: OSError | TrialFileError) -> None:
    """One folder has its own trouble: the others must not wait for it."""
    LOG.warning("%s stay: %s", what, one_line(error))


def plan_forgotten(
    transaction: Transaction, storage: str, before: float = math.inf
) -> list[Removal]:
    """Folders below `storage` of studies that were forgotten before then, largest first."""
    removals = []
    for study in _forgotten(transaction, before) & set(service_files(storage).names()):
        try:
            size = TrialFolder(storage).bytes_below(study)
        except (OSError, TrialFileError) as error:
            _stays(f"files of study {study}", error)
            continue
        removals.append(Removal(study, "", uri_join(storage, study), size))
    return sorted(removals, key=lambda removal: (-removal.bytes, removal.study))


def apply_forgotten(ledger: Ledger, removals: Sequence[Removal], now: float) -> int:
    """Deletes what a plan lists; the bytes that are free now."""
    freed = 0
    for removal in removals:
        with ledger.reading() as transaction:
            still = removal.study in _forgotten(transaction, math.inf)
        if still:
            try:
                TrialFolder(split(removal.folder)[0]).delete(removal.study)
            except (OSError, TrialFileError) as error:
                _stays(f"files of study {removal.study}", error)
                continue
            text = f"{removal.bytes} bytes, of a study that was forgotten"
            with ledger.writing() as transaction:
                record(transaction, "folder-removed", text, study=removal.study, at=now)
            freed += removal.bytes
    return freed


def _forgotten(transaction: Transaction, before: float) -> set[str]:
    """Studies that somebody has forgotten, unless another study has a result of theirs.

    Only those: another service may keep its studies below the same storage, and of a folder that
    the ledger knew before a restore nobody has said that it may go.
    """
    events = select(EVENTS.c.study).where(EVENTS.c.kind == STUDY_FORGOTTEN)
    if before < math.inf:
        events = events.where(EVENTS.c.at < before)
    forgotten = set(transaction.execute(events).scalars())
    forgotten -= set(transaction.execute(select(STUDIES.c.id)).scalars())
    borrowed = transaction.execute(
        select(TRIALS.c.cached_from).where(TRIALS.c.cached_from != "").distinct()
    )
    return forgotten - {trial.rpartition("-")[0] for trial in borrowed.scalars()}


def keep_storage_small(ledger: Ledger, settings: ServiceSettings, now: float) -> int:
    """Deletes what `settings.keep` lets go; the bytes that are free now."""
    keep, freed = settings.keep, 0
    if keep.checkpoints_days:
        with ledger.reading() as transaction:
            removals = plan_retention(transaction, now, keep.checkpoints_days)
        freed += apply_retention(ledger, removals, now, keep.checkpoints_days)
    if keep.code_days:
        freed += _remove_code(ledger, code_files(settings), now, keep.code_days)
    if keep.forgotten_days:
        before = now - _DAY_S * keep.forgotten_days
        with ledger.reading() as transaction:
            removals = plan_forgotten(transaction, storage_root(settings), before)
        freed += apply_forgotten(ledger, removals, now)
    return freed


def _remove_code(ledger: Ledger, packages: Files, now: float, days: float) -> int:
    """Packages of sources that no study of the ledger has."""
    freed = 0
    old = {name for name, at in packages.changed_at().items() if at < now - _DAY_S * days}
    with ledger.reading() as transaction:
        codes = transaction.execute(select(STUDIES.c.code).distinct()).scalars()
        used = {code_name(code) for code in codes}
    for name in sorted(old - used):
        size = packages.size(name) or 0
        packages.delete(name)
        text = f"{name}: {size} bytes, {days:g} days old, of no study"
        with ledger.writing() as transaction:
            record(transaction, "code-removed", text, study="", at=now)
        freed += size
    return freed

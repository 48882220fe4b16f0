"""Mends what no change of ours leaves behind: a restored ledger, or an older one, may have it.

Each rule names rows that contradict each other, and changes them again under the study's lock.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, exists, select, update

from contract.attempt import LIVE_ATTEMPTS
from contract.study import FINAL_STATES, LIVE_TRIALS
from orchestrator.ledger import queries
from orchestrator.ledger.changes import end_study_if_over, move_trials
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.rows import OPEN_STUDY
from orchestrator.ledger.tables import ATTEMPTS, STUDIES, TRIALS

_KIND = "mended"  # of the events
_LIVE = TRIALS.c.state.in_(LIVE_TRIALS)
_HAS_ATTEMPT = exists().where(ATTEMPTS.c.trial == TRIALS.c.id, ATTEMPTS.c.state.in_(LIVE_ATTEMPTS))
_IN_A_STUDY_THAT_IS_OVER = TRIALS.c.study.in_(
    select(STUDIES.c.id).where(STUDIES.c.state.in_(FINAL_STATES))
)


def mend(ledger: Ledger, now: float) -> int:
    """How many studies it mended. An event of each trial says what was changed."""
    with ledger.reading() as transaction:
        studies = _inconsistent(transaction)
    mended = 0
    for study in studies:
        with ledger.writing() as transaction:
            queries.lock_study(transaction, study)
            mended += _mend(transaction, study, now)
    return mended


def _inconsistent(transaction: Transaction) -> list[str]:
    unfinished = exists().where(TRIALS.c.study == STUDIES.c.id, TRIALS.c.state.not_in(FINAL_STATES))
    over = select(STUDIES.c.id).where(STUDIES.c.state.in_(OPEN_STUDY), ~unfinished)
    odd = (_IN_A_STUDY_THAT_IS_OVER & TRIALS.c.state.not_in(FINAL_STATES) & _not_ending()) | (
        _LIVE & ~_HAS_ATTEMPT
    )
    trials = select(TRIALS.c.study).where(odd)
    orphans = (
        select(TRIALS.c.study)
        .join(ATTEMPTS, ATTEMPTS.c.trial == TRIALS.c.id)
        .where(ATTEMPTS.c.state.in_(LIVE_ATTEMPTS), TRIALS.c.state.not_in(LIVE_TRIALS))
    )
    return sorted(
        {study for query in (over, trials, orphans) for study in _ids(transaction, query)}
    )


def _mend(transaction: Transaction, study: str, now: float) -> bool:
    of_study = TRIALS.c.study == study
    # An attempt of a trial that is not live: Ray's job, if there is one, is ended as an orphan.
    ended = transaction.execute(
        update(ATTEMPTS)
        .where(
            ATTEMPTS.c.trial.in_(select(TRIALS.c.id).where(of_study, ~_LIVE)),
            ATTEMPTS.c.state.in_(LIVE_ATTEMPTS),
        )
        .values(state="lost", cause="its trial was not live", ended_at=now)
    ).rowcount
    lost = of_study & _LIVE & ~_HAS_ATTEMPT
    changed = move_trials(
        transaction,
        lost & (TRIALS.c.wish == "cancel"),
        (_KIND, "was being cancelled and had no attempt any more: cancelled"),
        now,
        state="cancelled",
    )
    changed += move_trials(
        transaction,
        lost,
        (_KIND, "was live and had no attempt any more: waits again"),
        now,
        state="queued",
        wish="",
    )
    changed += move_trials(
        transaction,
        of_study & _IN_A_STUDY_THAT_IS_OVER & TRIALS.c.state.in_(("held", "queued")),
        (_KIND, "waited in a study that is over: cancelled"),
        now,
        state="cancelled",
    )
    changed += move_trials(
        transaction,
        of_study & _IN_A_STUDY_THAT_IS_OVER & _LIVE & _not_ending(),
        (_KIND, "ran in a study that is over: stopped"),
        now,
        state="stopping",
        wish="cancel",
    )
    over = end_study_if_over(transaction, study, now)
    return bool(ended or changed or over)


def _not_ending() -> ColumnElement[bool]:
    return (TRIALS.c.state != "stopping") | (TRIALS.c.wish != "cancel")


def _ids(transaction: Transaction, query: Select[str]) -> list[str]:
    return list(transaction.execute(query).scalars())

"""What is read from the ledger.

Each function runs in the caller's transaction and returns frozen records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Table, func, or_, select

from contract.attempt import LIVE_ATTEMPTS, AttemptState
from contract.study import FINAL_STATES, LIVE_TRIALS, TrialPlan, TrialState
from orchestrator.ledger.events import COPY_REMOVED
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import (
    OPEN_STUDY,
    AttemptRow,
    EventRow,
    Json,
    LiveAttempt,
    QueuedTrial,
    StudyBrief,
    StudyRow,
    TrialBrief,
    TrialRow,
)
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, STUDIES, TRIALS

AnyRow = TypeVar("AnyRow")


def _columns(table: Table, record: type) -> list[ColumnElement[Any]]:
    """The table's columns in the order of the record's fields, for `record(*row)`."""
    return [table.c[field.name.removesuffix("_json")] for field in fields(record)]


def _rows(
    transaction: Transaction, record: Callable[..., AnyRow], query: Select[*tuple[Any, ...]]
) -> list[AnyRow]:
    # all at once: one by one, the driver is asked ten thousand times
    return [record(*row) for row in transaction.execute(query).all()]


# --- studies -------------------------------------------------------------------------------------


def study_row(transaction: Transaction, study: str) -> StudyRow | None:
    return next(iter(studies(transaction, study)), None)


def lock_study(transaction: Transaction, study: str) -> StudyRow | None:
    """The study; nobody else changes it or the states of its trials until the transaction ends.

    SQLite has one writer anyway. Whoever locks a study locks it before any of its trials.
    """
    query = select(*_columns(STUDIES, StudyRow)).where(STUDIES.c.id == study)
    return next(iter(_rows(transaction, StudyRow, query.with_for_update())), None)


def studies(transaction: Transaction, study: str = "") -> list[StudyRow]:
    """All studies, oldest first, or the one that is named."""
    return _studies(transaction, *([STUDIES.c.id == study] if study else []))


def _studies(transaction: Transaction, *conditions: ColumnElement[bool]) -> list[StudyRow]:
    query = select(*_columns(STUDIES, StudyRow)).where(*conditions)
    return _rows(transaction, StudyRow, query.order_by(STUDIES.c.created_at, STUDIES.c.id))


def study_of_key(transaction: Transaction, owner: str, key: str) -> StudyRow | None:
    """The study that this owner submitted with this idempotency key."""
    known = (STUDIES.c.owner == owner, STUDIES.c.idempotency_key == key)
    return next(iter(_studies(transaction, *known)), None) if key else None


def studies_without_parent(transaction: Transaction, ended_after: float) -> list[StudyRow]:
    """Studies that have no parent run in MLflow yet, and are not over or ended after that time."""
    recent = STUDIES.c.state.in_(OPEN_STUDY) | (STUDIES.c.ended_at > ended_after)
    return _studies(transaction, STUDIES.c.mlflow_run_id == "", recent)


def unclosed_studies(transaction: Transaction) -> list[StudyRow]:
    """Studies that are over and whose parent run is still open."""
    return _studies(
        transaction,
        STUDIES.c.mlflow_closed.is_(False),
        STUDIES.c.mlflow_run_id != "",
        STUDIES.c.state.in_(FINAL_STATES),
    )


def reported_studies(
    transaction: Transaction, ended_after: float, unsent: Collection[str]
) -> list[StudyRow]:
    """Studies whose report may change: those that are not over, or ended after that time.

    And those of `unsent` that have a run, which may get it still.
    """
    recent = STUDIES.c.state.in_(OPEN_STUDY) | (STUDIES.c.ended_at > ended_after)
    return _studies(
        transaction, recent | (STUDIES.c.id.in_(unsent) & (STUDIES.c.mlflow_run_id != ""))
    )


def unannounced_studies(transaction: Transaction) -> list[StudyRow]:
    """Studies that are over and of whose end the webhook has not heard."""
    over = STUDIES.c.state.in_(FINAL_STATES)
    return _studies(transaction, STUDIES.c.webhook_sent.is_(False), over)


def studies_to_look_at(transaction: Transaction) -> list[str]:
    """Studies of which seeds wait for a look, and those that are over and not judged yet."""
    held = STUDIES.c.id.in_(select(TRIALS.c.study).where(TRIALS.c.state == "held"))
    over = STUDIES.c.judged.is_(False) & STUDIES.c.state.in_(FINAL_STATES)
    query = select(STUDIES.c.id).where(or_(held & STUDIES.c.state.in_(OPEN_STUDY), over))
    return list(transaction.execute(query.order_by(STUDIES.c.created_at)).scalars())


def verdicts_on(transaction: Transaction, identities: Sequence[str]) -> list[Json]:
    """The verdicts that rest on trials of these identities alone, or would with more seeds.

    Each is there once, though a study keeps those of earlier ones.
    """
    known = set(identities)
    studies: set[str] = set()
    for start in range(0, len(identities), 500):
        query = select(TRIALS.c.study).where(TRIALS.c.identity.in_(identities[start : start + 500]))
        studies.update(transaction.execute(query.distinct()).scalars())
    query = (
        select(STUDIES.c.verdicts).where(STUDIES.c.id.in_(studies)).order_by(STUDIES.c.created_at)
    )
    verdicts: list[Json] = []
    for kept in transaction.execute(query).scalars():
        for verdict in kept:
            shared = all(not known.isdisjoint(ids) for ids in verdict["trials"].values())
            if shared and verdict not in verdicts:
                verdicts.append(verdict)
    return verdicts


def open_studies(transaction: Transaction) -> dict[str, StudyBrief]:
    """Studies that are active or paused by their id, oldest first."""
    return _briefs(transaction, STUDIES.c.state.in_(OPEN_STUDY))


def _briefs(transaction: Transaction, condition: ColumnElement[bool]) -> dict[str, StudyBrief]:
    query = select(*_columns(STUDIES, StudyBrief)).where(condition)
    ordered = query.order_by(STUDIES.c.created_at, STUDIES.c.id)
    return {study.id: study for study in _rows(transaction, StudyBrief, ordered)}


# --- trials --------------------------------------------------------------------------------------


def trial_row(transaction: Transaction, trial: str) -> TrialRow | None:
    query = select(*_columns(TRIALS, TrialRow)).where(TRIALS.c.id == trial)
    return next(iter(_rows(transaction, TrialRow, query)), None)


def trials(transaction: Transaction, study: str = "") -> list[TrialBrief]:
    """The trials of all studies or of one, in the order of each study's table."""
    query = select(*_columns(TRIALS, TrialBrief)).order_by(TRIALS.c.study, TRIALS.c.position)
    if study:
        query = query.where(TRIALS.c.study == study)
    return _rows(transaction, TrialBrief, query)


def trial_names(transaction: Transaction, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Study and key of the trials that there are, by id."""
    names: dict[str, tuple[str, str]] = {}
    for start in range(0, len(ids), 500):  # SQLite's limit of parameters
        query = select(TRIALS.c.id, TRIALS.c.study, TRIALS.c.key)
        rows = transaction.execute(query.where(TRIALS.c.id.in_(ids[start : start + 500])))
        names |= {row.id: (row.study, row.key) for row in rows}
    return names


def borrowers(transaction: Transaction, study: str) -> list[str]:
    """The trials of other studies that took their result from this one's, as STUDY:KEY."""
    own = select(TRIALS.c.id).where(TRIALS.c.study == study)
    query = select(TRIALS.c.study, TRIALS.c.key).where(
        TRIALS.c.cached_from.in_(own), TRIALS.c.study != study
    )
    rows = transaction.execute(query.order_by(TRIALS.c.study, TRIALS.c.position))
    return [f"{row.study}:{row.key}" for row in rows]


def trial_plans(transaction: Transaction, study: str) -> list[TrialPlan]:
    """The study's trials as they were submitted, in their order."""
    names = list(TrialPlan.model_fields)
    query = select(*(TRIALS.c[name] for name in names)).where(TRIALS.c.study == study)
    rows = transaction.execute(query.order_by(TRIALS.c.position))
    return [TrialPlan.model_validate(dict(zip(names, row, strict=True))) for row in rows]


def identities(transaction: Transaction, study: str) -> dict[str, str]:
    """The identity of each of the study's trials by its key."""
    query = select(TRIALS.c.key, TRIALS.c.identity).where(TRIALS.c.study == study)
    return {row.key: row.identity for row in transaction.execute(query)}


def trial_counts(transaction: Transaction, study: str = "") -> dict[str, dict[TrialState, int]]:
    """By study, how many of its trials are in each state; of all studies or of one."""
    query = select(TRIALS.c.study, TRIALS.c.state, func.count())
    if study:
        query = query.where(TRIALS.c.study == study)
    counts: dict[str, dict[TrialState, int]] = defaultdict(dict)
    for of, state, count in transaction.execute(query.group_by(TRIALS.c.study, TRIALS.c.state)):
        counts[of][state] = count
    return counts


def owners(transaction: Transaction, trials: Collection[str]) -> dict[str, str]:
    """Who submitted each of the trials; the ledger has forgotten those that are not in it."""
    names: dict[str, str] = {}
    listed = sorted(trials)
    for start in range(0, len(listed), 500):
        query = select(TRIALS.c.id, STUDIES.c.owner).join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        part = query.where(TRIALS.c.id.in_(listed[start : start + 500]))
        names |= {row.id: row.owner for row in transaction.execute(part)}
    return names


def waiting_trials(transaction: Transaction) -> list[QueuedTrial]:
    """Queued trials of active studies, in the order of their studies and tables."""
    active = _briefs(transaction, STUDIES.c.state == "active")
    return _queued_trials(transaction, active, ["queued"])


def unfinished_trials(transaction: Transaction) -> list[QueuedTrial]:
    """Queued and live trials of studies that are active or paused, in the same order."""
    return _queued_trials(transaction, open_studies(transaction), ["queued", *LIVE_TRIALS])


def _queued_trials(
    transaction: Transaction, studies: dict[str, StudyBrief], states: Sequence[TrialState]
) -> list[QueuedTrial]:
    # The studies are read once, not with every trial: ten thousand trials share a few
    # specifications.
    order = {study: index for index, study in enumerate(studies)}
    query = select(*_columns(TRIALS, QueuedTrial)).where(TRIALS.c.state.in_(states))
    rows = transaction.execute(query).all()
    trials = [QueuedTrial(studies[row[0]], *row[1:]) for row in rows if row[0] in studies]
    return sorted(trials, key=lambda trial: (order[trial.study.id], trial.position))


def unclosed_trials(transaction: Transaction) -> list[tuple[TrialBrief, StudyBrief]]:
    """Trials that are over and of which MLflow has not heard that, each with its study."""
    over = TRIALS.c.mlflow_closed.is_(False), TRIALS.c.state.in_(FINAL_STATES)
    query = select(*_columns(TRIALS, TrialBrief)).where(*over)
    studies = _briefs(transaction, STUDIES.c.id.in_(select(TRIALS.c.study).where(*over)))
    return [(trial, studies[trial.study]) for trial in _rows(transaction, TrialBrief, query)]


def trials_with_copies(transaction: Transaction, ended_before: float) -> list[TrialBrief]:
    """Trials of studies that ended before then, whose own run has all that it gets.

    An event tells of each whose copies are gone; a trial that was tried again has new ones.
    """
    told = (
        select(EVENTS.c.id)
        .where(EVENTS.c.trial == TRIALS.c.id, EVENTS.c.kind == COPY_REMOVED)
        .where(EVENTS.c.at >= STUDIES.c.ended_at)
    )
    query = (
        select(*_columns(TRIALS, TrialBrief))
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(STUDIES.c.state.in_(FINAL_STATES), STUDIES.c.ended_at < ended_before)
        .where(TRIALS.c.cached_from == "", TRIALS.c.mlflow_run_id != "")
        # what is still to be sent may hold the copy
        .where(TRIALS.c.mlflow_closed, ~told.exists())
    )
    return _rows(transaction, TrialBrief, query)


def anything_to_do(transaction: Transaction) -> bool:
    """Whether a trial is live, or waits, be it for a look, in a study that is active."""
    waits = TRIALS.c.state.in_(["held", "queued"]) & (STUDIES.c.state == "active")
    query = (
        select(TRIALS.c.id)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(or_(TRIALS.c.state.in_(LIVE_TRIALS), waits))
        .limit(1)
    )
    return transaction.execute(query).first() is not None


# --- attempts and events -------------------------------------------------------------------------


def attempt_row(transaction: Transaction, trial: str, number: int) -> AttemptRow | None:
    query = select(*_columns(ATTEMPTS, AttemptRow))
    query = query.where(ATTEMPTS.c.trial == trial, ATTEMPTS.c.number == number)
    return next(iter(_rows(transaction, AttemptRow, query)), None)


def attempts_of(transaction: Transaction, study: str) -> dict[str, list[AttemptRow]]:
    """All attempts of a study by their trial, first ones first."""
    query = (
        select(*_columns(ATTEMPTS, AttemptRow))
        .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
        .where(TRIALS.c.study == study)
        .order_by(ATTEMPTS.c.trial, ATTEMPTS.c.number)
    )
    attempts: dict[str, list[AttemptRow]] = defaultdict(list)
    for attempt in _rows(transaction, AttemptRow, query):
        attempts[attempt.trial].append(attempt)
    return attempts


def attempt_state(transaction: Transaction, submission_id: str) -> AttemptState | None:
    """The state of the attempt with this job; None if the ledger knows no such job."""
    query = select(ATTEMPTS.c.state).where(ATTEMPTS.c.submission_id == submission_id)
    state: AttemptState | None = transaction.execute(query).scalar()
    return state


def live_attempts(transaction: Transaction) -> list[LiveAttempt]:
    """Attempts that Ray may be working on, oldest first."""
    of_attempt, of_trial = _columns(ATTEMPTS, AttemptRow), _columns(TRIALS, TrialBrief)
    live = ATTEMPTS.c.state.in_(LIVE_ATTEMPTS)
    query = (
        select(*of_attempt, *of_trial)
        .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
        .where(live)
        .order_by(ATTEMPTS.c.started_at, ATTEMPTS.c.trial)
    )
    # by their attempts and not by their state: one odd row must not stop the loop for all
    with_live = select(TRIALS.c.study).join(ATTEMPTS, ATTEMPTS.c.trial == TRIALS.c.id).where(live)
    studies = _briefs(transaction, STUDIES.c.id.in_(with_live))
    pairs = [
        (AttemptRow(*row[: len(of_attempt)]), TrialBrief(*row[len(of_attempt) :]))
        for row in transaction.execute(query)
    ]
    return [LiveAttempt(attempt, trial, studies[trial.study]) for attempt, trial in pairs]


def longest_run_s(transaction: Transaction, study: str) -> float | None:
    """Seconds of the study's longest attempt that brought a result; None before the first one."""
    query = (
        select(func.max(ATTEMPTS.c.ended_at - ATTEMPTS.c.started_at))
        .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
        .where(TRIALS.c.study == study, ATTEMPTS.c.state == "done")
    )
    seconds: float | None = transaction.execute(query).scalar()
    return seconds


def rank_seconds(transaction: Transaction, study: str) -> float:
    """Seconds of all ended attempts of the study, over all their ranks."""
    query = select(TRIALS.c.rank_seconds).where(TRIALS.c.study == study)
    return float(sum(transaction.execute(query).scalars()))


def gpu_hours_by_owner(transaction: Transaction) -> dict[str, float]:
    """GPU-hours of all ended attempts, by the owner of their study."""
    seconds = func.sum(TRIALS.c.rank_seconds)
    query = (
        select(STUDIES.c.owner, STUDIES.c.spec, seconds)
        .join(TRIALS, TRIALS.c.study == STUDIES.c.id)
        .group_by(STUDIES.c.id)
    )
    hours: dict[str, float] = defaultdict(float)
    for owner, spec, total in transaction.execute(query):
        hours[owner] += float(spec.get("resources", {}).get("gpus_per_rank", 0)) * total / 3600
    return hours


def events_after(
    transaction: Transaction, after: int, study: str = "", limit: int = 500
) -> list[EventRow]:
    """Events with a number above `after`, oldest first; of one study if it is named."""
    query = select(*_columns(EVENTS, EventRow)).where(EVENTS.c.id > after)
    if study:
        query = query.where(EVENTS.c.study == study)
    return _rows(transaction, EventRow, query.order_by(EVENTS.c.id).limit(limit))

"""The ledger's rows as the records that the service answers with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from contract.answers import (
    AttemptView,
    EventView,
    LookTaken,
    QueueEntry,
    QueueView,
    Standing,
    StudyView,
    TrialView,
)
from contract.attempt import Event, Wish
from contract.study import FINAL_STATES, LIVE_TRIALS, Study, Submission, TrialState
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import AttemptRow, QueuedTrial, StudyRow, TrialBrief
from orchestrator.schedule.decide import Wait
from orchestrator.schedule.gang import needs
from orchestrator.schedule.run_spec import gang_of

_TRIAL = re.compile(r"\btrial ([A-Za-z0-9._-]+-\d{3,})")  # an id, in words of the queue
_PAUSED = "its study is paused"
_STOPPING: Mapping[Wish, str] = {
    "cancel": "is being cancelled",
    "pause": "is being paused",
    "stall": "hangs, is being stopped",
}


def study_views(
    transaction: Transaction, waits: Mapping[str, Wait], study: str = "", with_trials: bool = True
) -> list[StudyView]:
    """All studies, newest last, or the one that is named. Attempts only of the latter's trials."""
    # The attempts of ten thousand trials would be most of an answer that lists them all.
    attempts = queries.attempts_of(transaction, study) if study else {}
    counts = queries.trial_counts(transaction, study)
    trials: dict[str, list[TrialBrief]] = {}
    every = queries.trials(transaction, study) if with_trials else []
    for trial in every:
        trials.setdefault(trial.study, []).append(trial)
    waits = {trial.id: waits[trial.id] for trial in every if trial.id in waits}
    waits = _with_names(transaction, waits)
    cached = [trial.cached_from for trial in every if trial.cached_from]
    sources = queries.trial_names(transaction, cached)
    owners = queries.owners(transaction, set(cached))
    return [
        StudyView(
            study=row.id,
            name=row.name,
            owner=row.owner,
            state=row.state,
            priority=row.priority,
            created_at=row.created_at,
            storage=row.storage,
            spec=row.spec_json,
            warnings=row.warnings,
            mlflow_experiment=row.mlflow_experiment,
            mlflow_run_id=row.mlflow_run_id,
            counts={str(state): count for state, count in counts.get(row.id, {}).items()},
            looks=[LookTaken.model_validate(look) for look in row.looks],
            # The difference of a contrast that is closed tells how the next look may go.
            verdicts=[Standing.model_validate(verdict) for verdict in row.verdicts]
            if row.state in FINAL_STATES
            else [],
            trials=[
                _trial_view(row, trial, waits, attempts.get(trial.id, []), sources, owners)
                for trial in trials.get(row.id, [])
            ],
        )
        for row in queries.studies(transaction, study)
    ]


def _with_names(transaction: Transaction, waits: Mapping[str, Wait]) -> dict[str, Wait]:
    """The same words with STUDY:KEY, which the tables show, in the place of trials' ids."""
    # Ten thousand trials share a few reasons.
    reasons = {wait.why for wait in waits.values()}
    ids = {found for why in reasons for found in _TRIAL.findall(why)}
    names = queries.trial_names(transaction, sorted(ids))

    def name(found: re.Match[str]) -> str:
        return f"trial {':'.join(names.get(found[1], (found[1],)))}"

    words = {why: _TRIAL.sub(name, why) for why in reasons}
    return {
        trial: Wait(wait.trial, wait.position, words[wait.why], wait.lacks)
        for trial, wait in waits.items()
    }


def _trial_view(
    study: StudyRow,
    trial: TrialBrief,
    waits: Mapping[str, Wait],
    attempts: Sequence[AttemptRow],
    sources: Mapping[str, tuple[str, str]],
    owners: Mapping[str, str],
) -> TrialView:
    progress = trial.progress
    # The ledger holds the progress of the attempt before until the ranks of a new one write theirs.
    if progress and trial.state in LIVE_TRIALS and progress.attempt != trial.attempts:
        progress = None
    return TrialView(
        trial=trial.id,
        key=trial.key,
        study=trial.study,
        arm=trial.arm,
        seed=trial.seed,
        baseline=trial.baseline,
        state=trial.state,
        attempts=trial.attempts,
        metrics=trial.metrics,
        error=trial.error,
        error_class=trial.error_class,
        why=_why(trial.state, trial.wish, study.state == "paused", waits.get(trial.id)),
        cached_from=trial.cached_from,
        cached_name=":".join(sources.get(trial.cached_from, (trial.cached_from,))),
        ran_by=owners.get(trial.cached_from, "") if trial.cached_from else study.owner,
        identity=trial.identity,
        storage=trial.folder,
        mlflow_run_id=trial.mlflow_run_id,
        progress=progress,
        events=[Event.model_validate(mark) for mark in trial.marks],
        attempt_list=[_attempt_view(attempt) for attempt in attempts],
    )


def _attempt_view(attempt: AttemptRow) -> AttemptView:
    return AttemptView(
        number=attempt.number,
        state=attempt.state,
        submission_id=attempt.submission_id,
        cause=attempt.cause,
        started_at=attempt.started_at,
        ended_at=attempt.ended_at,
        step=attempt.step,
    )


def _why(state: TrialState, wish: Wish, paused: bool, wait: Wait | None) -> str:
    """Why a trial waits or stops, or what MLflow lacks of one that is over, in words."""
    if state in FINAL_STATES:
        return wait.why if wait is not None else ""
    if state == "held":
        return "waits for a look at the seeds before it"
    if state != "queued":
        return _STOPPING.get(wish, wait.why if wait is not None else "")
    if paused:
        return _PAUSED
    return wait.why if wait is not None else "waits for the cluster"


def submission_of(transaction: Transaction, study: str) -> Submission | None:
    """The study as it was submitted. Raises ValueError if this version would refuse it.

    A field that this version does not know must not get lost on the way into another ledger.
    """
    row = queries.study_row(transaction, study)
    if row is None:
        return None
    return Submission(
        study=Study.model_validate(row.spec_json),
        study_yaml=row.study_yaml,
        trials=tuple(queries.trial_plans(transaction, study)),
        code=row.code,
        storage=row.storage,
        warnings=tuple(row.warnings),
        idempotency_key=row.idempotency_key or "",
        fresh=row.fresh,
    )


def queue(transaction: Transaction, waits: Mapping[str, Wait]) -> QueueView:
    """What runs, and what waits in the order in which it would start."""
    trials = queries.unfinished_trials(transaction)
    # once for each study, not for each of its thousand trials
    studies = {trial.study.id: trial.study for trial in trials}
    wants = {study.id: needs(gang_of(study.spec)) for study in studies.values()}
    waits = _with_names(transaction, waits)
    entries = [_entry(trial, wants[trial.study.id], waits) for trial in trials]
    waiting = [entry for entry in entries if entry.state == "queued"]
    # position 0 waits for something else than resources: such trials come last
    waiting.sort(key=lambda entry: (entry.position == 0, entry.position, -entry.priority))
    return QueueView(running=[entry for entry in entries if entry.state != "queued"], queue=waiting)


def _entry(trial: QueuedTrial, wants: str, waits: Mapping[str, Wait]) -> QueueEntry:
    study = trial.study
    paused = study.state == "paused"
    wait = waits.get(trial.id) if trial.state != "queued" or not paused else None
    return QueueEntry(
        trial=trial.id,
        key=trial.key,
        study=study.id,
        study_name=study.name,
        owner=study.owner,
        state=trial.state,
        priority=study.priority,
        position=wait.position if wait is not None and trial.state == "queued" else 0,
        needs=wants,
        why=_why(trial.state, trial.wish, paused, wait),
    )


def events(transaction: Transaction, after: int, study: str = "") -> list[EventView]:
    """The next events of all studies or of one, oldest first."""
    return [
        EventView(
            id=row.id,
            at=row.at,
            study=row.study,
            trial=row.trial,
            attempt=row.attempt,
            kind=row.kind,
            cause=row.cause,
        )
        for row in queries.events_after(transaction, after, study)
    ]

"""The ledger's rows as the records that the service answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select

from contract.answers import AttemptView, EventView, QueueEntry, StudyView, TrialView
from contract.study import Submission
from orchestrator.ledger import queries, store
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import ATTEMPTS, STUDIES, TRIALS
from orchestrator.schedule.decide import Wait
from orchestrator.schedule.gang import needs
from orchestrator.schedule.run_spec import gang_of

_HEAVY = ("run", "tags")
_PAUSED = "its study is paused"


def study_views(
    transaction: Transaction, waits: Mapping[str, Wait], study: str = "", with_trials: bool = True
) -> list[StudyView]:
    """All studies, newest last, or the one; without their trials' attempts unless it is the one."""
    query = select(STUDIES).order_by(STUDIES.c.created_at, STUDIES.c.id)
    columns = [column for column in TRIALS.c if column.name not in _HEAVY]
    trials = select(*columns).order_by(TRIALS.c.study, TRIALS.c.position)
    attempts: dict[str, list[AttemptView]] = {}
    if study:
        query = query.where(STUDIES.c.id == study)
        trials = trials.where(TRIALS.c.study == study)
        attempts = _attempts(transaction, study)
    counting = select(TRIALS.c.study, TRIALS.c.state, func.count()).group_by(
        TRIALS.c.study, TRIALS.c.state
    )
    counts: dict[str, dict[str, int]] = {}
    for of, state, count in transaction.execute(
        counting.where(TRIALS.c.study == study) if study else counting
    ):
        counts.setdefault(of, {})[state] = count
    by_study: dict[str, list[TrialView]] = {}
    for row in transaction.execute(trials).mappings() if with_trials else ():
        by_study.setdefault(row["study"], []).append(
            _trial_view(row, waits, attempts.get(row["id"], []))
        )
    return [
        StudyView(
            study=row["id"],
            name=row["name"],
            owner=row["owner"],
            state=row["state"],
            priority=row["priority"],
            created_at=row["created_at"],
            storage=row["storage"],
            spec=row["spec"],
            warnings=row["warnings"],
            mlflow_experiment=row["mlflow_experiment"],
            counts=counts.get(row["id"], {}),
            trials=_with_pause(row["state"], by_study.get(row["id"], [])),
        )
        for row in transaction.execute(query).mappings()
    ]


def _with_pause(state: str, trials: list[TrialView]) -> list[TrialView]:
    if state != "paused":
        return trials
    return [t.model_copy(update={"why": _PAUSED}) if t.state == "queued" else t for t in trials]


def _trial_view(
    row: store.Row, waits: Mapping[str, Wait], attempts: list[AttemptView]
) -> TrialView:
    wait = waits.get(row["id"])
    live = row["state"] in ("starting", "running", "stopping")
    return TrialView(
        trial=row["id"],
        key=row["key"],
        study=row["study"],
        arm=row["arm"],
        seed=row["seed"],
        baseline=row["baseline"],
        state=row["state"],
        attempts=row["attempts"],
        metrics=row["metrics"],
        error=row["error"],
        error_class=row["error_class"],
        why=_why(row, wait),
        cached_from=row["cached_from"],
        identity=row["identity"],
        storage=row["folder"],
        mlflow_run_id=row["mlflow_run_id"],
        progress=row["progress"]
        if not live or row["progress"].get("attempt") == row["attempts"]
        else {},
        events=row["marks"],
        attempt_list=attempts,
    )


def _why(row: store.Row, wait: Wait | None) -> str:
    if row["state"] == "queued":
        return wait.why if wait is not None else "waits for the cluster"
    return {
        "cancel": "is being cancelled",
        "pause": "is being paused",
        "stall": "hangs, is being stopped",
    }.get(row["wish"], "")


def _attempts(transaction: Transaction, study: str) -> dict[str, list[AttemptView]]:
    query = (
        select(ATTEMPTS)
        .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
        .where(TRIALS.c.study == study)
        .order_by(ATTEMPTS.c.trial, ATTEMPTS.c.number)
    )
    found: dict[str, list[AttemptView]] = {}
    for row in transaction.execute(query).mappings():
        fields = {name: row[name] for name in AttemptView.model_fields}
        found.setdefault(row["trial"], []).append(AttemptView(**fields))
    return found


def submission_of(transaction: Transaction, study: str) -> Submission | None:
    row = store.study_row(transaction, study)
    if row is None:
        return None
    query = select(TRIALS).where(TRIALS.c.study == study).order_by(TRIALS.c.position)
    names = ("key", "arm", "seed", "baseline", "identity", "run", "tags")
    return Submission.model_validate(
        {
            "study": row["spec"],
            "study_yaml": row["study_yaml"],
            "trials": [
                {name: trial[name] for name in names}
                for trial in transaction.execute(query).mappings()
            ],
            "code": row["code"],
            "storage": row["storage"],
            "warnings": row["warnings"],
            "idempotency_key": row["idempotency_key"] or "",
            "fresh": row["fresh"],
        }
    )


def queue(transaction: Transaction, waits: Mapping[str, Wait]) -> dict[str, Sequence[QueueEntry]]:
    """What runs, and what waits in the order in which it would start."""
    columns = (
        STUDIES.c.id,
        STUDIES.c.owner,
        STUDIES.c.name,
        STUDIES.c.priority,
        STUDIES.c.spec,
        STUDIES.c.state,
    )
    live = select(*columns).where(STUDIES.c.state.in_(("active", "paused")))
    ordered = live.order_by(STUDIES.c.created_at, STUDIES.c.id)
    studies = {
        row["id"]: (index, row) for index, row in enumerate(transaction.execute(ordered).mappings())
    }
    wants = {study: needs(gang_of(row["spec"])) for study, (_, row) in studies.items()}
    query = select(
        TRIALS.c.id, TRIALS.c.key, TRIALS.c.study, TRIALS.c.state, TRIALS.c.wish, TRIALS.c.position
    ).where(TRIALS.c.state.in_(("queued", "starting", "running", "stopping")))
    rows = [row for row in transaction.execute(query).mappings() if row["study"] in studies]
    rows.sort(key=lambda row: (studies[row["study"]][0], row["position"]))
    entries = [_entry(row, studies[row["study"]][1], wants[row["study"]], waits) for row in rows]
    waiting = [entry for entry in entries if entry.state == "queued"]
    return {
        "running": [entry for entry in entries if entry.state != "queued"],
        "queue": sorted(
            waiting, key=lambda entry: (entry.position == 0, entry.position, -entry.priority)
        ),
    }


def _entry(row: store.Row, study: store.Row, wants: str, waits: Mapping[str, Wait]) -> QueueEntry:
    wait = waits.get(row["id"]) if row["state"] == "queued" else None
    paused = row["state"] == "queued" and study["state"] == "paused"
    return QueueEntry(
        trial=row["id"],
        key=row["key"],
        study=row["study"],
        study_name=study["name"],
        owner=study["owner"],
        state=row["state"],
        priority=study["priority"],
        position=wait.position if wait is not None and not paused else 0,
        needs=wants,
        why=_PAUSED if paused else _why(row, wait),
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

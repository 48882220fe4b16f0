"""The ledger: what was asked for, what was tried, and what came of it. It, not Ray, is the truth.

Every change is one transaction, together with the event that records it. Changes of state name the state they start
from, so that two hands on one trial (a person's cancel, the reconcile loop) cannot both succeed.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import psutil
from sqlalchemy import RowMapping, func, insert, select, update

from contract.study import FINAL_STATES
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, LEASE, STUDIES, TRIALS

LEASE_S = 30.0
LIVE_ATTEMPTS = ("submitting", "submitted", "running")
Row: TypeAlias = RowMapping | Mapping[str, Any]


# --- lease ----------------------------------------------------------------------------------------------------------


def take_lease(ledger: Ledger, holder: str, now: float) -> None:
    """Makes `holder` the ledger's one service. Raises RuntimeError while another one lives.

    A holder that died on this host is known by its process; one elsewhere by its lease running out.
    """
    with ledger.writing() as transaction:
        row = transaction.execute(select(LEASE).with_for_update()).mappings().first()
        if (
            row is not None
            and row["holder"] != holder
            and row["expires_at"] > now
            and _may_live(row)
        ):
            raise RuntimeError(
                f"ledger: service {row['process']} on {row['host']} holds it for {row['expires_at'] - now:.0f} s more; "
                "end that service first, or wait if it is dead"
            )
        transaction.execute(LEASE.delete())
        values = {
            "holder": holder,
            "host": socket.gethostname(),
            "process": _process_name(os.getpid()),
        }
        transaction.execute(insert(LEASE).values(id=1, expires_at=now + LEASE_S, **values))


def renew_lease(ledger: Ledger, holder: str, now: float) -> bool:
    """False if another service took the ledger: this one must end without touching anything."""
    with ledger.writing() as transaction:
        changed = transaction.execute(
            update(LEASE).where(LEASE.c.holder == holder).values(expires_at=now + LEASE_S)
        ).rowcount
    return changed == 1


def drop_lease(ledger: Ledger, holder: str) -> None:
    with ledger.writing() as transaction:
        transaction.execute(LEASE.delete().where(LEASE.c.holder == holder))


def _may_live(row: Row) -> bool:
    if row["host"] != socket.gethostname():
        return True
    return _process_name(int(row["process"].split("@")[0])) == str(row["process"])


def _process_name(pid: int) -> str:
    """Empty for one that is dead, also while nobody has taken note of its end."""
    try:
        process = psutil.Process(pid)
        return (
            "" if process.status() == psutil.STATUS_ZOMBIE else f"{pid}@{process.create_time():.2f}"
        )
    except psutil.NoSuchProcess:
        return ""


# --- events ---------------------------------------------------------------------------------------------------------


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
    values = {"at": at or time.time(), "study": study, "trial": trial, "attempt": attempt}
    transaction.execute(insert(EVENTS).values(kind=kind, cause=cause[:2000], **values))


# --- studies and trials ---------------------------------------------------------------------------------------------


def new_study_id(name: str) -> str:
    return f"{name}-{secrets.token_hex(3)}"


def study_row(transaction: Transaction, study: str) -> Row | None:
    return transaction.execute(select(STUDIES).where(STUDIES.c.id == study)).mappings().first()


def trial_row(transaction: Transaction, trial: str) -> Row | None:
    return transaction.execute(select(TRIALS).where(TRIALS.c.id == trial)).mappings().first()


def finished_by_identity(transaction: Transaction, identities: Sequence[str]) -> dict[str, Row]:
    """The newest trial with a result of its own for each identity that has one."""
    found: dict[str, Row] = {}
    for start in range(0, len(identities), 500):
        part = identities[start : start + 500]
        query = (
            select(TRIALS)
            .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
            .where(
                TRIALS.c.identity.in_(part), TRIALS.c.state == "done", TRIALS.c.cached_from == ""
            )
            .order_by(STUDIES.c.created_at)
        )
        found.update({row["identity"]: row for row in transaction.execute(query).mappings()})
    return found


def cached_values(source: Row) -> dict[str, Any]:
    """What a trial takes over from a finished one with its identity."""
    taken = {name: source[name] for name in ("metrics", "folder", "mlflow_run_id", "marks")}
    return {**taken, "state": "done", "cached_from": source["id"], "mlflow_closed": True}


def move_trial(
    transaction: Transaction,
    trial: str,
    states: Sequence[str],
    values: Mapping[str, Any],
    attempt: int = 0,
    wish: str | None = None,
) -> bool:
    """Changes a trial that is in one of `states` (and at `attempt`, with `wish`, if given). False if it is not."""
    query = update(TRIALS).where(TRIALS.c.id == trial, TRIALS.c.state.in_(states))
    if attempt:
        query = query.where(TRIALS.c.attempts == attempt)
    if wish is not None:
        query = query.where(TRIALS.c.wish == wish)
    return transaction.execute(query.values(**values)).rowcount == 1


def start_attempt(
    ledger: Ledger, trial: str, now: float, cause: str, avoid: Sequence[str] = ()
) -> int:
    """The number of a new attempt of a queued trial, 0 if the trial is no longer queued or its study not active."""
    with ledger.writing() as transaction:
        row = trial_row(transaction, trial)
        study = study_row(transaction, row["study"]) if row is not None else None
        if row is None or study is None or study["state"] != "active":
            return 0
        number = row["attempts"] + 1
        values = {"state": "starting", "attempts": number, "moved_at": now}
        if not move_trial(transaction, trial, ["queued"], values, row["attempts"]):
            return 0
        submission = f"{trial}-{number}"
        transaction.execute(
            insert(ATTEMPTS).values(
                trial=trial,
                number=number,
                submission_id=submission,
                state="submitting",
                started_at=now,
                avoid=" ".join(avoid),
            )
        )
        record(
            transaction, "starting", cause, study=row["study"], trial=trial, attempt=number, at=now
        )
    return int(number)


def live_attempts(transaction: Transaction) -> list[Row]:
    """Attempts that Ray may be working on, with what is needed of their trials and studies."""
    query = (
        select(
            ATTEMPTS,
            TRIALS.c.study,
            TRIALS.c.key,
            TRIALS.c.folder,
            TRIALS.c.error,
            TRIALS.c.state.label("trial_state"),
            TRIALS.c.wish,
            TRIALS.c.failures,
            TRIALS.c.lost,
            TRIALS.c.best_step,
            TRIALS.c.moved_at,
            TRIALS.c.progress,
            STUDIES.c.spec,
            STUDIES.c.owner,
            STUDIES.c.state.label("study_state"),
        )
        .join(TRIALS, TRIALS.c.id == ATTEMPTS.c.trial)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(ATTEMPTS.c.state.in_(LIVE_ATTEMPTS))
        .order_by(ATTEMPTS.c.started_at, ATTEMPTS.c.trial)
    )
    return list(transaction.execute(query).mappings())


def waiting_trials(transaction: Transaction) -> list[dict[str, Any]]:
    """Queued trials of active studies, without their runs, each with its study's fields that admission looks at.

    The studies are read once, not with every trial: ten thousand trials share a few specs.
    """
    columns = (
        STUDIES.c.id, STUDIES.c.owner, STUDIES.c.priority, STUDIES.c.spec, STUDIES.c.code, STUDIES.c.fresh,
        STUDIES.c.created_at, STUDIES.c.mlflow_run_id,
    )  # fmt: skip
    query = (
        select(*columns)
        .where(STUDIES.c.state == "active")
        .order_by(STUDIES.c.created_at, STUDIES.c.id)
    )
    studies = {row["id"]: {**row} for row in transaction.execute(query).mappings()}
    order = {study: index for index, study in enumerate(studies)}
    for study in studies.values():
        del study["id"]
    light = (
        TRIALS.c.id, TRIALS.c.study, TRIALS.c.position, TRIALS.c.identity, TRIALS.c.queued_at, TRIALS.c.not_before,
        TRIALS.c.attempts, TRIALS.c.suspects,
    )  # fmt: skip
    queued = transaction.execute(select(*light).where(TRIALS.c.state == "queued")).mappings()
    rows = [{**row, **studies[row["study"]]} for row in queued if row["study"] in studies]
    return sorted(rows, key=lambda row: (order[row["study"]], row["position"]))


def waiting_for_nothing(transaction: Transaction) -> list[Row]:
    """Queued trials, not to be run anew, whose identity another trial has a result of its own for by now."""
    done = TRIALS.alias("done")
    results = select(done.c.identity).where(done.c.state == "done", done.c.cached_from == "")
    query = (
        select(TRIALS.c.id, TRIALS.c.study, TRIALS.c.identity)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(
            TRIALS.c.state == "queued",
            TRIALS.c.attempts == 0,
            STUDIES.c.state == "active",
            STUDIES.c.fresh.is_(False),
            TRIALS.c.identity.in_(results),
        )
        .order_by(STUDIES.c.created_at, TRIALS.c.study, TRIALS.c.position)
    )
    return list(transaction.execute(query).mappings())


def end_study_if_over(transaction: Transaction, study: str, now: float) -> str:
    """Gives a study its final state once all its trials have theirs. The state, or "" while it goes on."""
    query = (
        select(TRIALS.c.state, func.count()).where(TRIALS.c.study == study).group_by(TRIALS.c.state)
    )
    counts: dict[str, int] = dict(transaction.execute(query).all())
    if any(state not in FINAL_STATES for state in counts):
        return ""
    state = "failed" if counts.get("failed") else "cancelled" if counts.get("cancelled") else "done"
    changed = transaction.execute(
        update(STUDIES)
        .where(STUDIES.c.id == study, STUDIES.c.state.in_(("active", "paused")))
        .values(state=state, ended_at=now)
    ).rowcount
    if not changed:
        return ""
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    record(transaction, f"study-{state}", f"all trials ended: {summary}", study=study, at=now)
    return state

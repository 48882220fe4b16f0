"""Whose results and trainings a trial may take instead of running."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import select

from contract.study import FINAL_STATES, TrialPlan
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import Json
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.study.proof import PROOF_TAG

_PROOF = TRIALS.c.tags[PROOF_TAG].as_string()  # NULL without one


class Run(NamedTuple):
    """What a trial runs: as its client says, and as the service knows (empty where it does not)."""

    identity: str
    proof: str = ""


class Source(NamedTuple):
    """A trial with a result of its own: who ran it, and what others take over."""

    id: str
    ran_by: str
    folder: str
    metrics: dict[str, float]
    marks: list[Json]
    mlflow_run_id: str


class Finished(NamedTuple):
    """A trial that is over: its last attempt, and the step that it got to."""

    folder: str
    attempts: int
    step: int


class Twin(NamedTuple):
    """A queued trial that another one's result may spare."""

    trial: str
    study: str
    owner: str
    run: Run


def run_of(plan: TrialPlan) -> Run:
    return Run(plan.identity, plan.tags.get(PROOF_TAG, ""))


def finished_for(
    transaction: Transaction, owner: str, wanted: Collection[Run]
) -> dict[Run, Source]:
    """The newest trial with a result of its own that `owner` may take, for each run that has one.

    That is a trial of the owner's, or one of another owner with the same proof.
    """
    proofs: dict[str, set[str]] = defaultdict(set)
    for run in wanted:
        proofs[run.identity].add(run.proof)
    newest: dict[Run, Source] = {}
    identities = sorted(proofs)
    columns = [STUDIES.c.owner if name == "ran_by" else TRIALS.c[name] for name in Source._fields]
    # SQLite takes a limited number of parameters in one statement
    for start in range(0, len(identities), 500):
        part = identities[start : start + 500]
        query = (
            select(TRIALS.c.identity, _PROOF, *columns)
            .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
            .where(
                TRIALS.c.identity.in_(part), TRIALS.c.state == "done", TRIALS.c.cached_from == ""
            )
            .order_by(STUDIES.c.created_at)
        )
        # ordered by age: of two results of one run the later row takes the place of the earlier
        for identity, proof, *values in transaction.execute(query):
            source = Source(*values)
            for asked in proofs[identity]:
                if source.ran_by == owner or (proof and proof == asked):
                    newest[Run(identity, asked)] = source
    return newest


def finished_trainings(transaction: Transaction, owner: str, training: str) -> list[Finished]:
    """The owner's trials of this training that are over and took steps, the newest first. Another
    owner may lie in what its client computed.
    """
    query = (
        select(TRIALS.c.folder, TRIALS.c.attempts, TRIALS.c.best_step)
        .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
        .where(
            STUDIES.c.owner == owner,
            TRIALS.c.training == training,
            TRIALS.c.state.in_(FINAL_STATES),
            TRIALS.c.best_step > 0,
        )
    )
    rows = transaction.execute(query.order_by(TRIALS.c.queued_at.desc()))
    return [Finished(*row) for row in rows] if training else []


def twins_of_finished(transaction: Transaction) -> list[Twin]:
    """Queued trials whose identity another trial has a result for by now.

    A study that was submitted with `fresh` runs its trials anew, so they are not among them.
    """
    # A trial with attempts goes on from its own checkpoint, so it does not take another one's
    # result.
    done = TRIALS.alias("done")
    results = select(done.c.identity).where(done.c.state == "done", done.c.cached_from == "")
    query = (
        select(TRIALS.c.id, TRIALS.c.study, STUDIES.c.owner, TRIALS.c.identity, _PROOF)
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
    return [
        Twin(trial, study, owner, Run(identity, proof or ""))
        for trial, study, owner, identity, proof in transaction.execute(query)
    ]

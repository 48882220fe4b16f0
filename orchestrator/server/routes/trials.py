"""Trials: cancelling and retrying one, its logs, and which identities have a result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Query

from contract.answers import ChangedTrial, Finished, LogPage, TrialAction
from orchestrator.ledger import commands, queries, sharing
from orchestrator.ledger.opening import Transaction
from orchestrator.server.access import READ, HubOfApp, Id, Reader, Submitter, own_study
from orchestrator.server.errors import absent
from orchestrator.server.logs import read_log

router = APIRouter(prefix="/v1")

_ACTIONS: Mapping[TrialAction, Callable[[Transaction, str, str, float], bool]] = {
    "cancel": commands.cancel_trial,
    "retry": commands.retry_trial,
}


@router.post("/trials/{trial}/{action}")
def act_on_trial(trial: Id, action: TrialAction, hub: HubOfApp, user: Submitter) -> ChangedTrial:
    """Cancels or retries one trial of a study."""

    def act(transaction: Transaction) -> bool:
        row = queries.trial_row(transaction, trial)
        if row is None:
            raise absent("trial", trial)
        own_study(transaction, row.study, user)
        return _ACTIONS[action](transaction, trial, user.name, time.time())

    changed = hub.ledger.retried(act)
    hub.wake()  # a cancelled trial stops now, and not a turn later
    return ChangedTrial(trial=trial, action=action, changed=changed)


@router.get("/trials/{trial}/logs", dependencies=READ)
def logs(
    trial: Id,
    hub: HubOfApp,
    attempt: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
    rank: Annotated[int, Query(ge=-1, le=100_000)] = 0,
    offset: Annotated[int, Query(ge=0, le=1 << 50)] = 0,
) -> LogPage:
    """attempt: 0 is the newest. rank: -1 is the driver. offset: in bytes."""
    return read_log(hub.ledger, hub.driver_log, trial, attempt, rank, offset)


@router.get("/finished")
def finished(
    hub: HubOfApp, user: Reader, identity: Annotated[list[str], Query(max_length=1000)]
) -> Finished:
    """The user's own trials that have a result, by identity.

    Of another user's the service knows once a study is submitted: only then can it compare.
    """
    with hub.ledger.reading() as transaction:
        runs = [sharing.Run(name) for name in identity]
        sources = sharing.finished_for(transaction, user.name, runs)
    return Finished(finished={run.identity: source.id for run, source in sources.items()})

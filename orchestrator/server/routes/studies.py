"""Studies: submitting, looking, changing, forgetting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import JsonValue, ValidationError

from contract.answers import (
    Accepted,
    ChangedStudy,
    Forgotten,
    Priority,
    StudyAction,
    StudyList,
    StudyView,
    Submitted,
)
from contract.files import uri_join
from contract.study import Submission
from orchestrator.ledger import commands, queries
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import StudyRow
from orchestrator.ledger.users import User
from orchestrator.server import accept, views
from orchestrator.server.access import READ, HubOfApp, Id, Submitter, own_study
from orchestrator.server.errors import absent, explain
from orchestrator.server.hub import Hub
from orchestrator.server.routes.large import as_bytes
from orchestrator.server.uploads import MAX_SUBMISSION, body_of
from orchestrator.trial_folder import TrialFolder, Use

router = APIRouter(prefix="/v1/studies")

_ACTIONS: Mapping[StudyAction, Callable[[Transaction, str, str, float], bool]] = {
    "cancel": commands.cancel_study,
    "pause": commands.pause_study,
    "resume": commands.resume_study,
    "retry": commands.retry_study,
}
_COUNTED = 50_000  # files of a study whose sizes one request asks for
_LARGEST_SEED = 2**31  # the ledger keeps seeds in an SQL integer of 32 bits


@router.post("")
async def submit(request: Request, hub: HubOfApp, user: Submitter) -> Submitted:
    """Takes a study and queues its trials."""
    # The body is parsed in a worker thread: a large submission must not hold up other requests.
    body = await body_of(request, MAX_SUBMISSION)
    return await run_in_threadpool(_submit, hub, body, user)


@router.post("/check")
async def check(request: Request, hub: HubOfApp, user: Submitter) -> Accepted:
    """Refuses what a submission of this study would be refused for; keeps nothing."""
    body = await body_of(request, MAX_SUBMISSION)
    return await run_in_threadpool(_check, hub, body, user)


@router.get("", dependencies=READ, response_model=StudyList)
def studies(hub: HubOfApp, trials: bool = True) -> Response:
    """`trials=false` gives their counts by state alone, which stays quick with thousands."""
    with hub.ledger.reading() as transaction:
        every = views.study_views(transaction, hub.waits(), with_trials=trials)
    return as_bytes(StudyList(studies=every))


@router.get("/{study}", dependencies=READ, response_model=StudyView)
def study(study: Id, hub: HubOfApp) -> Response:
    return as_bytes(_view(hub, study))


@router.get("/{study}/submission", dependencies=READ)
def submission(study: Id, hub: HubOfApp) -> Submission:
    """The study as it was submitted: `maskray reproduce` sends a part of it again."""
    with hub.ledger.reading() as transaction:
        sent = views.submission_of(transaction, study)
    if sent is None:
        raise absent("study", study)
    return sent


# Before the route of `{action}`, which would otherwise take the word for an action.
@router.post("/{study}/priority")
def priority(study: Id, body: Priority, hub: HubOfApp, user: Submitter) -> StudyView:
    def act(transaction: Transaction) -> None:
        own_study(transaction, study, user)
        commands.set_priority(transaction, study, body.priority, user.name, time.time())

    hub.ledger.retried(act)
    hub.wake()
    return _view(hub, study)


@router.post("/{study}/{action}", response_model=ChangedStudy)
def act_on_study(study: Id, action: StudyAction, hub: HubOfApp, user: Submitter) -> Response:
    """The study after the action, and whether there was anything to change."""

    def act(transaction: Transaction) -> bool:
        own_study(transaction, study, user)
        return _ACTIONS[action](transaction, study, user.name, time.time())

    changed = hub.ledger.retried(act)
    hub.wake()
    return as_bytes(ChangedStudy(**dict(_view(hub, study)), changed=changed))


@router.get("/{study}/keeps", dependencies=READ)
def keeps(study: Id, hub: HubOfApp) -> Forgotten:
    """What forgetting the study would keep, and which trials of others borrow from it."""
    with hub.ledger.reading() as transaction:
        row = queries.study_row(transaction, study)
        if row is None:
            raise absent("study", study)
        borrowers = queries.borrowers(transaction, study)
    return _kept(row, _use_of(row), borrowers, forgotten=False)


@router.delete("/{study}")
def forget(study: Id, hub: HubOfApp, user: Submitter, files: bool = False) -> Forgotten:
    """Removes a study that is over from the ledger; with `files` its folder, too."""
    with hub.ledger.reading() as transaction:
        # Before the ledger changes: a folder of the study's trials may be one that nobody can walk.
        use = _use_of(own_study(transaction, study, user))
    with hub.ledger.writing() as transaction:
        row = own_study(transaction, study, user)
        borrowers = queries.borrowers(transaction, study)
        if files and borrowers:
            more = f" and {len(borrowers) - 1} more" if len(borrowers) > 1 else ""
            raise ValueError(
                f"study {study}: its files are the result of {borrowers[0]}{more}; forget those "
                "studies first, or leave out --files"
            )
        commands.forget_study(transaction, study, user.name, time.time())
    kept = _kept(row, use, borrowers, forgotten=True)
    if files:
        # After the ledger: a folder that cannot be deleted leaves no study without its files.
        TrialFolder(row.storage).delete(study)
    return kept.model_copy(update={"deleted": files})


def _use_of(row: StudyRow) -> Use:
    return TrialFolder(row.storage).use(row.id, _COUNTED)


def _kept(row: StudyRow, use: Use, borrowers: list[str], forgotten: bool) -> Forgotten:
    return Forgotten(
        study=row.id,
        forgotten=forgotten,
        folder=uri_join(row.storage, row.id),
        bytes=use.bytes,
        whole=use.whole,
        borrowers=borrowers,
    )


def _submit(hub: Hub, body: bytes, user: User) -> Submitted:
    sent = _parsed(body)
    runs = partial(accept.has_trials_to_run, hub.ledger, sent, user.name)
    accept.check(sent, hub.settings, hub.nodes(), runs)
    name, created = accept.accept(hub.ledger, hub.settings, sent, user.name, time.time())
    hub.wake()
    return Submitted(study=name, created=created, trials=len(sent.trials))


def _check(hub: Hub, body: bytes, user: User) -> Accepted:
    sent = _parsed(body)
    runs = partial(accept.has_trials_to_run, hub.ledger, sent, user.name)
    accept.check_plan(sent, hub.settings, hub.nodes(), runs)
    return Accepted(trials=len(sent.trials))


def _parsed(body: bytes) -> Submission:
    try:
        sent = Submission.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, explain(error.errors(include_url=False))) from None
    # PostgreSQL would refuse these with an error in the middle of the transaction.
    _refuse_what_sql_cannot_hold(sent)
    return sent


def _refuse_what_sql_cannot_hold(sent: Submission) -> None:
    if not all(math.isfinite(value) for trial in sent.trials for value in _floats(trial.run)):
        raise HTTPException(400, "submission: a number is not finite")
    if "\\u0000" in sent.model_dump_json():
        raise HTTPException(400, "submission: a text holds a NUL character")
    for trial in sent.trials:
        if not -_LARGEST_SEED <= trial.seed < _LARGEST_SEED:
            raise HTTPException(
                400,
                f"trial {trial.key}: its seed {trial.seed} is larger than {_LARGEST_SEED - 1}",
            )


def _floats(value: JsonValue) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _view(hub: Hub, study: str) -> StudyView:
    with hub.ledger.reading() as transaction:
        matches = views.study_views(transaction, hub.waits(), study)
    if not matches:
        raise absent("study", study)
    known = hub.experiment_id(matches[0].mlflow_experiment)
    return matches[0].model_copy(update={"mlflow_experiment_id": known})

"""From a submission to rows of the ledger: what the service refuses, and what it writes down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import insert, select

from contract.files import join
from contract.study import Submission
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import store
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.schedule.capacity import largest
from orchestrator.schedule.gang import Gang, fit, needs
from orchestrator.schedule.run_spec import gang_of
from orchestrator.settings import (
    ServiceSettings,
    code_files,
    code_name,
    has_credentials,
    storage_root,
)


def check(submission: Submission, settings: ServiceSettings, nodes: Sequence[Node]) -> None:
    """Raises ValueError, one line, for what this service will never run. `nodes` is empty while it is not known."""
    study = submission.study
    keys = [trial.key for trial in submission.trials]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"trials: key {twice!r} occurs twice; name each trial once")
    if study.gpu_hours and not study.resources.gpus_per_rank:
        raise ValueError(
            f"gpu_hours: a budget of {study.gpu_hours:g} has no effect, resources.gpus_per_rank is 0; remove one"
        )
    if submission.code and not code_files(settings).exists(code_name(submission.code)):
        raise ValueError(
            f"code: package {submission.code[:12]} was not uploaded; PUT it to /v1/code first"
        )
    gang = gang_of(study.model_dump())
    if (
        nodes
        and not settings.autoscale
        and fit(gang, {node.id: node.total for node in nodes}) is None
    ):
        raise ValueError(
            f"resources: a trial needs {needs(gang)}; {_shape(nodes, gang)}; ask for less"
        )
    if (
        settings.autoscale
        and settings.node_shapes
        and fit(gang, largest(settings.node_shapes)) is None
    ):
        grown = [Node(name, total, total) for name, total in largest(settings.node_shapes).items()]
        raise ValueError(
            f"resources: a trial needs {needs(gang)}; {_shape(grown, gang)} at its largest; ask for less"
        )
    _check_paths(submission, settings)


def _shape(nodes: Sequence[Node], gang: Gang) -> str:
    parts = [
        f"{sum(node.total.get(name, 0.0) for node in nodes):g} {name}{'s' if name in ('CPU', 'GPU') else ''}"
        for name in sorted(gang.per_rank, reverse=True)
    ]
    return f"the whole cluster holds {' and '.join(parts)} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _check_paths(submission: Submission, settings: ServiceSettings) -> None:
    named = [("storage", submission.storage)] if submission.storage else []
    for trial in submission.trials:
        named += [
            (f"trial {trial.key}, {path}", value) for path, value in _strings(trial.run, "run")
        ]
    check_uris(named, settings)


def check_uris(named: Iterable[tuple[str, str]], settings: ServiceSettings) -> None:
    """Raises ValueError if one holds credentials or, with roots configured, lies in none of them.

    named: where it was found and the text, which may also be something else than a path or URI.
    """
    for where, value in named:
        if "://" in value and has_credentials(value):
            raise ValueError(
                f"{where}: the URI holds credentials, which would be kept in the ledger and in MLflow; "
                "give them to the nodes' environment instead"
            )
        outside = "://" in value or value.startswith(("/", "~", "\\")) or ".." in Path(value).parts
        if settings.roots and outside and not any(_within(value, root) for root in settings.roots):
            raise ValueError(
                f"{where}: {value!r} is outside the service's roots ({', '.join(settings.roots)})"
            )


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}.{index}")


def _within(value: str, root: str) -> bool:
    value, root = (item.removeprefix("file://") for item in (value, root))
    if ("://" in value) != ("://" in root):
        return False
    if "://" in root:
        ours, theirs = urlsplit(root), urlsplit(value)
        path = os.path.normpath("/" + theirs.path.lstrip("/"))
        base = os.path.normpath("/" + ours.path.lstrip("/"))
        # the query too: it can name another endpoint, which would be sent the service's credentials
        same_place = (ours.scheme, ours.netloc, ours.query) == (
            theirs.scheme,
            theirs.netloc,
            theirs.query,
        )
        return same_place and "%" not in theirs.path and _below(path, base)
    if value.startswith("~"):
        return False
    return _below(os.path.realpath(value), os.path.realpath(root))


def _below(path: str, base: str) -> bool:
    return path == base or path.startswith(base.rstrip("/") + "/")


def accept(
    ledger: Ledger, settings: ServiceSettings, submission: Submission, owner: str, now: float
) -> tuple[str, bool]:
    """The study's id, and whether it is new: the same idempotency key of one owner is one study.

    Raises ValueError if the key was used for another study.
    """
    with ledger.writing() as transaction:
        known = _by_key(transaction, owner, submission.idempotency_key)
        if known:
            _check_same(transaction, known, submission)
            return known, False
        study = store.new_study_id(submission.study.name)
        base = submission.storage or storage_root(settings)
        if "://" not in base:
            base = str(Path(base).absolute())
        _insert(transaction, study, base, submission, owner, now)
        store.record(
            transaction,
            "submitted",
            f"{len(submission.trials)} trials, by {owner}",
            study=study,
            at=now,
        )
        finished = {}
        if not submission.fresh:
            finished = store.finished_by_identity(
                transaction, [trial.identity for trial in submission.trials]
            )
        rows = []
        for position, plan in enumerate(submission.trials):
            trial = f"{study}-{position:03d}"
            row = {
                "id": trial,
                "study": study,
                "position": position,
                **plan.model_dump(),
                "state": "queued",
                "queued_at": now,
                "metrics": {},
                "progress": {},
                "marks": [],
                "folder": join(base, study, trial),
                "cached_from": "",
                "mlflow_run_id": "",
                "mlflow_closed": False,
            }
            source = finished.get(plan.identity)
            if source is not None:
                row |= store.cached_values(source)
                text = f"taken from trial {source['id']}"
                store.record(transaction, "cached", text, study=study, trial=trial, at=now)
            rows.append(row)
        for start in range(0, len(rows), 500):
            transaction.execute(insert(TRIALS), rows[start : start + 500])
        store.end_study_if_over(transaction, study, now)
    return study, True


def _insert(
    transaction: Transaction, study: str, base: str, submission: Submission, owner: str, now: float
) -> None:
    transaction.execute(
        insert(STUDIES).values(
            id=study,
            name=submission.study.name,
            owner=owner,
            state="active",
            priority=submission.study.priority,
            created_at=now,
            storage=base,
            code=submission.code,
            spec=submission.study.model_dump(mode="json"),
            study_yaml=submission.study_yaml,
            warnings=list(submission.warnings),
            fresh=submission.fresh,
            idempotency_key=submission.idempotency_key or None,
        )
    )


def _check_same(transaction: Transaction, known: str, submission: Submission) -> None:
    query = select(TRIALS.c.key, TRIALS.c.identity).where(TRIALS.c.study == known)
    before = {row.key: row.identity for row in transaction.execute(query)}
    now = {trial.key: trial.identity for trial in submission.trials}
    spec, fresh = transaction.execute(
        select(STUDIES.c.spec, STUDIES.c.fresh).where(STUDIES.c.id == known)
    ).one()
    fields = submission.study.model_dump(mode="json")
    differs = [name for name, value in fields.items() if spec.get(name) != value]
    differs += ["fresh"] if fresh != submission.fresh else []
    if before != now:
        differs.append("its trials, their data or their code")
    if differs:
        raise ValueError(
            f"the key {submission.idempotency_key!r} was used for study {known}, which is another one "
            f"({', '.join(differs)}); give another key"
        )


def _by_key(transaction: Transaction, owner: str, key: str) -> str:
    if not key:
        return ""
    query = select(STUDIES.c.id).where(STUDIES.c.owner == owner, STUDIES.c.idempotency_key == key)
    return transaction.execute(query).scalar() or ""

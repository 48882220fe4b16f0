"""What the service refuses of a submission, and how a submission becomes a study of the ledger."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from contract.study import Study, Submission, check_gpus
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import changes, queries, sharing
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.rows import StudyRow
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
from orchestrator.study.proof import with_proofs


def check(
    submission: Submission,
    settings: ServiceSettings,
    nodes: Sequence[Node],
    runs: Callable[[], bool],
) -> None:
    """Raises ValueError of one line for what this service will never run.

    nodes: empty while the cluster is not known. runs: whether a trial has no result yet; without
    one the study needs no cluster. It is asked only about a study that the cluster cannot hold,
    after everything else is checked.
    """
    if submission.code and not code_files(settings).exists(code_name(submission.code)):
        raise ValueError(
            f"code: package {submission.code[:12]} was not uploaded; PUT it to /v1/code first"
        )
    check_plan(submission, settings, nodes, runs)


def check_plan(
    submission: Submission,
    settings: ServiceSettings,
    nodes: Sequence[Node],
    runs: Callable[[], bool],
) -> None:
    """As `check`, of a study whose code stays where it is."""
    study = submission.study
    keys = [trial.key for trial in submission.trials]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"trials: key {twice!r} occurs twice; name each trial once")
    if study.gpu_hours and not study.resources.gpus_per_rank:
        raise ValueError(
            f"gpu_hours: a budget of {study.gpu_hours:g} has no effect, "
            "resources.gpus_per_rank is 0; remove one"
        )
    check_gpus(study.resources)
    _check_paths(submission, settings)
    too_large = _too_large(gang_of(study), settings, nodes)
    if too_large and runs():
        raise ValueError(too_large)


def _too_large(gang: Gang, settings: ServiceSettings, nodes: Sequence[Node]) -> str:
    """Why a trial never fits on the whole cluster, or on one that grows at its largest.

    Empty if it does.
    """
    at_most = ""
    if settings.autoscale:
        grown = largest(settings.node_shapes).items()
        nodes = [Node(name, total, total) for name, total in grown]
        at_most = " at its largest"
    # without nodes nobody knows what the cluster will hold: then the study waits
    if nodes and fit(gang, {node.id: node.total for node in nodes}) is None:
        whole = _size_in_words(nodes, gang)
        return f"resources: a trial needs {needs(gang)}; {whole}{at_most}; ask for less"
    return ""


def _size_in_words(nodes: Sequence[Node], gang: Gang) -> str:
    parts = []
    for name in sorted(gang.per_rank, reverse=True):
        amount = sum(node.total.get(name, 0.0) for node in nodes)
        parts.append(f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') else ''}")
    where = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    return f"the whole cluster holds {' and '.join(parts)} on {where}"


def _check_paths(submission: Submission, settings: ServiceSettings) -> None:
    named = [("storage", _absolute(submission.storage))] if submission.storage else []
    for trial in submission.trials:
        strings = _strings(trial.run, "run")
        named += [(f"trial {trial.key}, {path}", value) for path, value in strings]
    check_uris(named, settings)


def _absolute(folder: str) -> str:
    # The ranks start in other folders, and the service may be started in another one next time.
    return folder if "://" in folder else str(Path(folder).absolute())


def check_uris(named: Iterable[tuple[str, str]], settings: ServiceSettings) -> None:
    """Raises ValueError if a URI holds credentials or, with roots configured, lies in none of them.

    named: the field and its text, which may also be something else than a path or URI.
    """
    for where, value in named:
        if "://" in value and has_credentials(value):
            raise ValueError(
                f"{where}: the URI holds credentials, which would be kept in the ledger and in "
                "MLflow; give them to the nodes' environment instead"
            )
        # To the service a run is data: any text in it that can leave the trial's folder counts as a
        # path.
        outside = "://" in value or value.startswith(("/", "~", "\\")) or ".." in Path(value).parts
        if settings.roots and outside and not any(_within(value, root) for root in settings.roots):
            raise ValueError(
                f"{where}: {value!r} is outside the service's roots ({', '.join(settings.roots)})"
            )


def _strings(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Every text in nested data, with its dotted path."""
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
        return _within_uri(urlsplit(value), urlsplit(root))
    # whose home `~` is depends on the process that opens the path
    if value.startswith("~"):
        return False
    # resolved, because a link inside a root may lead out of it
    return _below(os.path.realpath(value), os.path.realpath(root))


def _within_uri(value: SplitResult, root: SplitResult) -> bool:
    # the query too: it can name another endpoint, which would get the service's credentials
    if (value.scheme, value.netloc, value.query) != (root.scheme, root.netloc, root.query):
        return False
    path, base = (os.path.normpath("/" + part.path.lstrip("/")) for part in (value, root))
    # an escaped `..` would pass `normpath`
    return "%" not in value.path and _below(path, base)


def _below(path: str, base: str) -> bool:
    return path == base or path.startswith(base.rstrip("/") + "/")


def has_trials_to_run(ledger: Ledger, submission: Submission, owner: str) -> bool:
    """Whether some trial of the submission has no result that its owner may take.

    Its paths are checked: a proof reads the manifests that the client names.
    """
    if submission.fresh:
        return True
    runs = {sharing.run_of(trial) for trial in with_proofs(submission).trials}
    with ledger.reading() as transaction:
        return len(sharing.finished_for(transaction, owner, runs)) < len(runs)


def accept(
    ledger: Ledger, settings: ServiceSettings, submission: Submission, owner: str, now: float
) -> tuple[str, bool]:
    """The study's id, and whether it is new: the same idempotency key of one owner is one study.

    Raises ValueError if the key was used for another study.
    """
    submission = with_proofs(submission)  # before the transaction: it reads manifests
    folder = _absolute(submission.storage or storage_root(settings))

    def add(transaction: Transaction) -> tuple[str, bool]:
        known = queries.study_of_key(transaction, owner, submission.idempotency_key)
        if known is not None:
            _check_same(transaction, known, submission)
            return known.id, False
        return changes.add_study(transaction, submission, folder, owner, now), True

    return ledger.retried(add)  # of equal posts at once the first one makes the study


def _check_same(transaction: Transaction, known: StudyRow, submission: Submission) -> None:
    before = queries.identities(transaction, known.id)
    now = {trial.key: trial.identity for trial in submission.trials}
    study, spec = submission.study, known.spec
    differs = [n for n in Study.model_fields if getattr(study, n) != getattr(spec, n)]
    differs += ["fresh"] if known.fresh != submission.fresh else []
    if before != now:
        differs.append("its trials, their data or their code")
    if differs:
        raise ValueError(
            f"the key {submission.idempotency_key!r} was used for study {known.id}, "
            f"which is another one ({', '.join(differs)}); give another key"
        )

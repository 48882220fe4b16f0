"""MLflow's side of studies and trials, and webhooks: all that can wait while a server is down.

Each step finds its work in the ledger, and notes there when it is done. So nothing is lost and
nothing is done twice.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

from contract.answers import TrialView
from contract.attempt import SPOOL_CURSOR, SPOOL_RECORDS
from contract.machine.proxies import proxy_for
from contract.study import StudyState, TrialState
from orchestrator.ledger import changes, queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.rows import StudyBrief, StudyRow, TrialBrief
from orchestrator.results.comparison import compare_arms
from orchestrator.server.mlflow import MLflow, Run, TrackingRefusedError
from orchestrator.server.views import study_views
from orchestrator.settings import service_files

LOG = logging.getLogger("maskray")
_NAME = re.compile(r"[^\w\-. :/]")  # characters that MLflow refuses in a metric's name
_LONGEST_NAME = 250  # characters that MLflow takes
_SHIP_S = 300.0
_STATUS: Mapping[TrialState | StudyState, str] = {
    "done": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}


def make_parents(ledger: Ledger, mlflow: MLflow) -> None:
    """Makes an experiment and a parent run for each study that has none."""
    with ledger.reading() as transaction:
        studies = queries.studies_without_parent(transaction)
    for study in studies:
        with _apart(f"study {study.id}"):
            _make_parent(ledger, mlflow, study)


@contextmanager
def _apart(what: str) -> Iterator[None]:
    """What MLflow or the storage refuses of one study or trial must not stop the others.

    The next turn tries again.
    """
    try:
        yield
    except (TrackingRefusedError, OSError) as error:
        LOG.warning("%s: %s", what, " ".join(str(error).split())[:500])


def _make_parent(ledger: Ledger, mlflow: MLflow, study: StudyRow) -> None:
    tags = {"maskray.study": study.id, "maskray.owner": study.owner}
    experiment = mlflow.experiment(study.id, {**tags, "mlflow.note.content": study.spec.question})
    # An earlier turn may have made the run and then died, or its answer was lost: a POST may arrive
    # twice.
    known = mlflow.run_by_tag(experiment, "maskray.parent", study.id)
    if known is not None:
        run_id = known.info.run_id
    else:
        tags["maskray.parent"] = study.id
        run_id = mlflow.create_run(experiment, study.name, tags, study.created_at)
        mlflow.put_artifact(run_id, "study.yaml", study.study_yaml.encode())
    changes.set_parent_run(ledger, study.id, study.id, run_id)


def close_runs(
    ledger: Ledger, mlflow: MLflow, now: float, ship: Callable[[str], None] | None = None
) -> int:
    """Ends the MLflow runs of trials and studies that are over; how many it ended.

    A trial that was killed leaves its run RUNNING. ship: sends what a trial could not send while it
    ran, given its folder; by default as `maskray sync` does.
    """
    with ledger.reading() as transaction:
        trials = queries.unclosed_trials(transaction)
    ended = 0
    for trial, study in trials:
        with _apart(f"trial {trial.id}"):
            runs = _runs_of(mlflow, trial, study, ship or _ship)
            ended += sum(_close(mlflow, run, trial, study, now) for run in runs)
            changes.close_trial(ledger, trial.id, runs[-1].info.run_id if runs else "")
    return ended + _close_parents(ledger, mlflow, now)


def _runs_of(
    mlflow: MLflow, trial: TrialBrief, study: StudyBrief, ship: Callable[[str], None]
) -> list[Run]:
    """The trial's runs, after what it could not send while it ran was sent to them."""
    # The run of a trial that took another one's result is that one's.
    if not study.mlflow_experiment or trial.cached_from:
        return []
    if _unsent(trial.folder):
        ship(trial.folder)
    experiment = mlflow.experiment(study.mlflow_experiment, {})
    return mlflow.runs(experiment, f"tags.`maskray.trial` = '{trial.id}'")


def _unsent(folder: str) -> bool:
    """Whether a trial that is over left records that its tracker has not got.

    Also where that cannot be read: shipping then says why, and what to do.
    """
    files = service_files(folder)
    try:
        whole = files.size(SPOOL_RECORDS) or 0
        cursor = files.read_object(SPOOL_CURSOR) if whole else None
    except OSError:
        return True
    return whole > int((cursor or {}).get("bytes", 0))


def _ship(folder: str) -> None:
    # The spool's format is the workers' own, and this room imports no other: so their command is
    # spawned.
    command = [sys.executable, "-m", "workers.sync", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SHIP_S, check=False)
        last_lines = done.stderr.strip().splitlines() or ["no reason given"]
        why = last_lines[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"not done after {_SHIP_S:.0f} s"
    if why:
        LOG.warning(
            "%s: what MLflow was not told stays there (%s); send it with maskray sync", folder, why
        )


def _close(mlflow: MLflow, run: Run, trial: TrialBrief, study: StudyBrief, now: float) -> bool:
    """Whether the run was still open."""
    run_id, tags = run.info.run_id, {tag.key for tag in run.data.tags}
    if study.mlflow_run_id and "mlflow.parentRunId" not in tags:
        # the trial started while MLflow was down, so there was no parent run yet
        mlflow.set_tag(run_id, "mlflow.parentRunId", study.mlflow_run_id)
    if trial.error:
        mlflow.set_tag(run_id, "maskray.error", trial.error)
    if run.info.status not in ("RUNNING", "SCHEDULED"):
        return False
    mlflow.end_run(run_id, _STATUS[trial.state], now)
    return True


def _close_parents(ledger: Ledger, mlflow: MLflow, now: float) -> int:
    with ledger.reading() as transaction:
        studies = queries.unclosed_studies(transaction)
    for study in studies:
        with _apart(f"study {study.id}"):
            with ledger.reading() as transaction:
                (view,) = study_views(transaction, {}, study.id)
            at = study.ended_at or now
            mlflow.log_metrics(
                study.mlflow_run_id, study_metrics(view.trials, study.spec.metrics), at
            )
            mlflow.end_run(study.mlflow_run_id, _STATUS[study.state], at)
            changes.close_study(ledger, study.id)
    return len(studies)


def study_metrics(trials: Sequence[TrialView], metrics: Sequence[str]) -> dict[str, float]:
    """Means over seeds and differences from the baseline, each with its interval.

    The names are as MLflow takes them: `ARM/METRIC/mean`, `ARM/METRIC/difference/low`, ...
    """
    values: dict[str, float] = {}
    for arm in compare_arms(trials, metrics).arms:
        label = ".".join(f"{factor}-{level}" for factor, level in arm.arm.items()) or "baseline"
        for metric, summary in arm.metrics.items():
            name = f"{label}/{metric}"
            values[f"{name}/mean"] = summary.mean
            values[f"{name}/low"], values[f"{name}/high"] = summary.low, summary.high
        for metric, pair in arm.differences.items():
            name = f"{label}/{metric}/difference"
            values[name] = pair.mean
            values[f"{name}/low"], values[f"{name}/high"] = pair.low, pair.high
    # one seed has no interval: its ends are not finite, and MLflow refuses such a value
    return {
        _NAME.sub("_", name)[:_LONGEST_NAME]: value
        for name, value in values.items()
        if math.isfinite(value)
    }


def send_webhooks(ledger: Ledger, url: str) -> None:
    """Tells `url` of the end of each study, until it answers with success."""
    with ledger.reading() as transaction:
        studies = queries.unannounced_studies(transaction)
    for study in studies:
        body = {
            "id": study.id,
            "name": study.name,
            "owner": study.owner,
            "state": study.state,
            "ended_at": study.ended_at,
            "study": study.id,
        }
        try:
            response = httpx.post(
                url, json=body, timeout=10.0, proxy=proxy_for(url), trust_env=False
            )
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            LOG.warning("webhook of study %s: status %d; tried again later", study.id, status)
            continue
        except httpx.HTTPError as error:
            kind = type(error).__name__
            LOG.warning("webhook of study %s: %s; tried again later", study.id, kind)
            return  # nobody is there: the other studies would wait for their time-out one by one
        changes.note_webhook(ledger, study.id)

"""MLflow's side of studies and trials, and webhooks: whatever may wait for a server that is down.

Each step finds its work in the ledger and marks it there when it is done, so nothing is lost and nothing done twice.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from sqlalchemy import select, update

from contract.answers import StudyView
from contract.attempt import SPOOL_CURSOR, SPOOL_RECORDS
from contract.study import FINAL_STATES
from orchestrator.ledger import store
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.results.statistics import compare_arms
from orchestrator.server.mlflow import MLflow, TrackingRefusedError
from orchestrator.server.views import study_views
from orchestrator.settings import service_files

LOG = logging.getLogger("maskray")
_NAME = re.compile(r"[^\w\-. :/]")  # what MLflow takes in no metric's name
_SHIP_S = 300.0
_ENDED_STUDY = ("done", "failed", "cancelled")
_STATUS = {"done": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


def make_parents(ledger: Ledger, mlflow: MLflow) -> None:
    """An experiment and a parent run for each study that has none; looked up by tag, since a POST may be repeated."""
    with ledger.reading() as transaction:
        query = select(STUDIES).where(
            STUDIES.c.mlflow_run_id == "", STUDIES.c.state.in_(("active", "paused"))
        )
        studies = list(transaction.execute(query).mappings())
    for study in studies:
        with _apart(f"study {study['id']}"):
            _make_parent(ledger, mlflow, study)


@contextmanager
def _apart(what: str) -> Iterator[None]:
    """What MLflow or the storage refuses of one study or trial holds up no other; the next turn tries again."""
    try:
        yield
    except (TrackingRefusedError, OSError) as error:
        LOG.warning("%s: %s", what, " ".join(str(error).split())[:500])


def _make_parent(ledger: Ledger, mlflow: MLflow, study: store.Row) -> None:
    tags = {"maskray.study": study["id"], "maskray.owner": study["owner"]}
    experiment = mlflow.experiment(
        study["id"], {**tags, "mlflow.note.content": study["spec"]["question"]}
    )
    found = mlflow.run_by_tag(experiment, "maskray.parent", study["id"])
    if found is not None:
        run = str(found["info"]["run_id"])
    else:
        run = mlflow.create_run(
            experiment, study["name"], {**tags, "maskray.parent": study["id"]}, study["created_at"]
        )
        mlflow.put_artifact(run, "study.yaml", study["study_yaml"].encode())
    with ledger.writing() as transaction:
        transaction.execute(
            update(STUDIES)
            .where(STUDIES.c.id == study["id"])
            .values(mlflow_experiment=study["id"], mlflow_run_id=run)
        )


def close_runs(
    ledger: Ledger, mlflow: MLflow, now: float, ship: Callable[[str], None] | None = None
) -> int:
    """Ends the MLflow runs of trials and studies that are over, as a kill leaves them RUNNING. How many it ended.

    ship: sends what a trial could not send while it ran, given its folder; by default as `maskray sync` does.
    """
    ended = 0
    with ledger.reading() as transaction:
        columns = (
            TRIALS.c.id,
            TRIALS.c.state,
            TRIALS.c.error,
            TRIALS.c.cached_from,
            TRIALS.c.folder,
        )
        query = (
            select(
                *columns,
                TRIALS.c.study,
                STUDIES.c.mlflow_experiment,
                STUDIES.c.mlflow_run_id.label("parent"),
            )
            .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
            .where(TRIALS.c.mlflow_closed.is_(False), TRIALS.c.state.in_(FINAL_STATES))
        )
        trials = list(transaction.execute(query).mappings())
    for trial in trials:
        with _apart(f"trial {trial['id']}"):
            ended += _close_trial(ledger, mlflow, trial, now, ship or _ship)
    return ended + _close_parents(ledger, mlflow, now)


def _close_trial(
    ledger: Ledger, mlflow: MLflow, trial: store.Row, now: float, ship: Callable[[str], None]
) -> int:
    ended, run_id = 0, ""
    if trial["mlflow_experiment"] and not trial["cached_from"]:
        if _unsent(trial["folder"]):
            ship(trial["folder"])
        experiment = mlflow.experiment(trial["mlflow_experiment"], {})
        for run in mlflow.runs(experiment, f"tags.`maskray.trial` = '{trial['id']}'"):
            run_id = str(run["info"]["run_id"])
            ended += _close(mlflow, run, trial, now)
    values = {"mlflow_closed": True, **({"mlflow_run_id": run_id} if run_id else {})}
    with ledger.writing() as transaction:
        store.move_trial(transaction, trial["id"], FINAL_STATES, values)
    return ended


def _unsent(folder: str) -> bool:
    """Whether a trial that is over left something that its tracker was not told, because it was down.

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
    command = [sys.executable, "-m", "workers.sync", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SHIP_S, check=False)
        why = (
            (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""
        )
    except subprocess.TimeoutExpired:
        why = f"not done after {_SHIP_S:.0f} s"
    if why:
        LOG.warning(
            "%s: what MLflow was not told stays there (%s); send it with maskray sync", folder, why
        )


def _close(mlflow: MLflow, run: dict[str, object], trial: store.Row, now: float) -> int:
    info = run["info"]
    assert isinstance(info, dict)
    tags = {tag["key"]: tag["value"] for tag in _tags(run)}
    run_id = str(info["run_id"])
    if trial["parent"] and "mlflow.parentRunId" not in tags:  # it started while MLflow was down
        mlflow.set_tag(run_id, "mlflow.parentRunId", trial["parent"])
    if trial["error"]:
        mlflow.set_tag(run_id, "maskray.error", trial["error"])
    if info["status"] not in ("RUNNING", "SCHEDULED"):
        return 0
    mlflow.end_run(run_id, _STATUS[trial["state"]], now)
    return 1


def _tags(run: dict[str, object]) -> list[dict[str, str]]:
    data = run.get("data")
    return list(data.get("tags", [])) if isinstance(data, dict) else []


def _close_parents(ledger: Ledger, mlflow: MLflow, now: float) -> int:
    with ledger.reading() as transaction:
        query = select(
            STUDIES.c.id, STUDIES.c.state, STUDIES.c.ended_at, STUDIES.c.mlflow_run_id
        ).where(
            STUDIES.c.mlflow_closed.is_(False),
            STUDIES.c.mlflow_run_id != "",
            STUDIES.c.state.in_(_ENDED_STUDY),
        )
        studies = list(transaction.execute(query).mappings())
    for study in studies:
        with _apart(f"study {study['id']}"):
            with ledger.reading() as transaction:
                (view,) = study_views(transaction, {}, study["id"])
            at = study["ended_at"] or now
            mlflow.log_metrics(study["mlflow_run_id"], study_metrics(view), at)
            mlflow.end_run(study["mlflow_run_id"], _STATUS[study["state"]], at)
            with ledger.writing() as transaction:
                transaction.execute(
                    update(STUDIES).where(STUDIES.c.id == study["id"]).values(mlflow_closed=True)
                )
    return len(studies)


def study_metrics(view: StudyView) -> dict[str, float]:
    """Means over seeds and differences from the baseline, each with its interval, by MLflow's metric names."""
    found: dict[str, float] = {}
    for arm in compare_arms(view.trials, view.spec["metrics"]).arms:
        label = ".".join(f"{factor}-{level}" for factor, level in arm.arm.items()) or "baseline"
        for metric, summary in arm.metrics.items():
            name = f"{label}/{metric}"
            found |= {
                f"{name}/mean": summary.mean,
                f"{name}/low": summary.low,
                f"{name}/high": summary.high,
            }
        for metric, pair in arm.differences.items():
            name = f"{label}/{metric}/difference"
            found |= {name: pair.mean, f"{name}/low": pair.low, f"{name}/high": pair.high}
    return {
        _NAME.sub("_", name)[:250]: value for name, value in found.items() if math.isfinite(value)
    }


def send_webhooks(ledger: Ledger, url: str) -> None:
    """Tells `url` of each study that is over, until it answers with success."""
    with ledger.reading() as transaction:
        query = select(
            STUDIES.c.id, STUDIES.c.name, STUDIES.c.owner, STUDIES.c.state, STUDIES.c.ended_at
        ).where(STUDIES.c.webhook_sent.is_(False), STUDIES.c.state.in_(_ENDED_STUDY))
        studies = list(transaction.execute(query).mappings())
    for study in studies:
        body = {**study, "study": study["id"]}
        try:
            response = httpx.post(url, json=body, timeout=10.0, trust_env=False)
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            LOG.warning(
                "webhook of study %s: status %d; tried again later",
                study["id"],
                error.response.status_code,
            )
            continue
        except httpx.HTTPError as error:
            LOG.warning(
                "webhook of study %s: %s; tried again later", study["id"], type(error).__name__
            )
            return  # nobody is there
        with ledger.writing() as transaction:
            transaction.execute(
                update(STUDIES).where(STUDIES.c.id == study["id"]).values(webhook_sent=True)
            )

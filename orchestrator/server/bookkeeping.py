"""MLflow's side of studies and trials, and webhooks: all that can wait while a server is down.

Each step finds its work in the ledger, and notes there when it is done. So nothing is lost and
nothing is done twice.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import httpx

from contract.answers import TrialView
from contract.attempt import BEST_WEIGHTS, SPOOL_CURSOR, SPOOL_LATER, SPOOL_RECORDS
from contract.machine.certificates import trusted
from contract.machine.proxies import proxy_for
from contract.metrics import tag_condition, tracker_keys
from contract.record import Message
from contract.study import Study, StudyState, TrialState
from orchestrator.ledger import changes, queries
from orchestrator.ledger.events import COPY_REMOVED, record
from orchestrator.ledger.opening import Ledger, LedgerError
from orchestrator.ledger.rows import StudyBrief, StudyRow, TrialBrief
from orchestrator.results.comparison import compare_arms
from orchestrator.schedule.decide import Wait
from orchestrator.server import run_pages
from orchestrator.server.mlflow import MLflow, Run, TrackingDownError, TrackingRefusedError
from orchestrator.server.views import study_views
from orchestrator.study.contrasts import primary_of
from orchestrator.trial_folder import SMALL_BYTES, TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")
_OF_A_FAILURE = {"maskray.error", "maskray.error_class"}  # tags
_TRIAL_TAG = "maskray.trial"
_SHIP_S = 300.0
_JUST_OVER_S = 3600.0  # so long after its end a study still gets what it lacks in MLflow
_ASK_EVERY_S = 10.0  # between two looks for the run of a trial that has just started
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0  # before what a trial left is sent again
_STATUS: Mapping[TrialState | StudyState, str] = {
    "done": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
    "spared": "KILLED",  # it never had a run
}


def make_parents(ledger: Ledger, mlflow: MLflow, now: float) -> None:
    """Makes an experiment and a parent run for each study that has none.

    A study whose results were all there already is over before it gets one.
    """
    with ledger.reading() as transaction:
        studies = queries.studies_without_parent(transaction, now - _JUST_OVER_S)
    for study in studies:
        with apart(f"study {study.id}"):
            _make_parent(ledger, mlflow, study)


@contextmanager
def apart(what: str) -> Iterator[None]:
    """What MLflow or the storage refuses of one study or trial must not stop the others.

    The next turn tries again.
    """
    try:
        yield
    except (TrackingRefusedError, OSError, ValueError) as error:
        LOG.warning("%s: %s", what, " ".join(str(error).split())[:500])
    except (TrackingDownError, LedgerError):
        raise  # everybody's trouble
    except Exception:
        LOG.exception("%s: its books; tried again", what)


def _make_parent(ledger: Ledger, mlflow: MLflow, study: StudyRow) -> None:
    with ledger.reading() as transaction:
        first = next(iter(queries.trials(transaction, study.id)), None)
        plan = queries.trial_row(transaction, first.id) if first else None
    experiment = mlflow.experiment(study.id, run_pages.experiment_tags(study))
    # An earlier turn may have made the run and then died, or its answer was lost: a POST may arrive
    # twice.
    known = mlflow.run_by_tag(experiment, "maskray.parent", study.id)
    if known is not None:
        run_id = known.info.run_id
    else:
        tags = run_pages.parent_tags(study, plan)
        run_id = mlflow.create_run(experiment, study.name, tags, study.created_at)
        if plan is not None and (inputs := run_pages.datasets(plan)):
            mlflow.log_inputs(run_id, inputs)
    # before the artifact, whose store may refuse it: the trials need the run
    changes.set_parent_run(ledger, study.id, study.id, run_id)
    mlflow.put_artifact(run_id, "study.yaml", study.study_yaml.encode())


class Introduced:
    """Which trials' runs have their tags and inputs already, since this service started.

    Twice does no harm, so a service that starts again does it again.
    """

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._asked_at: dict[str, float] = {}  # of runs that are not there yet

    def live(self, ledger: Ledger, mlflow: MLflow, now: float) -> None:
        """Of trials that run: a person who looks at them now wants their arms and colours."""
        with ledger.reading() as transaction:
            live = queries.live_attempts(transaction)
        for attempt in live:
            trial, study = attempt.trial, attempt.study
            asked = self._asked_at.get(trial.id, 0.0)
            if trial.id in self._done or not study.mlflow_experiment or now - asked < _ASK_EVERY_S:
                continue
            self._asked_at[trial.id] = now
            with apart(f"trial {trial.id}"):
                for run in _runs_of(mlflow, trial, study):
                    self.run(ledger, mlflow, run.info.run_id, trial.id, study)

    def run(
        self, ledger: Ledger, mlflow: MLflow, run_id: str, trial_id: str, study: StudyBrief
    ) -> None:
        """Gives one run what its trial says of itself."""
        if trial_id in self._done:
            return
        with ledger.reading() as transaction:
            trial = queries.trial_row(transaction, trial_id)
            trials = queries.trials(transaction, study.id)
        if trial is None:
            return  # its study was forgotten
        mlflow.set_tags(run_id, run_pages.trial_tags(study, trials, trial))
        if inputs := run_pages.datasets(trial):
            mlflow.log_inputs(run_id, inputs)
        self._done.add(trial_id)
        self._asked_at.pop(trial_id, None)


class Lack(NamedTuple):
    """What MLflow has not got of a trial that is over. wait: says so to a person."""

    wait: Wait
    pause_s: float
    again_at: float


Ship: TypeAlias = Callable[[str], str | None]


def close_runs(
    ledger: Ledger,
    mlflow: MLflow,
    now: float,
    ship: Ship | None = None,
    lacks: dict[str, Lack] | None = None,
    introduced: Introduced | None = None,
) -> int:
    """Ends the MLflow runs of trials and studies that are over; how many it ended.

    A trial that was killed leaves its run RUNNING. ship: sends what a trial could not send while it
    ran, given its folder, and returns why that failed; by default as `maskray sync` does. lacks: by
    trial what it still could not send, kept from turn to turn; it is tried again, ever more rarely.
    """
    with ledger.reading() as transaction:
        trials = queries.unclosed_trials(transaction)
    lacks = {} if lacks is None else lacks
    introduced = introduced or Introduced()
    for over in lacks.keys() - {trial.id for trial, _ in trials}:
        del lacks[over]
    ended = 0
    for trial, study in trials:
        if trial.id in lacks and now < lacks[trial.id].again_at:
            continue
        just_taken = trial.cached_from and now - trial.moved_at < _JUST_OVER_S
        if just_taken and not study.mlflow_experiment:
            continue  # its study gets a parent run in the next turn
        with apart(f"trial {trial.id}"):
            why = _send_rest(mlflow, trial, study, ship)
            if why:  # before MLflow refuses the next question too
                lacks[trial.id] = _lack(trial, why, lacks.get(trial.id), now)
            if trial.cached_from and study.mlflow_experiment:
                _make_light_run(ledger, mlflow, trial, study, now)
            runs = _runs_of(mlflow, trial, study)
            for run in runs:
                introduced.run(ledger, mlflow, run.info.run_id, trial.id, study)
            ended += sum(_close(mlflow, run, trial, study, now) for run in runs)
            if not why:
                changes.close_trial(ledger, trial.id, runs[-1].info.run_id if runs else "")
                lacks.pop(trial.id, None)
    return ended + _close_parents(ledger, mlflow, now)


def _lack(trial: TrialBrief, why: str, before: Lack | None, now: float) -> Lack:
    pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before else _FIRST_PAUSE_S
    words = f"MLflow has not got all of it ({why}); tried again, or maskray sync {trial.folder}"
    return Lack(Wait(trial.id, 0, words), pause_s, now + pause_s)


def _make_light_run(
    ledger: Ledger, mlflow: MLflow, trial: TrialBrief, study: StudyBrief, now: float
) -> None:
    """The run of a trial that took another one's result: its final metrics, and whose they are.

    Without it, a study would show in MLflow only the arms that it trained itself.
    """
    experiment = mlflow.experiment(study.mlflow_experiment, {})
    known = mlflow.run_by_tag(experiment, _TRIAL_TAG, trial.id)
    tags = {_TRIAL_TAG: trial.id, "maskray.cached_from": trial.cached_from}
    if study.mlflow_run_id:
        tags["mlflow.parentRunId"] = study.mlflow_run_id
    with ledger.reading() as transaction:
        source = queries.trial_row(transaction, trial.cached_from)
    if source and source.mlflow_run_id:
        tags["maskray.source_run"] = source.mlflow_run_id
    run_id = known.info.run_id if known else mlflow.create_run(experiment, trial.key, tags, now)
    keys = tracker_keys(trial.metrics)
    finite = {keys[name]: value for name, value in trial.metrics.items() if math.isfinite(value)}
    mlflow.log_metrics(run_id, finite, now)


def _send_rest(mlflow: MLflow, trial: TrialBrief, study: StudyBrief, ship: Ship | None) -> str:
    """Sends what the trial could not send while it ran. Returns why that failed, "" if not."""
    # The folder of a trial that took another one's result is that one's.
    if not study.mlflow_experiment or trial.cached_from:
        return ""
    try:
        unsent = _unsent(trial.folder)
    except TrialFileError as error:
        return str(error)
    if not unsent:
        return ""
    if ship is not None:
        return ship(trial.folder) or ""
    # a trial may have been started without a tracker, before the server had an address
    place = ("--experiment", study.mlflow_experiment, "--parent", study.mlflow_run_id)
    return _ship(trial.folder, mlflow.uri, place)


def _runs_of(mlflow: MLflow, trial: TrialBrief, study: StudyBrief) -> list[Run]:
    if not study.mlflow_experiment:
        return []
    experiment = mlflow.experiment(study.mlflow_experiment, {})
    return mlflow.runs(experiment, tag_condition(_TRIAL_TAG, trial.id))


class _Cursor(Message):
    """`spool/cursor.json`: how much of the spool the tracker has."""

    bytes: int = 0


def _unsent(folder: str) -> bool:
    """Whether a trial that is over left records that its tracker has not got.

    Also where that cannot be read: shipping then says why, and what to do. Raises TrialFileError
    for what no shipping can read.
    """
    files = TrialFolder(folder)
    try:
        whole = files.size(SPOOL_RECORDS) or 0
        cursor = files.record(_Cursor, SPOOL_CURSOR, SMALL_BYTES) if whole else None
        spool, later = SPOOL_LATER.split("/")
        names = files.names(spool) if whole else []
        postponed = [name for name in names if name.startswith(later)]
        for name in postponed:  # shipping would wait for a pipe, and keep all others waiting
            files.size(f"{spool}/{name}")
    except TrialFileError:
        raise
    except OSError:
        return True
    return bool(postponed) or whole > (cursor.bytes if cursor is not None else 0)


def _ship(folder: str, uri: str, place: Sequence[str]) -> str:
    """Returns why not all of it was sent, empty if all was."""
    # The spool's format is the workers' own, and this room imports no other: so their command is
    # spawned.
    command = [sys.executable, "-m", "workers.sync", folder, *place]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SHIP_S,
            check=False,
            # not as an argument, which every user of the machine can read: it may hold a password
            env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        )
        last_lines = done.stderr.strip().splitlines() or ["no reason given"]
        why = last_lines[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"not done after {_SHIP_S:.0f} s"
    if why:
        LOG.warning(
            "%s: what MLflow was not told stays there (%s); send it with maskray sync", folder, why
        )
    return why


def _close(mlflow: MLflow, run: Run, trial: TrialBrief, study: StudyBrief, now: float) -> bool:
    """Whether the run was still open."""
    run_id, tags = run.info.run_id, {tag.key for tag in run.data.tags}
    if study.mlflow_run_id and "mlflow.parentRunId" not in tags:
        # the trial started while MLflow was down, so there was no parent run yet
        mlflow.set_tag(run_id, "mlflow.parentRunId", study.mlflow_run_id)
    if trial.error:
        mlflow.set_tag(run_id, "maskray.error", trial.error)
    else:  # of an attempt before a retry
        for key in _OF_A_FAILURE & tags:
            mlflow.delete_tag(run_id, key)
    if run.info.status not in ("RUNNING", "SCHEDULED"):
        return False
    mlflow.end_run(run_id, _STATUS[trial.state], now)
    return True


def _close_parents(ledger: Ledger, mlflow: MLflow, now: float) -> int:
    with ledger.reading() as transaction:
        studies = queries.unclosed_studies(transaction)
    for study in studies:
        with apart(f"study {study.id}"):
            with ledger.reading() as transaction:
                (view,) = study_views(transaction, {}, study.id)
            at = study.ended_at or now
            metrics = study_metrics(view.trials, study.spec)
            mlflow.log_metrics(study.mlflow_run_id, metrics, at)
            mlflow.end_run(study.mlflow_run_id, _STATUS[study.state], at)
            changes.close_study(ledger, study.id)
            # its store may have refused it at the start
            mlflow.put_artifact(study.mlflow_run_id, "study.yaml", study.study_yaml.encode())
    return len(studies)


def study_metrics(trials: Sequence[TrialView], spec: Study) -> dict[str, float]:
    """Means and differences of the metrics that the study asks for.

    The report has the rest, intervals too: they are of its whole family. The names are as MLflow
    takes them: `ARM/METRIC/mean`, `ARM/METRIC/difference`.
    """
    values: dict[str, float] = {}
    asked = (contrast.metric for contrast in spec.contrasts.values() if contrast.metric)
    primary = primary_of(spec, {metric for trial in trials for metric in trial.metrics})
    wanted = list(dict.fromkeys([primary, *asked]))
    for arm in compare_arms(trials, wanted).arms:
        label = ".".join(f"{factor}-{level}" for factor, level in arm.arm.items()) or "baseline"
        for metric in wanted:
            name = f"{label}/{metric}"
            if metric in arm.metrics:
                values[f"{name}/mean"] = arm.metrics[metric].mean
            if pair := arm.differences.get(metric):
                values[f"{name}/difference"] = pair.mean
    keys = tracker_keys(values)
    return {keys[name]: value for name, value in values.items()}


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
                url,
                json=body,
                timeout=10.0,
                proxy=proxy_for(url),
                verify=trusted(),
                trust_env=False,
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


def remove_copies(ledger: Ledger, mlflow: MLflow, days: float, now: float) -> int:
    """Deletes MLflow's copy of the best weights of studies that ended `days` ago; the bytes.

    Only where the trial's folder still has them.
    """
    with ledger.reading() as transaction:
        trials = queries.trials_with_copies(transaction, now - 86400 * days)
    freed = 0
    for trial in trials:
        with apart(f"trial {trial.id}: MLflow's copy of its weights"):
            size = TrialFolder(trial.folder).size(BEST_WEIGHTS)
            if size is None:
                continue
            mlflow.delete_artifact(trial.mlflow_run_id, BEST_WEIGHTS.rpartition("/")[2])
            text = f"{size} bytes: MLflow's copy of the best weights, which are in {trial.folder}"
            with ledger.writing() as transaction:
                record(transaction, COPY_REMOVED, text, study=trial.study, trial=trial.id, at=now)
            freed += size
    return freed

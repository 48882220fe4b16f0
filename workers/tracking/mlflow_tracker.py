"""MLflow as the tracker. No other file imports it; this one does when the first record comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import JsonValue

from contract.attempt import MLflowTracking
from contract.files import Files
from contract.machine.certificates import tell_libraries
from contract.machine.folders import scratch
from contract.machine.proxies import ask_this_machine_directly
from contract.metrics import renamed, tag_condition, tracker_keys
from contract.words import one_line
from workers.tracking.records import (
    Artifact,
    Held,
    Metrics,
    Params,
    PostponedError,
    RejectedError,
    Rewind,
    Status,
    Tags,
    TrackingRecord,
)
from workers.tracking.spool import print_warning

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

TRIAL_TAG = "maskray.trial"
WEIGHTS_TAG = "maskray.weights"  # of a model version: last or best, and their SHA-256
# MLflow's own limits of one log_batch call, and of one value
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100
_MAX_PARAM_CHARS, _MAX_TAG_CHARS = 6000, 5000
# Few and short tries inside MLflow's client: the shipper has its own patience, and must be able to
# end. By default a call retries for minutes.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Stdout holds the answer of `sync --json` alone.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# What MLflow says of a value that it cannot take, and also of a run or an experiment that a person
# has deleted and can restore.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

_LogBatch: TypeAlias = "tuple[list[Metric], list[Param], list[RunTag]]"


class MLflowTracker:
    """Sends records to the trial's run, which it looks up by its tag and creates if needed."""

    def __init__(
        self,
        cfg: MLflowTracking,
        trial: str,
        run_name: str,
        storage: Files,
        warn: Callable[[str], None] = print_warning,
    ) -> None:
        self._cfg, self._trial, self._run_name, self._storage = cfg, trial, run_name, storage
        self._warn = warn
        self._told: set[str] = set()  # names of which a warning has said that they change
        self._client: MlflowClient | None = None
        self._held = Held()
        self.run_id = ""

    def send(self, records: Sequence[TrackingRecord]) -> None:
        """Raises RejectedError for the records' form, PostponedError for artifacts alone.

        Any other error may pass: the server is away, or does not allow it now.
        """
        from mlflow.exceptions import MlflowException

        client = self.connect()  # what it refuses is no matter of these records
        try:
            postponed = self._send(client, records)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                self._client = None  # the run itself may be gone: it is looked up again
                raise
            try:
                check_active(client, self.run_id)
            except Exception:
                self._client = None
                raise
            raise RejectedError(str(error).splitlines()[0]) from error
        if postponed:
            raise PostponedError(postponed)

    def connect(self, create: bool = True) -> MlflowClient:
        """The client, with `run_id` set. The first call asks which points the run already holds.

        create: makes a run if there is none; else raises RuntimeError.
        """
        if self._client is None:
            for name, value in _CLIENT_SETTINGS.items():
                os.environ.setdefault(name, value)
            tell_libraries()
            ask_this_machine_directly()  # MLflow's client reads the proxies by itself
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=self._cfg.uri)
            experiment = experiment_id(client, self._cfg.experiment)
            # MLflow's client retries a POST: looking the run up first keeps a trial from two runs
            runs = [
                run
                for run in client.search_runs([experiment], tag_condition(TRIAL_TAG, self._trial))
                if run.data.tags[TRIAL_TAG] == self._trial
            ]
            if runs:
                self.run_id = runs[0].info.run_id
                # another process may have sent the same points at other times, which MLflow keeps
                # as two points
                self._held = Held(
                    points=(
                        (name, point.step)
                        for name in runs[0].data.metrics
                        for point in client.get_metric_history(self.run_id, name)
                    )
                )
            elif not create:
                raise RuntimeError(
                    f"experiment {self._cfg.experiment!r} has no run of trial {self._trial}: "
                    '"mlflow runs restore --run-id ID" brings a deleted one back'
                )
            else:
                tags = {TRIAL_TAG: self._trial}
                if self._cfg.parent_run_id:
                    tags["mlflow.parentRunId"] = self._cfg.parent_run_id
                created = client.create_run(experiment, tags=tags, run_name=self._run_name)
                self.run_id = created.info.run_id
            self._client = client
        return self._client

    def _send(
        self, client: MlflowClient, records: Sequence[TrackingRecord]
    ) -> list[tuple[Artifact, str]]:
        """Returns the artifacts that their store did not take, each with the reason."""
        from mlflow.entities import Metric, Param, RunTag

        batch: _LogBatch = ([], [], [])
        metrics, params, tags = batch
        postponed: list[tuple[Artifact, str]] = []
        for record in map(self._with_keys, records):
            match self._held.new_part(record):
                case Metrics(at=at, step=step, values=values):
                    metrics += [Metric(name, value, at, step) for name, value in values.items()]
                case Params(values=values):
                    params += [Param(name, value) for name, value in values.items()]
                case Tags(values=values):
                    tags += [RunTag(name, value[:_MAX_TAG_CHARS]) for name, value in values.items()]
                case Artifact() as artifact:
                    if reason := self._send_artifact(client, artifact):
                        postponed.append((artifact, reason))
                case Status() as status:
                    # first what came before it: a run that has ended takes no more
                    self._flush(client, batch)
                    if status.status in ("RUNNING", "SCHEDULED"):
                        client.update_run(self.run_id, status=status.status)
                    else:
                        client.set_terminated(self.run_id, status.status, status.at)
                case Rewind(step=step):
                    self._held.rewind(step)
        self._flush(client, batch)
        return postponed

    def _with_keys(self, record: TrackingRecord) -> TrackingRecord:
        """The record with names that MLflow takes. Each change is told once."""
        if not isinstance(record, Metrics | Params | Tags):
            return record
        keys = tracker_keys(record.values)
        new = {name: key for name, key in keys.items() if name not in self._told}
        if words := renamed(new):
            self._warn(f"the tracker cannot take every name; it shows {words}")
        self._told |= new.keys()
        values = {keys[name]: value for name, value in record.values.items()}
        return record.model_copy(update={"values": values})

    def _flush(self, client: MlflowClient, batch: _LogBatch) -> None:
        """Sends what the batch holds and empties it."""
        metrics, params, tags = batch
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS])
        for start in range(0, len(tags), _MAX_TAGS):
            client.log_batch(self.run_id, tags=tags[start : start + _MAX_TAGS])
        for start in range(0, len(metrics), _MAX_METRICS):
            client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])
        for part in batch:
            part.clear()

    def _send_artifact(self, client: MlflowClient, artifact: Artifact) -> str:
        """Why its store does not take it now; empty once it is there."""
        try:
            with scratch("artifact") as folder:
                if not self._storage.exists(artifact.path):
                    gone = self._storage.describe(artifact.path)
                    raise RejectedError(f"artifact is gone: {gone}")
                path = self._storage.fetch(artifact.path, Path(folder))
                client.log_artifact(self.run_id, str(path), artifact.folder or None)
        except RejectedError:
            raise
        except Exception as error:  # noqa: BLE001 - each store has errors of its own
            return one_line(error)
        return ""


def check_active(client: MlflowClient, run_id: str) -> None:
    """Raises RuntimeError with the remedy if the run or its experiment is deleted."""
    run = client.get_run(run_id).info
    experiment = client.get_experiment(run.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(_deleted("experiment", experiment.experiment_id, experiment.name))
    if run.lifecycle_stage != "active":
        raise RuntimeError(_deleted("run", run_id, run.run_name or ""))


def _deleted(kind: Literal["experiment", "run"], number: str, name: str) -> str:
    return (
        f"MLflow's {kind} {name!r} is deleted; "
        f'"mlflow {kind}s restore --{kind}-id {number}" brings it back'
    )


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of this name, created if there is none.

    Raises RuntimeError if it is deleted: MLflow then takes no new one of this name either.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            # the trials of a study start together: another one may have created it meanwhile
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(_deleted("experiment", experiment.experiment_id, name))
    return str(experiment.experiment_id)


def version_of(client: MlflowClient, model: str, run_id: str, mark: str) -> str | None:
    """The version of a registered model that holds the weights of this mark and run."""
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.name == model and version.tags.get(WEIGHTS_TAG) == mark:
            return str(version.version)
    return None


def add_version(client: MlflowClient, model: str, run_id: str, folder: str, mark: str) -> str:
    """Makes a folder of the run's artifacts a version of a registered model; returns its number."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        model,
        source=f"runs:/{run_id}/{folder}",
        run_id=run_id,
        tags={WEIGHTS_TAG: mark},
        await_creation_for=0,  # its files are there already
    )
    return str(made.version)


def flattened(config: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Nested data as MLflow parameters: dotted names, values within its limit."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:_MAX_PARAM_CHARS]
    return flat

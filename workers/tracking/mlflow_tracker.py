"""MLflow as the tracker. No other file imports it; this one does when the first record comes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import JsonValue

from contract.attempt import MLflowTracking
from contract.files import Files
from contract.machine.folders import scratch
from contract.machine.proxies import ask_this_machine_directly
from workers.tracking.records import (
    Artifact,
    Held,
    Metrics,
    Params,
    RejectedError,
    Rewind,
    Status,
    Tags,
    TrackingRecord,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

TRIAL_TAG = "maskray.trial"
# MLflow's own limits of one log_batch call, and of one value
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100
_MAX_PARAM_CHARS, _MAX_TAG_CHARS = 6000, 5000
# Few and short tries inside MLflow's client: the shipper has its own patience, and must be able to
# end. By default a call retries for minutes.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

_LogBatch: TypeAlias = "tuple[list[Metric], list[Param], list[RunTag]]"


class MLflowTracker:
    """Sends records to the trial's run, which it looks up by its tag and creates if needed."""

    def __init__(self, cfg: MLflowTracking, trial: str, run_name: str, storage: Files) -> None:
        self._cfg, self._trial, self._run_name, self._storage = cfg, trial, run_name, storage
        self._client: MlflowClient | None = None
        self._held = Held()
        self.run_id = ""

    def send(self, records: Sequence[TrackingRecord]) -> None:
        """Raises RejectedError, or what MLflow raised if it may work another time."""
        from mlflow.exceptions import MlflowException

        try:
            self._send(records)
        except MlflowException as error:
            if error.error_code in _PERMANENT:
                raise RejectedError(str(error).splitlines()[0]) from error
            raise

    def connect(self) -> MlflowClient:
        """The client, with `run_id` set. The first call asks which points the run already holds."""
        if self._client is None:
            for name, value in _CLIENT_SETTINGS.items():
                os.environ.setdefault(name, value)
            ask_this_machine_directly()  # MLflow's client reads the proxies by itself
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=self._cfg.uri)
            experiment = experiment_id(client, self._cfg.experiment)
            # MLflow's client retries a POST: looking the run up first keeps a trial from two runs
            runs = client.search_runs(
                [experiment], f"tags.`{TRIAL_TAG}` = '{self._trial}'", max_results=1
            )
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
            else:
                tags = {TRIAL_TAG: self._trial}
                if self._cfg.parent_run_id:
                    tags["mlflow.parentRunId"] = self._cfg.parent_run_id
                created = client.create_run(experiment, tags=tags, run_name=self._run_name)
                self.run_id = created.info.run_id
            self._client = client
        return self._client

    def _send(self, records: Sequence[TrackingRecord]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self.connect()
        batch: _LogBatch = ([], [], [])
        metrics, params, tags = batch
        for record in records:
            match self._held.new_part(record):
                case Metrics(at=at, step=step, values=values):
                    metrics += [Metric(name, value, at, step) for name, value in values.items()]
                case Params(values=values):
                    params += [Param(name, value) for name, value in values.items()]
                case Tags(values=values):
                    tags += [RunTag(name, value[:_MAX_TAG_CHARS]) for name, value in values.items()]
                case Artifact() as artifact:
                    self._send_artifact(client, artifact)
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

    def _send_artifact(self, client: MlflowClient, artifact: Artifact) -> None:
        with scratch("artifact") as folder:
            try:
                path = self._storage.fetch(artifact.path, Path(folder))
                client.log_artifact(self.run_id, str(path), artifact.folder or None)
            except FileNotFoundError as error:
                raise RejectedError(f"artifact is gone: {error}") from error


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of this name, created if there is none."""
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
    return str(experiment.experiment_id)


def flattened(config: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """Nested data as MLflow parameters: dotted names, values within its limit."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:_MAX_PARAM_CHARS]
    return flat

"""MLflow as the target of a spool: the only file that imports it, on the shipper's thread, at the first record."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.attempt import MLflowTracking
from contract.files import Files
from workers.tracking.spool import Record, RejectedError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TRIAL_TAG = "maskray.trial"
_MAX_METRICS, _MAX_PARAMS, _MAX_TAGS = 1000, 100, 100  # of one log_batch call
_MAX_PARAM_CHARS, _MAX_TAG_CHARS = 6000, 5000
# Few and short tries inside MLflow's client: the shipper has its own patience, and must be able to end.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class MLflowTarget:
    """Sends records to the trial's run, which is found by its tag, or created."""

    def __init__(self, cfg: MLflowTracking, trial: str, run_name: str, storage: Files) -> None:
        self._cfg, self._trial, self._run_name, self._storage = cfg, trial, run_name, storage
        self._client: MlflowClient | None = None
        self._had: set[tuple[str, int]] = set()
        self.run_id = ""

    def send(self, records: Sequence[Record]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._send(records)
        except MlflowException as error:
            if error.error_code in _PERMANENT:
                raise RejectedError(str(error).splitlines()[0]) from error
            raise

    def connect(self) -> MlflowClient:
        """The client, with `run_id` set. What the run already holds from another process is remembered."""
        if self._client is None:
            for name, value in _CLIENT_SETTINGS.items():
                os.environ.setdefault(name, value)
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=self._cfg.uri)
            experiment = experiment_id(client, self._cfg.experiment)
            found = client.search_runs(
                [experiment], f"tags.`{TRIAL_TAG}` = '{self._trial}'", max_results=1
            )
            if found:
                self.run_id = found[0].info.run_id
                self._had = {
                    (name, point.step)
                    for name in found[0].data.metrics
                    for point in client.get_metric_history(self.run_id, name)
                }
            else:
                tags = {TRIAL_TAG: self._trial}
                if self._cfg.parent_run_id:
                    tags["mlflow.parentRunId"] = self._cfg.parent_run_id
                self.run_id = client.create_run(
                    experiment, tags=tags, run_name=self._run_name
                ).info.run_id
            self._client = client
        return self._client

    def _send(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self.connect()
        metrics, params, tags = [], [], []
        for record in records:
            match record["kind"]:
                case "metrics":
                    metrics += [
                        Metric(name, value, record["at"], record["step"])
                        for name, value in record["values"].items()
                        if (name, record["step"]) not in self._had
                    ]
                case "params":
                    params += [Param(name, value) for name, value in record["values"].items()]
                case "tags":
                    tags += [
                        RunTag(name, value[:_MAX_TAG_CHARS])
                        for name, value in record["values"].items()
                    ]
                case "artifact":
                    self._send_artifact(client, record)
                case "status":
                    self._flush(client, metrics, params, tags)
                    metrics, params, tags = [], [], []
                    ended = record["status"] not in ("RUNNING", "SCHEDULED")
                    if ended:
                        client.set_terminated(self.run_id, record["status"], record["at"])
                    else:
                        client.update_run(self.run_id, status=record["status"])
                case (
                    "rewind"
                ):  # of the spool's own book-keeping: the points that follow replace none
                    self._had = {point for point in self._had if point[1] <= record["step"]}
        self._flush(client, metrics, params, tags)

    def _flush(
        self, client: MlflowClient, metrics: list[Any], params: list[Any], tags: list[Any]
    ) -> None:
        for start in range(0, len(params), _MAX_PARAMS):
            client.log_batch(self.run_id, params=params[start : start + _MAX_PARAMS])
        for start in range(0, len(tags), _MAX_TAGS):
            client.log_batch(self.run_id, tags=tags[start : start + _MAX_TAGS])
        for start in range(0, len(metrics), _MAX_METRICS):
            client.log_batch(self.run_id, metrics=metrics[start : start + _MAX_METRICS])

    def _send_artifact(self, client: MlflowClient, record: Record) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self._storage.fetch(record["path"], Path(folder))
                client.log_artifact(self.run_id, str(path), record["folder"] or None)
            except FileNotFoundError as error:
                raise RejectedError(f"artifact is gone: {error}") from error


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of this name, created if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            created: str = client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
        else:
            return created
    return str(found.experiment_id)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested data as MLflow parameters: dotted names, values within its limit."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:_MAX_PARAM_CHARS]
    return flat

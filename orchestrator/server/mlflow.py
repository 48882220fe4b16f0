"""The part of MLflow's REST interface that a study's parent run needs.

By hand, because MLflow's own client retries for minutes while a server is down, and the thread
would stand still.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx
from pyarrow import fs
from pydantic import JsonValue

from contract.machine.certificates import trusted
from contract.machine.logins import authorization
from contract.machine.proxies import proxy_for, way_to
from contract.metrics import tag_condition
from contract.record import Message

_LONGEST_TAG = 5000  # characters that MLflow takes
_BATCH = 1000  # metrics that one call takes
_API = "/api/2.0/mlflow"


class TrackingDownError(RuntimeError):
    """The server does not answer now; the caller tries again later."""


class TrackingRefusedError(TrackingDownError):
    """The server answers and refuses this request; other requests may still go well."""


class Tag(Message):
    key: str
    value: str = ""


class Metric(Message):
    key: str
    value: float
    step: int = 0


class RunInfo(Message):
    run_id: str
    status: str = ""
    artifact_uri: str = ""


class RunData(Message):
    """Of each metric the last value."""

    tags: tuple[Tag, ...] = ()
    metrics: tuple[Metric, ...] = ()


class Run(Message):
    info: RunInfo
    data: RunData = RunData()


class _Experiment(Message):
    experiment_id: str


class _ExperimentAnswer(Message):
    experiment: _Experiment


class _RunAnswer(Message):
    run: Run


class _SearchAnswer(Message):
    runs: list[Run] = []


class _HistoryAnswer(Message):
    metrics: list[Metric] = []


class _User(Message):
    username: str


class _UserList(Message):
    users: list[_User] = []


AnyAnswer = TypeVar("AnyAnswer", bound=Message)


class MLflow:
    """A client of one tracking server.

    Every method raises TrackingDownError if there is no sound answer.
    """

    def __init__(self, uri: str, timeout_s: float = 10.0) -> None:
        self.uri = uri  # as given, with its login
        self.url, login = authorization(uri, os.environ)  # messages show the URL
        self._way = way_to(self.url)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": login} if login else {},
            timeout=timeout_s,
            proxy=proxy_for(self.url),
            verify=trusted(),
            trust_env=False,  # no .netrc comes in between, and the proxy is our choice
        )

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        try:
            return self._http.get("/health", timeout=3.0).status_code == 200
        except httpx.HTTPError:
            return False

    def complaint(self) -> str:
        """Why the server, which is ready, does not let us in; empty if it does."""
        path = f"{_API}/experiments/search"
        try:
            status = self._http.post(path, json={"max_results": 1}).status_code
        except httpx.HTTPError as error:
            return f"MLflow at {self.url}: {error or type(error).__name__}"
        if status not in (401, 403):
            return ""
        return (
            f"MLflow at {self.url} refuses the service's login (status {status}); correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of the service"
        )

    def experiment(self, name: str, tags: Mapping[str, str]) -> str:
        """The id of the experiment of this name, made if there is none."""
        known = self.known_experiment(name)
        if known is not None:
            return known
        body = {"name": name, "tags": _pairs(tags)}
        return self._call(_Experiment, "POST", "experiments/create", json=body).experiment_id

    def known_experiment(self, name: str) -> str | None:
        params = {"experiment_name": name}
        known = self._request("GET", f"{_API}/experiments/get-by-name", params=params, missing=True)
        if known is None:
            return None
        return _parsed(_ExperimentAnswer, known).experiment.experiment_id

    def runs(self, experiment: str, condition: str) -> list[Run]:
        """The runs of an experiment that meet MLflow's search condition, at most a thousand."""
        body = {"experiment_ids": [experiment], "filter": condition, "max_results": 1000}
        return self._call(_SearchAnswer, "POST", "runs/search", json=body).runs

    def run_by_tag(self, experiment: str, tag: str, value: str) -> Run | None:
        """A run with this tag, if there is one."""
        runs = self.runs(experiment, tag_condition(tag, value))
        return next((run for run in runs if Tag(key=tag, value=value) in run.data.tags), None)

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str], at: float) -> str:
        """The id of a new run that started at `at`, Unix time."""
        body = {
            "experiment_id": experiment,
            "run_name": name,
            "start_time": int(at * 1000),
            "tags": _pairs(tags),
        }
        return self._call(_RunAnswer, "POST", "runs/create", json=body).run.info.run_id

    def end_run(self, run: str, status: str, at: float) -> None:
        body = {"run_id": run, "status": status, "end_time": int(at * 1000)}
        self._call(Message, "POST", "runs/update", json=body)

    def set_tag(self, run: str, key: str, value: str) -> None:
        body = {"run_id": run, "key": key, "value": value[:_LONGEST_TAG]}
        self._call(Message, "POST", "runs/set-tag", json=body)

    def delete_tag(self, run: str, key: str) -> None:
        self._call(Message, "POST", "runs/delete-tag", json={"run_id": run, "key": key})

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        body = {"run_id": run, "tags": _pairs(tags)}
        self._call(Message, "POST", "runs/log-batch", json=body)

    def log_inputs(self, run: str, datasets: Sequence[Mapping[str, JsonValue]]) -> None:
        """Notes which data a run reads; the same data twice is once."""
        body = {"run_id": run, "datasets": list(datasets)}
        self._call(Message, "POST", "runs/log-inputs", json=body)

    def log_metrics(self, run: str, metrics: Mapping[str, float], at: float) -> None:
        values = [
            {"key": key, "value": value, "timestamp": int(at * 1000), "step": 0}
            for key, value in metrics.items()
        ]
        for start in range(0, len(values), _BATCH):
            body = {"run_id": run, "metrics": values[start : start + _BATCH]}
            self._call(Message, "POST", "runs/log-batch", json=body)

    def history(self, run: str, metric: str) -> list[Metric]:
        """Every recorded point of a metric, at most 25,000."""
        params = {"run_id": run, "metric_key": metric, "max_results": "25000"}
        return self._call(_HistoryAnswer, "GET", "metrics/get-history", params=params).metrics

    def users(self) -> list[str]:
        """The names of those who may log in."""
        users = self._call(_UserList, "GET", "users/list").users
        return [user.username for user in users]

    def keep_user(self, name: str, password: str, experiment: str) -> None:
        """A user with this password who may edit one experiment, and nothing else."""
        body = {"username": name, "password": password}
        if name in self.users():
            self._call(Message, "PATCH", "users/update-password", json=body)
        else:
            self._call(Message, "POST", "users/create", json=body)
        grant = {
            "username": name,
            "resource_type": "experiment",
            "resource_id": experiment,
            "permission": "EDIT",
        }
        try:
            self._request("POST", "/api/3.0/mlflow/users/permissions/grant", json=grant)
        except TrackingRefusedError as error:
            # given by a service before this one, or by a request whose answer was lost
            if "RESOURCE_ALREADY_EXISTS" not in str(error):
                raise

    def remove_user(self, name: str) -> None:
        """Also where there is none: the answer to an earlier request may have been lost."""
        body = {"username": name}
        self._request("DELETE", f"{_API}/users/delete", json=body, missing=True)

    def put_artifact(self, run: str, name: str, data: bytes) -> None:
        """Stores a file of a run, through the server or in the place that the server names."""
        match self._place(run, name):
            case str(path):
                self._request("PUT", path, content=data, timeout=60.0)
            case Path() as target:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            case filesystem, path:
                with filesystem.open_output_stream(path) as stream:
                    stream.write(data)

    def delete_artifact(self, run: str, name: str) -> None:
        """Deletes a file of a run, if it is there and the run is."""
        try:
            place = self._place(run, name)
        except TrackingRefusedError as error:
            if "RESOURCE_DOES_NOT_EXIST" in str(error):
                return  # the run is gone, and its files with it
            raise
        match place:
            case str(path):
                self._request("DELETE", path, missing=True, timeout=60.0)
            case Path() as target:
                target.unlink(missing_ok=True)
            case filesystem, path:
                if filesystem.get_file_info(path).type == fs.FileType.File:
                    filesystem.delete_file(path)

    def _place(self, run: str, name: str) -> str | Path | tuple[fs.FileSystem, str]:
        """Of a run's file: the server's route, or what the server itself names (files, a store)."""
        answer = self._call(_RunAnswer, "GET", "runs/get", params={"run_id": run})
        uri = answer.run.info.artifact_uri
        root = urlsplit(uri)
        if root.scheme == "mlflow-artifacts":
            path = quote(f"{root.path.strip('/')}/{name}")
            return f"/api/2.0/mlflow-artifacts/artifacts/{path}"
        if root.scheme in ("", "file"):
            # a plain path is no URI: "#" and "%" are part of it
            return Path(unquote(root.path) if root.scheme else uri) / name
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, f"{path}/{name}"

    def _call(self, answer: type[AnyAnswer], method: str, path: str, **options: Any) -> AnyAnswer:
        response = self._request(method, f"{_API}/{path}", **options)
        assert response is not None  # only a request with `missing` may have none
        return _parsed(answer, response)

    def _request(
        self, method: str, path: str, *, missing: bool = False, **options: Any
    ) -> httpx.Response | None:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise TrackingDownError(
                f"MLflow at {self.url}{self._way}: {error or type(error).__name__}"
            ) from error
        if missing and response.status_code == 404:
            return None
        if response.status_code != 200:
            # a status from 500 on says nothing about the request: it goes well once the server is
            # back
            kind = TrackingRefusedError if response.status_code < 500 else TrackingDownError
            raise kind(
                f"MLflow at {self.url}{path}: status {response.status_code}, {response.text[:300]}"
            )
        return response


def _parsed(answer: type[AnyAnswer], response: httpx.Response) -> AnyAnswer:
    try:
        return answer.model_validate(response.json())
    except ValueError as error:
        # a proxy's page, or a server of another kind
        words = " ".join(str(error).split())[:300]
        raise TrackingDownError(f"MLflow at {response.url}: unexpected answer, {words}") from error


def _pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value[:_LONGEST_TAG]} for key, value in tags.items()]

"""MLflow's REST interface, as much of it as a study's parent run needs; every call ends within seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from pyarrow import fs


class TrackingDownError(RuntimeError):
    """The server does not answer now; whoever asked tries again later."""


class TrackingRefusedError(TrackingDownError):
    """The server answers, and does not do this; other requests may still go well."""


class MLflow:
    """A client of one tracking server. Every method raises TrackingDownError if there is no sound answer."""

    def __init__(self, uri: str, timeout_s: float = 10.0) -> None:
        parts = urlsplit(uri)
        auth, headers = None, {}
        if parts.username:
            auth = httpx.BasicAuth(parts.username, parts.password or "")
        elif os.environ.get("MLFLOW_TRACKING_USERNAME"):
            auth = httpx.BasicAuth(
                os.environ["MLFLOW_TRACKING_USERNAME"],
                os.environ.get("MLFLOW_TRACKING_PASSWORD", ""),
            )
        elif os.environ.get("MLFLOW_TRACKING_TOKEN"):
            headers = {"Authorization": f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"}
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        port = f":{parts.port}" if parts.port else ""
        self.url = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
        self._http = httpx.Client(
            base_url=self.url, auth=auth, headers=headers, timeout=timeout_s, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        try:
            return self._http.get("/health", timeout=3.0).status_code == 200
        except httpx.HTTPError:
            return False

    def experiment(self, name: str, tags: Mapping[str, str]) -> str:
        """The id of the experiment of this name, made if there is none."""
        found = self._call(
            "GET", "experiments/get-by-name", params={"experiment_name": name}, missing=True
        )
        if found is not None:
            return str(found["experiment"]["experiment_id"])
        return str(
            self._call("POST", "experiments/create", {"name": name, "tags": _tags(tags)})[
                "experiment_id"
            ]
        )

    def runs(self, experiment: str, condition: str) -> list[dict[str, Any]]:
        """The runs of an experiment that meet MLflow's search condition, at most a thousand."""
        body = {"experiment_ids": [experiment], "filter": condition, "max_results": 1000}
        return list(self._call("POST", "runs/search", body).get("runs", []))

    def run_by_tag(self, experiment: str, tag: str, value: str) -> dict[str, Any] | None:
        found = self.runs(experiment, f"tags.`{tag}` = '{value}'")
        return found[0] if found else None

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str], at: float) -> str:
        body = {
            "experiment_id": experiment,
            "run_name": name,
            "start_time": int(at * 1000),
            "tags": _tags(tags),
        }
        return str(self._call("POST", "runs/create", body)["run"]["info"]["run_id"])

    def end_run(self, run: str, status: str, at: float) -> None:
        self._call(
            "POST", "runs/update", {"run_id": run, "status": status, "end_time": int(at * 1000)}
        )

    def set_tag(self, run: str, key: str, value: str) -> None:
        self._call("POST", "runs/set-tag", {"run_id": run, "key": key, "value": value[:5000]})

    def log_metrics(self, run: str, metrics: Mapping[str, float], at: float) -> None:
        values = [
            {"key": key, "value": value, "timestamp": int(at * 1000), "step": 0}
            for key, value in metrics.items()
        ]
        for start in range(0, len(values), 1000):
            self._call(
                "POST", "runs/log-batch", {"run_id": run, "metrics": values[start : start + 1000]}
            )

    def history(self, run: str, metric: str) -> list[dict[str, Any]]:
        """Every recorded point of a metric, at most 25,000."""
        params = {"run_id": run, "metric_key": metric, "max_results": "25000"}
        return list(self._call("GET", "metrics/get-history", params=params).get("metrics", []))

    def put_artifact(self, run: str, name: str, data: bytes) -> None:
        """Stores a file of a run, through the server or straight where the server says."""
        info = self._call("GET", "runs/get", params={"run_id": run})["run"]["info"]
        root = urlsplit(info["artifact_uri"])
        if root.scheme == "mlflow-artifacts":
            path = quote(f"{root.path.strip('/')}/{name}")
            self._request(
                "PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}", content=data, timeout=60.0
            )
            return
        if root.scheme in ("", "file"):
            target = Path(root.path) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            return
        filesystem, path = fs.FileSystem.from_uri(info["artifact_uri"])
        with filesystem.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        missing: bool = False,
    ) -> Any:
        response = self._request(
            method, f"/api/2.0/mlflow/{path}", json=body, params=params, missing=missing
        )
        return None if response is None else response.json()

    def _request(
        self, method: str, path: str, *, missing: bool = False, **options: Any
    ) -> httpx.Response | None:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise TrackingDownError(
                f"MLflow at {self.url}: {error or type(error).__name__}"
            ) from error
        if missing and response.status_code == 404:
            return None
        if response.status_code != 200:
            kind = TrackingRefusedError if response.status_code < 500 else TrackingDownError
            raise kind(
                f"MLflow at {self.url}{path}: status {response.status_code}, {response.text[:300]}"
            )
        return response


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value[:5000]} for key, value in tags.items()]

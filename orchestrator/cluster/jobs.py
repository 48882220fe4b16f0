"""Ray as the orchestrator sees it: the Jobs API and the nodes over HTTP, and the head of a local service.

Nothing here imports ray: the head is Ray's own command, everything else its dashboard's HTTP interface.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from orchestrator.cluster.nodes import Machine, Node

JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_NODE_ID = re.compile(r"^[0-9a-f]{56}$")
_HIDDEN = re.compile(r"^(node:|memory$|object_?store_?memory$|bundle_|.*_group_)", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    submission_id: str
    state: JobState
    message: str
    exit_code: int | None
    node: str  # of the driver
    metadata: Mapping[str, str]


class UnreachableError(RuntimeError):
    """The cluster does not answer now; what it was doing may still be going on."""


class Cluster:
    """A client of one Ray dashboard. Every method raises UnreachableError if there is no sound answer."""

    def __init__(self, url: str, token: str, timeout_s: float = 20.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def session(self) -> str:
        """The name of the head's life: another name means that a new head forgot everything."""
        return str(self._json("GET", "/api/version")["session_name"])

    def version(self) -> str:
        """The head's version of Ray."""
        return str(self._json("GET", "/api/version")["ray_version"])

    def machines(self) -> list[Machine]:
        """The nodes that live, the head first."""
        with _expected(self.url, "nodes"):
            found = [
                Machine(row["node_id"], row["node_ip"], bool(row["is_head_node"]))
                for row in self._alive()
            ]
        return sorted(found, key=lambda machine: (not machine.is_head, machine.address, machine.id))

    def nodes(self) -> list[Node]:
        """The nodes by Ray's id, with what is free on each."""
        with _expected(self.url, "the cluster's status"):
            status = self._json("GET", "/api/cluster_status")["data"]["clusterStatus"]
            if status is None:  # the second version of Ray's autoscaler reports none
                return self._counted_nodes()
            usage: Mapping[str, Mapping[str, Sequence[float]]] = (
                status["loadMetricsReport"].get("usageByNode") or {}
            )
            known = {name for name in usage if _NODE_ID.match(name)}
            # Ray's first autoscaler reports nodes by address.
            ids = (
                {}
                if len(known) == len(usage)
                else {machine.address: machine.id for machine in self.machines()}
            )
            return [_node(ids.get(name, name), amounts) for name, amounts in sorted(usage.items())]

    def _counted_nodes(self) -> list[Node]:
        """What the nodes have less what placement groups and actors hold. (The tasks of others are not seen.)"""
        taken: dict[str, Counter[str]] = defaultdict(Counter)
        for group in self._state("placement_groups", "CREATED"):
            for bundle in group["bundles"]:
                taken[bundle["node_id"]].update(bundle["unit_resources"])
        for actor in self._state("actors", "ALIVE"):
            if not actor["placement_group_id"]:
                taken[actor["node_id"]].update(actor["required_resources"] or {})
        rows = {row["node_id"]: row["resources_total"] for row in self._alive()}
        return [
            _node(
                name,
                {resource: (taken[name][resource], amount) for resource, amount in total.items()},
            )
            for name, total in sorted(rows.items())
        ]

    def _alive(self) -> list[dict[str, Any]]:
        return self._state("nodes", "ALIVE")

    def _state(self, what: str, state: str) -> list[dict[str, Any]]:
        """Rows of Ray's state API."""
        query = (
            f"detail=1&limit=10000&filter_keys=state&filter_predicates=%3D&filter_values={state}"
        )
        return list(self._json("GET", f"/api/v0/{what}?{query}")["data"]["result"]["result"])

    def jobs(self) -> dict[str, Job]:
        """The jobs submitted through the API, by submission id."""
        with _expected(self.url, "jobs"):
            return {
                job["submission_id"]: Job(
                    submission_id=job["submission_id"],
                    state=job["status"],
                    message=" ".join((job.get("message") or "").split())[:1000],
                    exit_code=job.get("driver_exit_code"),
                    node=job.get("driver_node_id") or "",
                    metadata=job.get("metadata") or {},
                )
                for job in self._json("GET", "/api/jobs/")
                if job.get("submission_id")
            }

    def submit(
        self,
        submission_id: str,
        entry: str,
        environment: Mapping[str, str],
        package: str,
        metadata: Mapping[str, str],
        node: str = "",
    ) -> None:
        """Starts a job; one of this id that exists already is the same job and is left alone.

        node: the id of the one node that its driver may run on; without it that is the head.
        """
        runtime: dict[str, Any] = {"env_vars": dict(environment)}
        if package:
            runtime["working_dir"] = f"gcs://{package}"
        body: dict[str, Any] = {
            "entrypoint": entry,
            "submission_id": submission_id,
            "runtime_env": runtime,
            "metadata": dict(metadata),
        }
        if node:
            body["entrypoint_label_selector"] = {"ray.io/node-id": node}
        response = self._send("POST", "/api/jobs/", json=body, timeout=60.0)
        if response.status_code != 200 and "already exists" not in response.text:
            raise UnreachableError(
                f"Ray at {self.url} refused job {submission_id}: {_last_line(response.text)}"
            )

    def stop(self, submission_id: str) -> None:
        self._send("POST", f"/api/jobs/{submission_id}/stop")

    def forget(self, submission_id: str) -> None:
        """Drops an ended job from Ray's own memory, which otherwise grows with every attempt."""
        self._send("DELETE", f"/api/jobs/{submission_id}")

    def log(self, submission_id: str) -> str:
        """What the driver printed so far; empty for a job that Ray does not know."""
        response = self._send("GET", f"/api/jobs/{submission_id}/logs")
        return str(response.json()["logs"] or "") if response.status_code == 200 else ""

    def upload(self, package: str, read: Callable[[], bytes]) -> None:
        """Puts a zip of sources where every node can have it; `read` is called unless it is there."""
        if self._send("GET", f"/api/packages/gcs/{package}").status_code == 200:
            return
        response = self._send("PUT", f"/api/packages/gcs/{package}", content=read(), timeout=120.0)
        if response.status_code != 200:
            raise UnreachableError(
                f"Ray at {self.url} did not take package {package}: {_last_line(response.text)}"
            )

    def _json(self, method: str, path: str) -> Any:
        response = self._send(method, path)
        if response.status_code != 200:
            raise UnreachableError(
                f"Ray at {self.url}{path}: status {response.status_code}, {_last_line(response.text)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise UnreachableError(f"Ray at {self.url}{path}: {error}") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise UnreachableError(
                f"Ray at {self.url}{path}: {error or type(error).__name__}"
            ) from error
        if response.status_code in (401, 403):
            raise UnreachableError(
                f"Ray at {self.url} refuses the token: give the cluster's own in ray_token_file"
            )
        return response


@contextmanager
def _expected(url: str, what: str) -> Iterator[None]:
    """An answer that is not built as Ray builds it (a head that is only coming up) is no answer."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnreachableError(
            f"Ray at {url} says {what} in an unknown way ({type(error).__name__}: {error})"
        ) from error


def _node(name: str, amounts: Mapping[str, Sequence[float]]) -> Node:
    shown = {resource: pair for resource, pair in amounts.items() if not _HIDDEN.match(resource)}
    return Node(
        id=name,
        total={resource: pair[1] for resource, pair in shown.items()},
        free={resource: max(0.0, pair[1] - pair[0]) for resource, pair in shown.items()},
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    return lines[-1][:500] if lines else "no text"

"""Ray as the orchestrator sees it: the Jobs API and the nodes, over the HTTP of Ray's dashboard.

This HTTP client is written by hand. `ray.job_submission` loads Ray itself (1.6 s of CPU time and
87 MiB, against 0.3 s and 29 MiB for httpx), and it knows nothing of nodes, placement groups and
packages, which come over the same HTTP.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, Unpack

import httpx
from pydantic import BaseModel, JsonValue, ValidationError

from contract.machine.certificates import trusted
from contract.machine.proxies import proxy_for, way_to
from orchestrator.cluster.nodes import Machine, Node
from orchestrator.cluster.ray_answers import (
    Actor,
    ClusterStatus,
    JobList,
    JobLogs,
    JobRequest,
    JobState,
    NodeAddress,
    NodeTotal,
    PlacementGroup,
    Row,
    RuntimeEnvironment,
    State,
    Version,
)

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")

_NODE_ID = re.compile(r"^[0-9a-f]{56}$")
# Resources of Ray's own: one for each node and placement group, and memory, which nobody asks for.
_HIDDEN = re.compile(r"^(node:|memory$|object_?store_?memory$|bundle_|.*_group_)", re.IGNORECASE)
_MAX_MESSAGE = 1000  # characters of a job's message, which becomes the cause of an attempt's end
_MAX_LOG = 64 << 20  # bytes of a driver's output, which the service holds as a whole
_ROWS = 10_000  # the most that Ray's state API returns; its default is 100

Answer = TypeVar("Answer", bound=BaseModel)


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


class JobRefusedError(UnreachableError):
    """The cluster answers and does not take this one job. Others may still start."""


class _Options(TypedDict, total=False):
    """What a request may carry, as httpx names it."""

    json: Mapping[str, JsonValue]
    content: bytes
    timeout: float


class Cluster:
    """A client of one Ray dashboard. Methods raise UnreachableError if there is no sound answer."""

    def __init__(self, url: str, token: str, timeout_s: float = 20.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        self._way = way_to(self.url)
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            proxy=proxy_for(self.url),
            verify=trusted(),
            trust_env=False,  # no .netrc comes in between, and the proxy is our choice
        )

    def close(self) -> None:
        self._http.close()

    def session(self) -> str:
        """The name of the head's life: another name means that a new head forgot everything."""
        return self._ask(Version, "/api/version", "its version").session_name

    def version(self) -> str:
        """The head's version of Ray."""
        return self._ask(Version, "/api/version", "its version").ray_version

    def machines(self) -> list[Machine]:
        """The nodes that live, the head first."""
        machines = [
            Machine(row.node_id, row.node_ip, row.is_head_node)
            for row in self._state(State[NodeAddress], "nodes", "ALIVE")
        ]
        return sorted(machines, key=lambda one: (not one.is_head, one.address, one.id))

    def nodes(self) -> list[Node]:
        """The nodes by Ray's id, with what is free on each."""
        status = self._ask(ClusterStatus, "/api/cluster_status", "the cluster's status").status
        if status is None:  # the second version of Ray's autoscaler reports none
            return self._counted_nodes()
        usage = status.load_metrics.usage_by_node or {}
        # Ray's first autoscaler reports nodes by address.
        by_id = all(_NODE_ID.match(name) for name in usage)
        ids = {} if by_id else {machine.address: machine.id for machine in self.machines()}
        return [_node(ids.get(name, name), amounts) for name, amounts in sorted(usage.items())]

    def _counted_nodes(self) -> list[Node]:
        """What the nodes have, less what placement groups and actors hold.

        The tasks of other users are not counted: Ray's state API does not say where they run.
        """
        taken: dict[str | None, Counter[str]] = defaultdict(Counter)
        for group in self._state(State[PlacementGroup], "placement_groups", "CREATED"):
            for bundle in group.bundles:
                taken[bundle.node_id].update(bundle.unit_resources)
        for actor in self._state(State[Actor], "actors", "ALIVE"):
            # An actor in a placement group lives on what its group holds already.
            if not actor.placement_group_id:
                taken[actor.node_id].update(actor.required_resources or {})
        rows = self._state(State[NodeTotal], "nodes", "ALIVE")
        totals = {row.node_id: row.resources_total for row in rows}
        return [
            _node(
                name,
                {resource: (taken[name][resource], amount) for resource, amount in total.items()},
            )
            for name, total in sorted(totals.items())
        ]

    def _state(self, answer: type[State[Row]], what: str, state: str) -> list[Row]:
        """Rows of Ray's state API."""
        filters = f"filter_keys=state&filter_predicates=%3D&filter_values={state}"
        path = f"/api/v0/{what}?detail=1&limit={_ROWS}&{filters}"
        return self._ask(answer, path, what).rows

    def jobs(self) -> dict[str, Job]:
        """The jobs submitted through the API, by submission id."""
        return {
            job.submission_id: Job(
                submission_id=job.submission_id,
                state=job.status,
                message=" ".join((job.message or "").split())[:_MAX_MESSAGE],
                exit_code=job.driver_exit_code,
                node=job.driver_node_id or "",
                metadata=job.metadata or {},
            )
            for job in self._ask(JobList, "/api/jobs/", "jobs").root
            if job.submission_id
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
        request = JobRequest(
            entrypoint=entry,
            submission_id=submission_id,
            runtime_env=RuntimeEnvironment(
                env_vars=dict(environment), working_dir=f"gcs://{package}" if package else None
            ),
            metadata=dict(metadata),
            entrypoint_label_selector={"ray.io/node-id": node} if node else None,
        )
        body = request.model_dump(exclude_none=True)
        response = self._send("POST", "/api/jobs/", json=body, timeout=60.0)
        # "already exists": an earlier request arrived, and its answer was lost.
        if response.status_code != 200 and "already exists" not in response.text:
            raise JobRefusedError(
                f"Ray at {self.url} refused job {submission_id}: {_last_line(response.text)}"
            )

    def stop(self, submission_id: str) -> None:
        """Asks Ray to end a job; it ends some time later, or is over already."""
        self._send("POST", f"/api/jobs/{submission_id}/stop")

    def forget(self, submission_id: str) -> None:
        """Drops an ended job from Ray's own memory, which otherwise grows with every attempt."""
        self._send("DELETE", f"/api/jobs/{submission_id}")

    def log(self, submission_id: str) -> str:
        """What the driver printed so far; empty for a job that Ray does not know.

        A log that is too large to hold is a line that says so.
        """
        path = f"/api/jobs/{submission_id}/logs"
        data = bytearray()
        try:
            with self._http.stream("GET", path) as response:
                for part in response.iter_bytes():
                    data += part
                    if len(data) > _MAX_LOG:
                        return f"the driver printed more than {_MAX_LOG >> 20} MiB, not kept\n"
        except httpx.ReadTimeout:
            # Ray reads the whole file before its first byte; one trial must not stop the loop
            return "Ray did not give the driver's log in time, not kept\n"
        except httpx.HTTPError as error:
            raise self._silent(path, error) from error
        if response.status_code != 200:
            return ""
        return self._parsed(JobLogs, bytes(data), "a log").logs or ""

    def upload(self, package: str, read: Callable[[], bytes]) -> None:
        """Puts a zip of sources where every node can fetch it; calls `read` unless it is there."""
        path = f"/api/packages/gcs/{package}"
        if self._send("GET", path).status_code == 200:
            return
        response = self._send("PUT", path, content=read(), timeout=120.0)
        if response.status_code != 200:
            raise UnreachableError(
                f"Ray at {self.url} did not take package {package}: {_last_line(response.text)}"
            )

    def _ask(self, answer: type[Answer], path: str, what: str) -> Answer:
        response = self._send("GET", path)
        if response.status_code != 200:
            raise UnreachableError(
                f"Ray at {self.url}{path}: status {response.status_code}, "
                f"{_last_line(response.text)}"
            )
        return self._parsed(answer, response.content, what)

    def _parsed(self, answer: type[Answer], data: bytes, what: str) -> Answer:
        """The answer as a record. A head that is only coming up answers with something else."""
        try:
            return answer.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UnreachableError(
                f"Ray at {self.url} says {what} in an unknown way ({where}: {first['msg']})"
            ) from error

    def _send(self, method: str, path: str, **options: Unpack[_Options]) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._silent(path, error) from error
        if response.status_code in (401, 403):
            raise UnreachableError(
                f"Ray at {self.url} refuses the token: give the cluster's own in ray_token_file"
            )
        return response

    def _silent(self, path: str, error: httpx.HTTPError) -> UnreachableError:
        words = f"{error or type(error).__name__}"
        return UnreachableError(f"Ray at {self.url}{path}{self._way}: {words}")


def _node(name: str, amounts: Mapping[str, Sequence[float]]) -> Node:
    """amounts: used and total of each resource."""
    shown = {resource: pair for resource, pair in amounts.items() if not _HIDDEN.match(resource)}
    return Node(
        id=name,
        total={resource: total for resource, (_, total) in shown.items()},
        # Groups, actors and nodes come from three requests, so they need not fit together.
        free={resource: max(0.0, total - used) for resource, (used, total) in shown.items()},
    )


def _last_line(text: str) -> str:
    """The last line of a traceback or a page that says something: the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    return lines[-1][:500] if lines else "no text"

"""The service's HTTP interface in this process, without a loop, a cluster or MLflow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from contract.answers import Check, ClusterView, Role, StagedNode, Staging
from orchestrator.cluster.nodes import Node
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger
from orchestrator.schedule.measures import Measures
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import identity, plan, submission

USERS: dict[str, Role] = {"root": "admin", "ann": "submit", "bob": "submit", "eve": "read"}


NODES = [Node("n0", {"CPU": 4.0}, {"CPU": 4.0}), Node("n1", {"CPU": 4.0}, {"CPU": 4.0})]


class FakeHub:
    """A hub without a loop, a cluster or MLflow."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = ServiceSettings(home=str(home), **settings)
        self.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.ended = False
        with self.ledger.writing() as connection:
            for name, role in USERS.items():
                auth.set_user(connection, name, role, f"token-of-{name}", time.time())

    def waits(self) -> dict[str, Any]:
        return {}

    def nodes(self) -> list[Node]:
        return NODES

    def cluster(self) -> ClusterView:
        return ClusterView(state="ready", nodes=[])

    def tracking_uri(self) -> str:
        return "http://127.0.0.1:1"

    def driver_log(self, submission_id: str) -> str:
        return f"driver of {submission_id}"

    def examine(self) -> list[Check]:
        return [Check(name="nodes", ok=True, found="2 nodes")]

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        return Staging(
            staging=f"stage-{0:016x}",
            nodes=[StagedNode(node="n0", address=uris[0], state="running")],
        )

    def staging(self, name: str) -> Staging:
        return Staging(staging=name, nodes=[])

    def experiment_id(self, name: str) -> str:
        return ""

    def measures(self) -> Measures:
        return Measures()

    def touch(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


class Http:
    """Requests to an app in this process. An exception in a route is a 500, as of a server."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._request(method, path, options))

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    def __getattr__(self, method: str) -> Any:
        return lambda path, **options: self.request(method, path, **options)


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer token-of-{name}"}


def post(http: Http, name: str = "ann", **fields: Any) -> httpx.Response:
    plans = fields.pop("plans", (plan("a", identity(name)),))
    body = submission(*plans, **fields).model_dump_json()
    return http.post("/v1/studies", content=body, headers=by(name))


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


def routes(http: Http) -> list[tuple[str, str]]:
    paths = http.get("/openapi.json").json()["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]

"""The HTTP interface: every route under /v1, JSON in the records of contract.answers."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from contract.answers import Health
from orchestrator.server.errors import add_errors, refuse
from orchestrator.server.front.gate import Gate
from orchestrator.server.hub import Hub
from orchestrator.server.routes import (
    code,
    data,
    nodes,
    pages,
    queue,
    reports,
    service,
    studies,
    trials,
    users,
)


def build_app(hub: Hub, version: str, health: Callable[[], Health] | None = None) -> FastAPI:
    """The application that a server runs for `hub`. version: of the installed maskray.

    health: whether the loop and the ledger work; without it only the server speaks.
    """
    app = FastAPI(
        title="maskray", version=version, description="Studies of Mask R-CNN on a Ray cluster."
    )
    app.state.hub = hub
    app.state.health = health or (lambda: Health(version=version))
    add_errors(app)
    app.add_middleware(Gate, hub=hub, refuse=refuse)
    for resource in (service, studies, pages, trials, queue, code, users, nodes, data, reports):
        app.include_router(resource.router)
    app.include_router(service.metrics_router)
    return app

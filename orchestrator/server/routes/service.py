"""The service itself: health, info, retention, shutdown."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from contract.answers import Collected, Ending, Health, Info, RemovalView, Retention
from orchestrator.ledger.retention import (
    apply_forgotten,
    apply_retention,
    plan_forgotten,
    plan_retention,
)
from orchestrator.server.access import ADMIN, READ, HubOfApp, Reader
from orchestrator.server.front.metrics import exposition
from orchestrator.settings import storage_root

router = APIRouter(prefix="/v1")
metrics_router = APIRouter()  # where Prometheus looks by itself


@router.get("/health")
async def health(request: Request, response: Response) -> Health:
    """The one route without a token: whether the loop and the ledger work. 503 if not."""
    # Asynchronous: it must answer while every worker thread waits for the database.
    answer: Health = request.app.state.health()
    if not answer.ok:
        response.status_code = 503
    return answer


@metrics_router.get("/metrics", dependencies=READ)
def metrics(hub: HubOfApp) -> PlainTextResponse:
    """For Prometheus, which shows a token of role `read`."""
    return PlainTextResponse(exposition(hub), media_type=CONTENT_TYPE_LATEST)


@router.get("/info")
def info(request: Request, hub: HubOfApp, user: Reader) -> Info:
    return Info(
        version=request.app.version,
        mlflow_uri=hub.settings.mlflow_public or hub.tracking_uri(),
        has_mlflow=hub.settings.mlflow != "",
        storage=storage_root(hub.settings),
        cluster=hub.cluster(),
        user=user.name,
        role=user.role,
    )


@router.post("/gc", dependencies=ADMIN)
def collect(body: Retention, hub: HubOfApp) -> Collected:
    """Lists the checkpoints that a retention policy lets go; with `apply` it deletes them."""
    now, days = time.time(), body.checkpoints_days
    with hub.ledger.reading() as transaction:
        removals = plan_retention(transaction, now, days)
    freed = apply_retention(hub.ledger, removals, now, days) if body.apply else 0
    listed = [RemovalView.model_validate(removal) for removal in removals]
    return Collected(removals=listed, applied=body.apply, freed_bytes=freed)


@router.post("/gc/forgotten", dependencies=ADMIN)
def collect_forgotten(hub: HubOfApp, apply: bool = False) -> Collected:
    """Lists the folders that forgotten studies left; with `apply` it deletes them."""
    with hub.ledger.reading() as transaction:
        removals = plan_forgotten(transaction, storage_root(hub.settings))
    freed = apply_forgotten(hub.ledger, removals, time.time()) if apply else 0
    listed = [RemovalView.model_validate(removal) for removal in removals]
    return Collected(removals=listed, applied=apply, freed_bytes=freed)


@router.post("/shutdown", dependencies=ADMIN)
def shutdown(hub: HubOfApp) -> Ending:
    hub.end()
    return Ending()

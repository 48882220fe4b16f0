"""What runs, what waits, and what happened: the queue and the events."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from contract.answers import EventPage, EventView, QueueView
from orchestrator.ledger.opening import Ledger
from orchestrator.server import views
from orchestrator.server.access import READ, HubOfApp
from orchestrator.server.routes.large import as_bytes

router = APIRouter(prefix="/v1")

_LOOK_EVERY_S = 0.25  # at the ledger, for a request that waits for an event


@router.get("/queue", dependencies=READ, response_model=QueueView)
def queue(hub: HubOfApp) -> Response:
    """What runs, and what waits in the order in which it would start."""
    with hub.ledger.reading() as transaction:
        return as_bytes(views.queue(transaction, hub.waits()))


@router.get("/events", dependencies=READ)
async def events(
    hub: HubOfApp,
    study: Annotated[str, Query(max_length=100)] = "",
    after: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    wait_s: Annotated[float, Query(ge=0, le=60)] = 0,
) -> EventPage:
    """Events after the id `after`; without any it waits for one up to `wait_s`."""
    # Asynchronous: a waiting request must not hold one of the few worker threads.
    deadline = time.monotonic() + wait_s
    while True:
        page = await run_in_threadpool(_events, hub.ledger, after, study)
        if page or time.monotonic() >= deadline:
            return EventPage(events=page, next=page[-1].id if page else after)
        await asyncio.sleep(_LOOK_EVERY_S)


def _events(ledger: Ledger, after: int, study: str) -> list[EventView]:
    with ledger.reading() as transaction:
        return views.events(transaction, after, study)

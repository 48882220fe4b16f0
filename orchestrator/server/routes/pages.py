"""A study's page for a browser: behind the token, or by a link that is signed for some days."""

from __future__ import annotations

import hashlib
import hmac
import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse

from contract.answers import PageLink
from contract.files import uri_join
from orchestrator.ledger import queries
from orchestrator.local.processes import own_token
from orchestrator.server.access import READ, HubOfApp, Id, reader
from orchestrator.server.errors import absent
from orchestrator.server.hub import Hub
from orchestrator.server.reports import PAGE
from orchestrator.trial_folder import REPORT_BYTES, TrialFolder

router = APIRouter()
_VALID_S = 7 * 86400
# The page holds no script; should one ever get in, a browser does not run it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the signature
    "Cache-Control": "no-store",
}


@router.get("/v1/studies/{study}/link", dependencies=READ)
def link(study: Id, hub: HubOfApp) -> PageLink:
    """The address of the study's page with a signature, which stands for a token until it ends."""
    with hub.ledger.reading() as transaction:
        if queries.study_row(transaction, study) is None:
            raise absent("study", study)
    expires = int(time.time()) + _VALID_S
    signature = _signature(hub, study, expires)
    return PageLink(
        path=f"/studies/{study}?expires={expires}&signature={signature}", expires=expires
    )


@router.get("/studies/{study}", response_class=HTMLResponse)
def page(
    study: Id,
    request: Request,
    hub: HubOfApp,
    expires: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    signature: Annotated[str, Query(max_length=64)] = "",
) -> HTMLResponse:
    """The report as it is now. While trials run it has values only."""
    if signature:
        _check(hub, study, expires, signature)
    else:
        reader(request, hub)
    with hub.ledger.reading() as transaction:
        row = queries.study_row(transaction, study)
    if row is None:
        raise absent("study", study)
    # The study's trials can write there: no link of theirs may show a file of the service.
    data = TrialFolder(uri_join(row.storage, study)).read(PAGE, REPORT_BYTES)
    if data is None:
        raise HTTPException(404, f"study {study}: its page is not made yet; try again in a minute")
    return HTMLResponse(data, headers=_HEADERS)


def _check(hub: Hub, study: str, expires: int, signature: str) -> None:
    good = hmac.compare_digest(signature.encode(), _signature(hub, study, expires).encode())
    # One answer for both, so that it tells nothing about signatures.
    if not good or expires < time.time():
        raise HTTPException(
            401,
            f'this link is not valid, or not any more: "maskray status {study[:100]}" prints one',
        )


def _signature(hub: Hub, study: str, expires: int) -> str:
    key = own_token(Path(hub.settings.home) / "link-key")
    return hmac.new(key.encode(), f"{study}\n{expires}".encode(), hashlib.sha256).hexdigest()

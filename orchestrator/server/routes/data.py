"""Datasets as the service sees them: a client that plans a study needs no access of its own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response

from contract.data import MANIFEST_NAME, ManifestHeader
from contract.files import uri_join
from orchestrator.server.accept import check_uris
from orchestrator.server.access import READ, HubOfApp
from orchestrator.study.proof import manifest_bytes

router = APIRouter(prefix="/v1")


@router.get("/manifests", dependencies=READ)
def manifest(hub: HubOfApp, uri: Annotated[str, Query(min_length=1, max_length=2000)]) -> Response:
    """The bytes of a packed dataset's manifest, from one of the service's roots."""
    check_uris([("uri", uri)], hub.settings)
    data = manifest_bytes(uri)
    place = uri_join(uri, MANIFEST_NAME)
    if data is None:
        raise HTTPException(404, f"{place}: the service cannot read such a file either")
    try:
        ManifestHeader.parse(data)  # nothing else leaves the service by this way
    except ValueError:
        raise HTTPException(404, f"{place}: is no manifest of a packed dataset") from None
    return Response(data, media_type="application/json")

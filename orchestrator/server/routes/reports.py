"""A study's report, made by the service: its reader needs no access to the trials' storage."""

from __future__ import annotations

import io
import threading
import zipfile
from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

from contract.machine.folders import scratch
from orchestrator.results.report import Contents, Format, build_report
from orchestrator.server import views
from orchestrator.server.access import READ, HubOfApp, Id
from orchestrator.server.errors import absent

router = APIRouter(prefix="/v1/studies")

DRAWING = threading.Lock()  # matplotlib's state is the whole process's


@router.get("/{study}/report", dependencies=READ)
def report(study: Id, hub: HubOfApp, form: Format | None = None) -> Response:
    """The files of the report as a zip; one alone with `form`."""
    with hub.ledger.reading() as transaction:
        matches = views.study_views(transaction, hub.waits(), study)
    if not matches:
        raise absent("study", study)
    if form is not None:
        with DRAWING:
            return Response(Contents.of(matches[0]).rendered(form))
    with DRAWING, scratch("report") as folder:
        built = build_report(matches[0], Path(folder) / study)
        files = {path.name: path.read_bytes() for path in sorted(built.folder.iterdir())}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Response(packed.getvalue(), media_type="application/zip")


@router.put("/{study}/report", include_in_schema=False)
def upload(study: Id) -> None:
    """What clients of earlier versions send."""
    raise HTTPException(410, f"study {study}: the service makes the report itself; send none")

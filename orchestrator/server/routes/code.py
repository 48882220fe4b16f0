"""Packages of sources, each known by its SHA-256."""

from __future__ import annotations

import re

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from contract.answers import CodeKept
from orchestrator.server.access import READ, SUBMIT, HubOfApp
from orchestrator.server.uploads import body_of, check_code
from orchestrator.settings import ServiceSettings, code_files, code_name

router = APIRouter(prefix="/v1/code")

_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@router.head("/{sha256}", dependencies=READ)
def has_code(sha256: str, hub: HubOfApp) -> Response:
    """200 if the package is there, 404 if it is not."""
    _check_name(sha256)
    there = code_files(hub.settings).exists(code_name(sha256))
    return Response(status_code=200 if there else 404)


@router.put("/{sha256}", dependencies=SUBMIT)
async def put_code(sha256: str, request: Request, hub: HubOfApp) -> CodeKept:
    """Keeps a package of sources, a zip, under the hash of its bytes."""
    data = await body_of(request, hub.settings.max_code_mib << 20)
    _check_name(sha256)
    return await run_in_threadpool(_keep_code, hub.settings, sha256, data)


def _check_name(sha256: str) -> None:
    # The name becomes a file name under the storage, so it must hold no path.
    if not _SHA256.match(sha256):
        raise HTTPException(
            400, "code: the name is the SHA-256 of the package, 64 hexadecimal digits"
        )


def _keep_code(settings: ServiceSettings, sha256: str, data: bytes) -> CodeKept:
    check_code(data, sha256, settings.max_code_mib)
    code_files(settings).write(code_name(sha256), data)
    return CodeKept(code=sha256, bytes=len(data))

"""Short jobs on every node of the cluster: the doctor's probes, and staging."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Path

from contract.answers import Checks, StageRequest, Staging
from orchestrator.server.accept import check_uris
from orchestrator.server.access import READ, SUBMIT, HubOfApp

router = APIRouter(prefix="/v1")


@router.post("/doctor", dependencies=SUBMIT)
def examine(hub: HubOfApp) -> Checks:
    """Starts a short job on every node: the checks of `maskray doctor`."""
    return Checks(checks=hub.examine())


@router.post("/staging", dependencies=SUBMIT)
def stage(body: StageRequest, hub: HubOfApp) -> Staging:
    """Starts a job on every node that fetches datasets into its cache."""
    check_uris([(f"uris.{number}", uri) for number, uri in enumerate(body.uris)], hub.settings)
    return hub.stage(body.uris, body.cache_gib)


@router.get("/staging/{name}", dependencies=READ)
def staging(name: Annotated[str, Path(pattern=r"^stage-[0-9a-f]{16}$")], hub: HubOfApp) -> Staging:
    answer = hub.staging(name)
    if not answer.nodes:
        # Only Ray's head remembers a staging: nothing is kept of it in the ledger.
        raise HTTPException(
            404,
            f"staging {name!r}: there is none, or Ray's head was restarted since: stage again",
        )
    return answer

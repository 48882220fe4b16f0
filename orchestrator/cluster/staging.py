"""Filling every node's cache with a dataset ahead of a study: one job on each node, all at the same time.

Nothing of it is kept but the jobs themselves, in Ray's memory: a service that starts anew finds them there.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from contract.answers import StagedNode, Staging
from orchestrator.cluster.jobs import ENDED, Cluster, Job, UnreachableError
from orchestrator.settings import ServiceSettings

_NODE, _ADDRESS, _AT = "stage_node", "stage_address", "stage_at"
_REMEMBERED_S = 3600.0  # of a staging, for whoever follows it
_SHARDS = re.compile(r"^fetching (\d+)/(\d+)$", re.MULTILINE)


def begin(
    cluster: Cluster, settings: ServiceSettings, uris: Sequence[str], cache_gib: float, now: float
) -> Staging:
    """Starts `maskray data stage` on every node. Raises UnreachableError if Ray does not answer or has no node."""
    _forget_old(cluster, now)
    machines = cluster.machines()
    if not machines:
        raise UnreachableError(f"Ray at {cluster.url} has no node yet; try again")
    name = f"stage-{secrets.token_hex(8)}"
    command = [
        settings.entry[0],
        "-m",
        "pipelines",
        "data",
        "stage",
        *uris,
        "--cache-gib",
        f"{cache_gib:g}",
    ]
    entry = f"exec {shlex.join([*command, '--lines', '--json'])}"
    for index, machine in enumerate(machines):
        metadata = {_NODE: machine.id, _ADDRESS: machine.address, _AT: f"{now:.0f}"}
        cluster.submit(f"{name}-{index}", entry, settings.environment, "", metadata, machine.id)
    return look(cluster, name)


def _forget_old(cluster: Cluster, now: float) -> None:
    for name, job in cluster.jobs().items():
        if (
            _AT in job.metadata
            and job.state in ENDED
            and now - float(job.metadata[_AT]) > _REMEMBERED_S
        ):
            cluster.forget(name)


def look(cluster: Cluster, name: str) -> Staging:
    """How far the nodes are; none is in it if Ray does not know the staging (any more)."""
    jobs = sorted(
        (job, known) for job, known in cluster.jobs().items() if job.rpartition("-")[0] == name
    )
    return Staging(staging=name, nodes=[_node(known, cluster.log(job)) for job, known in jobs])


def _node(job: Job, log: str) -> StagedNode:
    steps = _SHARDS.findall(log)
    done, total = (int(number) for number in (steps[-1] if steps else (0, 0)))
    node, address = job.metadata.get(_NODE, job.node), job.metadata.get(_ADDRESS, "")
    found = StagedNode(node=node, address=address, state="running", done=done, total=total)
    if job.state not in ENDED:
        return found
    said = _last_object(log)
    if job.state == "SUCCEEDED" and said.get("nodes"):
        return StagedNode.model_validate({**said["nodes"][0], "node": node, "address": address})
    error = said.get("error") or job.message or f"its job is {job.state}"
    return found.model_copy(update={"state": "failed", "error": str(error)})


def _last_object(log: str) -> Mapping[str, Any]:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""Filling every node's cache with a dataset ahead of a study: one job on each node, all at the same time.

Nothing of it is kept but the jobs themselves, in Ray's memory: a service that starts anew finds them there.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
from collections.abc import Mapping
from typing import Any

from orchestrator.cluster import ENDED, Cluster, Job
from orchestrator.config import ServiceSettings, StagedNode, Staging

_NODE, _ADDRESS = "stage_node", "stage_address"
_SHARDS = re.compile(r"^fetching (\d+)/(\d+)$", re.MULTILINE)


def begin(cluster: Cluster, settings: ServiceSettings, uri: str, cache_gib: float) -> Staging:
    """Starts `maskray data stage` on every node. Raises UnreachableError if Ray does not answer."""
    for name, job in cluster.jobs().items():
        if _ADDRESS in job.metadata and job.state in ENDED:
            cluster.forget(name)
    name = f"stage-{secrets.token_hex(8)}"
    command = [settings.entry[0], "-m", "pipelines", "data", "stage", uri, "--cache-gib", f"{cache_gib:g}"]
    for index, machine in enumerate(cluster.machines()):
        entry = f"exec {shlex.join([*command, '--lines', '--json'])}"
        metadata = {_NODE: machine.id, _ADDRESS: machine.address}
        cluster.submit(f"{name}-{index}", entry, settings.environment, "", metadata, machine.id)
    return look(cluster, name)


def look(cluster: Cluster, name: str) -> Staging:
    """How far the nodes are; none is in it if Ray does not know the staging (any more)."""
    jobs = sorted((job, known) for job, known in cluster.jobs().items() if job.rpartition("-")[0] == name)
    return Staging(staging=name, nodes=[_node(known, cluster.log(job)) for job, known in jobs])


def _node(job: Job, log: str) -> StagedNode:
    steps = _SHARDS.findall(log)
    done, total = (int(number) for number in (steps[-1] if steps else (0, 0)))
    node, address = job.metadata.get(_NODE, job.node), job.metadata.get(_ADDRESS, "")
    found = StagedNode(node=node, address=address, state="running", done=done, total=total)
    if job.state not in ENDED:
        return found
    said = _last_object(log)
    if job.state == "SUCCEEDED" and "bytes" in said:
        return found.model_copy(update={"state": "done", "bytes": said["bytes"], "cache": said["cache"]})
    error = said.get("error") or job.message or f"its job is {job.state}"
    return found.model_copy(update={"state": "failed", "error": str(error)})


def _last_object(log: str) -> Mapping[str, Any]:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

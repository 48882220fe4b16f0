"""Filling every node's cache with a dataset ahead of a study: one job on each node, all at once.

Ray's memory of the jobs is the only record of a staging. A service that starts anew reads it there.
"""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from contract.answers import StagedNode, Staging
from orchestrator.cluster.jobs import ENDED, Cluster, Job, UnreachableError
from orchestrator.settings import ServiceSettings

_REMEMBERED_S = 3600.0  # after the start: whoever follows a staging has read its end by then
# A line that `maskray data stage --lines` prints.
_PROGRESS = re.compile(r"^fetching (\d+)/(\d+)$", re.MULTILINE)


class _Label(BaseModel):
    """The metadata of a staging job, which Ray keeps as strings."""

    stage_node: str
    stage_address: str
    stage_at: float


class _Output(BaseModel):
    """The last JSON object that `maskray data stage --json` prints: its nodes, or its error."""

    nodes: list[StagedNode] = []
    error: str = ""


@dataclass(frozen=True)
class _NodeJob:
    job: Job
    label: _Label


def begin(
    cluster: Cluster, settings: ServiceSettings, uris: Sequence[str], cache_gib: float, now: float
) -> Staging:
    """Starts `maskray data stage` on every node.

    Raises UnreachableError if Ray does not answer or has no node.
    """
    _forget_old(cluster, now)
    machines = cluster.machines()
    if not machines:
        raise UnreachableError(f"Ray at {cluster.url} has no node yet; try again")
    name = f"stage-{secrets.token_hex(8)}"
    command = [settings.entry[0], "-m", "pipelines", "data", "stage", *uris]
    options = ["--cache-gib", f"{cache_gib:g}", "--lines", "--json"]
    # exec: the signal that ends the job must reach Python, and not a shell in front of it.
    entry = f"exec {shlex.join([*command, *options])}"
    for index, machine in enumerate(machines):
        metadata = {
            "stage_node": machine.id,
            "stage_address": machine.address,
            "stage_at": f"{now:.0f}",
        }
        cluster.submit(f"{name}-{index}", entry, settings.environment, "", metadata, machine.id)
    return look(cluster, name)


def look(cluster: Cluster, name: str) -> Staging:
    """How far the nodes are. No node is listed if Ray does not know the staging any more."""
    known = _node_jobs(cluster)
    ids = sorted(job_id for job_id in known if job_id.rpartition("-")[0] == name)
    nodes = [_node(known[job_id], cluster.log(job_id)) for job_id in ids]
    return Staging(staging=name, nodes=nodes)


def _forget_old(cluster: Cluster, now: float) -> None:
    for job_id, known in _node_jobs(cluster).items():
        if known.job.state in ENDED and now - known.label.stage_at > _REMEMBERED_S:
            cluster.forget(job_id)


def _node_jobs(cluster: Cluster) -> dict[str, _NodeJob]:
    """The jobs of all stagings. Jobs of other kinds carry no such label."""
    staging_jobs = {}
    for job_id, job in cluster.jobs().items():
        try:
            staging_jobs[job_id] = _NodeJob(job, _Label.model_validate(job.metadata))
        except ValidationError:
            continue
    return staging_jobs


def _node(known: _NodeJob, log: str) -> StagedNode:
    job, where = known.job, {"node": known.label.stage_node, "address": known.label.stage_address}
    steps = _PROGRESS.findall(log)
    done, total = (int(number) for number in (steps[-1] if steps else (0, 0)))
    node = StagedNode(**where, state="running", done=done, total=total)
    if job.state not in ENDED:
        return node
    output = _last_output(log)
    if job.state == "SUCCEEDED" and output.nodes:
        return output.nodes[0].model_copy(update=where)  # the program knows no node's id
    error = output.error or job.message or f"its job is {job.state}"
    return node.model_copy(update={"state": "failed", "error": error})


def _last_output(log: str) -> _Output:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    try:
        return _Output.model_validate_json(lines[-1]) if lines else _Output()
    except ValidationError:
        return _Output()  # a line that was cut off: the job's state says what happened

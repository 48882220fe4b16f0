"""Tells Ray that all its nodes go away: trials write a checkpoint, which counts as a preemption.

`drain.py HOST:PORT SECONDS` waits until no job runs any more, at most so long.
"""

from __future__ import annotations

import sys
import time

from ray._raylet import RAY_INTERNAL_NAMESPACE_PREFIX, GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

_POLL_S = 1.0


def main(address: str, patience_s: float) -> None:
    """Prints what each node says to it."""
    client = GcsClient(address=address)
    deadline = time.time() + patience_s
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    for node in _living(client):
        accepted, why = client.drain_node(
            node, reason, "the time limit of its allocation", int(deadline * 1000)
        )
        print(f"node {node}: {'drains' if accepted else why}", flush=True)
    while time.time() < deadline and _jobs(client):
        time.sleep(_POLL_S)


def _living(client: GcsClient) -> list[str]:
    alive = GcsNodeInfo.GcsNodeState.Value("ALIVE")
    nodes = client.get_all_node_info().values()
    return [node.node_id.hex() for node in nodes if node.state == alive]


def _jobs(client: GcsClient) -> int:
    """Those that run. A trial is one; the dashboard is another, and never ends."""
    running = (job for job in client.get_all_job_info().values() if not job.is_dead)
    return sum(
        not job.config.ray_namespace.startswith(RAY_INTERNAL_NAMESPACE_PREFIX) for job in running
    )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))

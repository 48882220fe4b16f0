"""A Ray cluster of several nodes on this machine, in a process of its own.

It drives `ray.cluster_utils.Cluster`. Each line on stdin is a JSON request, each line on stdout its
answer. The end of stdin ends the cluster.
{"add": {"num_cpus": 1, ...}} -> {"node": id} · {"kill": id} · {"drain": id, "seconds": 60} -> {}
The first node is the head: {"node": id, "dashboard": URL, "address": "127.0.0.1:PORT"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

COMMON = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    cluster = Cluster()
    nodes: dict[str, Any] = {}
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_serve(cluster, nodes, json.loads(line))) + "\n")
    finally:
        cluster.shutdown()


def _serve(cluster: Cluster, nodes: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if "add" in request:
        head = cluster.head_node is None
        extra = (
            {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
            if head
            else {}
        )
        node = cluster.add_node(**COMMON, **extra, **request["add"])
        nodes[node.node_id] = node
        return {
            "node": node.node_id,
            "dashboard": f"http://{cluster.webui_url}",
            "address": cluster.address,
        }
    if "kill" in request:
        cluster.remove_node(nodes.pop(request["kill"]), allow_graceful=False)
        return {}
    deadline_ms = int((time.time() + request["seconds"]) * 1000)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(
        request["drain"], reason, "a test", deadline_ms
    )
    return {"accepted": accepted, "why": why}


if __name__ == "__main__":
    main()

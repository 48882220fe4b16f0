"""Ray's answers as nodes: with the first autoscaler's report, without it, of a starting head."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from orchestrator.cluster.jobs import Cluster, UnreachableError
from orchestrator.cluster.nodes import Node

HEAD, OTHER = "a" * 56, "b" * 56


def cluster(**answers: Any) -> Cluster:
    """A client of a dashboard that gives these answers, by the last part of the path."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answers[request.url.path.rstrip("/").rpartition("/")[2]])

    client = Cluster("http://ray", "")
    client._http = httpx.Client(base_url="http://ray", transport=httpx.MockTransport(answer))
    return client


def rows(*each: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"result": {"result": list(each)}}}


def node(name: str, address: str, head: bool, **total: float) -> dict[str, Any]:
    hidden = {"memory": 1e9, "object_store_memory": 1e8, f"node:{address}": 1.0}
    return {
        "node_id": name,
        "node_ip": address,
        "is_head_node": head,
        "resources_total": {**hidden, **total},
    }


NODES = rows(
    node(OTHER, "10.0.0.2", False, CPU=8.0, GPU=4.0), node(HEAD, "10.0.0.1", True, CPU=2.0)
)


def test_the_first_autoscaler_reports_what_is_used():
    usage = {
        HEAD: {"CPU": [0.5, 2.0], "memory": [0, 1e9]},
        OTHER: {"CPU": [8.0, 8.0], "GPU": [1.0, 4.0]},
    }
    nodes = cluster(
        cluster_status={"data": {"clusterStatus": {"loadMetricsReport": {"usageByNode": usage}}}}
    ).nodes()
    assert nodes == [
        Node(HEAD, {"CPU": 2.0}, {"CPU": 1.5}),
        Node(OTHER, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 0.0, "GPU": 3.0}),
    ]


def test_without_that_report_groups_and_actors_are_counted():
    bundles = [{"node_id": OTHER, "unit_resources": {"CPU": 1.0, "GPU": 1.0}} for _ in range(3)]
    actors = [
        {"node_id": OTHER, "placement_group_id": "g", "required_resources": {"CPU_group_g": 1.0}},
        {"node_id": HEAD, "placement_group_id": None, "required_resources": {"CPU": 0.5}},
        {"node_id": HEAD, "placement_group_id": None, "required_resources": {}},
    ]
    nodes = cluster(
        cluster_status={"data": {"clusterStatus": None}},
        nodes=NODES,
        placement_groups=rows({"bundles": bundles}),
        actors=rows(*actors),
    ).nodes()
    assert nodes == [
        Node(HEAD, {"CPU": 2.0}, {"CPU": 1.5}),
        Node(OTHER, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 5.0, "GPU": 1.0}),
    ]


def test_the_head_is_the_first_machine():
    assert [machine.id for machine in cluster(nodes=NODES).machines()] == [HEAD, OTHER]


@pytest.mark.parametrize(
    "answer", [{}, {"data": None}, {"data": {"result": None}}, {"data": {"clusterStatus": {}}}, []]
)
def test_an_answer_of_a_head_that_comes_up_is_no_answer(answer):
    broken = cluster(cluster_status=answer, nodes=answer, jobs={"a": 1})
    for ask in (broken.nodes, broken.machines, broken.jobs):
        with pytest.raises(UnreachableError):
            ask()

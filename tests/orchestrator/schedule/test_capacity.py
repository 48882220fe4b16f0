"""What an autoscaling cluster is asked for."""

from __future__ import annotations

from orchestrator.schedule.capacity import wanted
from orchestrator.schedule.gang import Gang
from orchestrator.settings import NodeShape

SHAPES = (
    NodeShape(resources={"CPU": 96, "GPU": 8}, count=2),
    NodeShape(resources={"CPU": 8}, count=4),
)


def test_nobody_who_lacks_anything_asks_for_nothing() -> None:
    assert wanted([Gang(2, {"GPU": 1})], None, SHAPES) == []


def test_a_gang_is_a_bundle_for_each_rank_beside_what_runs() -> None:
    assert wanted([Gang(1, {"CPU": 4})], Gang(2, {"GPU": 1})) == [
        {"CPU": 4},
        {"GPU": 1},
        {"GPU": 1},
    ]


def test_a_gang_that_must_stay_together_asks_for_nodes_that_are_large_enough() -> None:
    """Eight nodes of one GPU meet eight bundles of one, but this gang never starts on them."""
    assert wanted([], Gang(8, {"GPU": 1, "CPU": 2}, max_nodes=1), SHAPES) == [{"GPU": 8, "CPU": 16}]
    assert wanted([], Gang(12, {"GPU": 1}, max_nodes=2), SHAPES) == [{"GPU": 8}, {"GPU": 4}]
    assert wanted([], Gang(8, {"GPU": 1}, max_nodes=1)) == [{"GPU": 1}] * 8, (
        "without shapes nothing better is known"
    )

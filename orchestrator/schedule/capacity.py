"""Asks an autoscaling cluster to grow for the head of the queue.

Admission starts only what fits in the free resources, so without a request such a cluster never
grows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from orchestrator.schedule.gang import Gang, fit
from orchestrator.settings import NodeShape

Bundle = dict[str, float]

# Ray takes a request from a driver alone, so a job of a second makes it. The request holds until
# the next one and replaces it, so it names what is in use too.
_PROGRAM = (
    "import json, ray, sys; from ray.autoscaler.sdk import request_resources; "
    "ray.init(address='auto', log_to_driver=False); "
    "request_resources(bundles=json.loads(sys.argv[1]))"
)


def wanted(
    running: Sequence[Gang], head: Gang | None, shapes: Sequence[NodeShape] = ()
) -> list[Bundle]:
    """What the cluster should hold in all: what runs, and the head.

    Nothing if nobody lacks resources.
    """
    if head is None:
        return []
    return [bundle for gang in (*running, head) for bundle in _bundles(gang, shapes)]


def largest(shapes: Sequence[NodeShape]) -> dict[str, dict[str, float]]:
    """The cluster at its largest, with node names of our own: a gang that fits can run one day."""
    return {
        f"shape-{index}-{number}": dict(shape.resources)
        for index, shape in enumerate(shapes)
        for number in range(shape.count)
    }


def _bundles(gang: Gang, shapes: Sequence[NodeShape]) -> list[Bundle]:
    """A bundle for each rank; one for each node where a gang must stay on few nodes.

    Ray may put each bundle on a node of its own, so a node's share of such a gang is one large
    bundle.
    """
    placement = fit(gang, largest(shapes)) if gang.max_nodes else None
    counts = [1] * gang.ranks if placement is None else sorted(placement.values(), reverse=True)
    return [{name: count * amount for name, amount in gang.per_rank.items()} for count in counts]


def request_entry(bundles: Sequence[Bundle], python: str) -> tuple[str, ...]:
    """The command line of the job that makes the request."""
    return (python, "-c", _PROGRAM, json.dumps(list(bundles)))


def request_id(mark: str, bundles: Sequence[Bundle], now: float) -> str:
    """The job's name.

    It holds the time: Ray refuses a second job of one name, also for equal bundles.
    """
    digest = hashlib.sha256(json.dumps(list(bundles), sort_keys=True).encode()).hexdigest()
    return f"capacity-{mark}-{digest[:8]}-{now:.0f}"

"""Asking an autoscaling cluster to grow for the head of the queue: admitting only what is free would never make it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from orchestrator.decide import Gang

Bundle = dict[str, float]

# Ray's request goes through a driver: a job of a second. It holds until the next one, and counts what is in use too.
_PROGRAM = (
    "import json, ray, sys; from ray.autoscaler.sdk import request_resources; "
    "ray.init(address='auto', log_to_driver=False); request_resources(bundles=json.loads(sys.argv[1]))"
)


def wanted(running: Sequence[Gang], head: Gang | None) -> list[Bundle]:
    """What the cluster should hold in all: what runs, and the head. Nothing if nobody lacks resources."""
    if head is None:
        return []
    return [dict(gang.per_rank) for gang in (*running, head) for _ in range(gang.ranks)]


def request_entry(bundles: Sequence[Bundle], python: str) -> tuple[str, ...]:
    return (python, "-c", _PROGRAM, json.dumps(list(bundles)))


def request_id(mark: str, bundles: Sequence[Bundle], now: float) -> str:
    digest = hashlib.sha256(json.dumps(list(bundles), sort_keys=True).encode()).hexdigest()
    return f"capacity-{mark}-{digest[:8]}-{now:.0f}"

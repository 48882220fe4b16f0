"""What /metrics says: the service's own measurements, and what its ledger holds at this moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from contract.study import FINAL_STATES, LIVE_TRIALS, TrialState
from orchestrator.ledger import queries
from orchestrator.schedule.decide import Wait
from orchestrator.server.hub import Hub

STATES: tuple[TrialState, ...] = ("queued", *LIVE_TRIALS, *FINAL_STATES)
# How the words of a wait begin, or end. The label must have few values, and the words name trials.
REASONS = {
    "needs ": "resources",
    "tries again ": "backoff",
    "its study runs ": "limits",
    "user ": "limits",
    "the most this service may": "limits",
    "is the same run as ": "same_run",
    "shares the training of ": "same_run",
    "waits for the MLflow": "mlflow",
    "its code package": "code",
    "the cluster": "cluster",
    "MLflow has not got": "mlflow",
}
OTHER = "other"


def reason_of(wait: Wait) -> str:
    """The kind of thing that a trial waits for."""
    if wait.lacks or wait.position:
        return "resources"
    kinds = (
        reason
        for words, reason in REASONS.items()
        # not in between, where others' words are: a path, or why MLflow refuses
        if wait.why.startswith(words) or wait.why.endswith(words)
    )
    return next(kinds, OTHER)


def exposition(hub: Hub) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    began = time.perf_counter()
    with hub.ledger.reading() as transaction:
        counts = queries.trial_counts(transaction)
        hours = queries.gpu_hours_by_owner(transaction)
    ledger_s = time.perf_counter() - began
    states: Counter[str] = Counter(dict.fromkeys(STATES, 0))
    for of_study in counts.values():
        states.update({str(state): count for state, count in of_study.items()})
    _gauge(registry, "trials", "Trials of all studies, by state.", "state", states)
    waiting = Counter(dict.fromkeys([*REASONS.values(), OTHER], 0))
    waiting.update(reason_of(wait) for wait in hub.waits().values())
    words = "Trials that wait, by what they wait for."
    _gauge(registry, "waiting_trials", words, "reason", waiting)
    words = "GPU-hours of ended attempts, by who submitted them. Forgotten studies are left out."
    _gauge(registry, "gpu_hours", words, "user", hours)
    _set(registry, "nodes", "Nodes of the cluster that live.", len(hub.nodes()))
    ready = hub.cluster().state == "ready"
    _set(registry, "cluster_ready", "1 while the Ray cluster answers.", ready)
    _set(registry, "ledger_seconds", "What this look at the ledger took.", ledger_s)
    return generate_latest(registry) + generate_latest(hub.measures().registry)


def _set(registry: CollectorRegistry, name: str, words: str, value: float) -> None:
    Gauge(f"maskray_{name}", words, registry=registry).set(value)


def _gauge(
    registry: CollectorRegistry, name: str, words: str, label: str, values: Mapping[str, float]
) -> None:
    gauge = Gauge(f"maskray_{name}", words, [label], registry=registry)
    for value, amount in sorted(values.items()):
        gauge.labels(value).set(amount)

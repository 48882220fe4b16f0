"""What a study says its trials need, and what an attempt's ranks are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select

from orchestrator.ledger import store
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.schedule.decide import StudyLimits
from orchestrator.schedule.gang import Gang


def run_spec(
    trial: store.Row,
    study: store.Row,
    number: int,
    avoid: Sequence[str],
    tracking_uri: str,
    grace_s: float,
) -> dict[str, Any]:
    """A contract.attempt.RunSpec as data: the study's own code validates it. `tracking_uri` is empty without MLflow."""
    resources = study["spec"]["resources"]
    tracking: dict[str, Any] = {"kind": "none"}
    if tracking_uri:
        tracking = {
            "kind": "mlflow",
            "uri": tracking_uri,
            "experiment": study["mlflow_experiment"] or study["id"],
            "parent_run_id": study["mlflow_run_id"],
        }
    return {
        "run": trial["run"],
        "storage": trial["folder"],
        "study": study["id"],
        "trial": trial["id"],
        "name": trial["key"],
        "arm": trial["arm"],
        "attempt": number,
        "ranks": resources["ranks"],
        "cpus_per_rank": resources["cpus_per_rank"],
        "gpus_per_rank": resources["gpus_per_rank"],
        "rank_resources": resources["custom_per_rank"],
        "max_nodes": resources["max_nodes"],
        "avoid_nodes": list(avoid),
        "tracking": tracking,
        "tags": {**trial["tags"], "maskray.owner": study["owner"]},
        "study_yaml": study["study_yaml"],
        "grace_s": grace_s,
    }


def gang_of(study: Mapping[str, Any]) -> Gang:
    resources = study["resources"]
    per_rank = {
        "CPU": resources["cpus_per_rank"],
        "GPU": resources["gpus_per_rank"],
        **resources["custom_per_rank"],
    }
    return Gang(
        resources["ranks"],
        {name: amount for name, amount in per_rank.items() if amount},
        resources["max_nodes"],
    )


def study_limits(
    transaction: Transaction, attempts: Sequence[store.Row], now: float
) -> dict[str, StudyLimits]:
    """Of every study that is not over, with what its budget has paid for so far."""
    query = select(STUDIES.c.id, STUDIES.c.spec).where(STUDIES.c.state.in_(("active", "paused")))
    limits: dict[str, StudyLimits] = {}
    for study, data in transaction.execute(query).all():
        used = 0.0
        if data["gpu_hours"]:
            used = gpu_hours(
                transaction, study, data, [row for row in attempts if row["study"] == study], now
            )
        limits[study] = StudyLimits(data["max_parallel"], data["gpu_hours"], used)
    return limits


def gpu_hours(
    transaction: Transaction,
    study: str,
    spec: Mapping[str, Any],
    attempts: Sequence[store.Row],
    now: float,
) -> float:
    """GPU-hours of a study so far, its running attempts included."""
    ended = transaction.execute(
        select(TRIALS.c.rank_seconds).where(TRIALS.c.study == study)
    ).scalars()
    ranks = spec["resources"]["ranks"]
    live = sum(now - row["running_at"] for row in attempts if row["running_at"])
    return float(spec["resources"]["gpus_per_rank"] * (sum(ended) + ranks * live) / 3600)

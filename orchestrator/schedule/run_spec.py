"""What a study's trials need, and the spec from which an attempt's ranks start."""

from __future__ import annotations

from collections.abc import Sequence

from contract.attempt import AttemptSpec, MLflowTracking, NoTracking, Tracking
from contract.study import Study
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import Json, LiveAttempt, StudyBrief, StudyRow, TrialRow
from orchestrator.schedule.decide import StudyLimits
from orchestrator.schedule.gang import Gang


def run_spec(
    trial: TrialRow,
    study: StudyRow,
    number: int,
    avoid: Sequence[str],
    tracking_uri: str,
    grace_s: float,
    trained: str = "",
) -> Json:
    """A `contract.attempt.RunSpec` as JSON data, without the fields at their default.

    The study's own code checks it, and refuses a field that it does not know: it may be older than
    the service. `run` is what the same code wrote, so it goes back as it is. `tracking_uri` is
    empty without MLflow. trained: the folder of a trial whose training this one shares.
    """
    resources = study.spec.resources
    # a study that started without its parent run is an experiment of its own name all the same
    tracking: Tracking = NoTracking()
    if tracking_uri:
        tracking = MLflowTracking(
            uri=tracking_uri,
            experiment=study.mlflow_experiment or study.id,
            parent_run_id=study.mlflow_run_id,
        )
    spec = AttemptSpec(
        storage=trial.folder,
        study=study.id,
        trial=trial.id,
        name=trial.key,
        arm=trial.arm,
        attempt=number,
        ranks=resources.ranks,
        cpus_per_rank=resources.cpus_per_rank,
        gpus_per_rank=resources.gpus_per_rank,
        rank_resources=resources.custom_per_rank,
        max_nodes=resources.max_nodes,
        avoid_nodes=tuple(avoid),
        tracking=tracking,
        tags={**trial.tags, "maskray.owner": study.owner},
        study_yaml=study.study_yaml,
        grace_s=grace_s,
        trained=trained,
    )
    return {"run": trial.run, **spec.sparse()}


def gang_of(study: Study) -> Gang:
    """The ranks of one trial and what each of them needs."""
    resources = study.resources
    per_rank = {
        "CPU": resources.cpus_per_rank,
        "GPU": resources.gpus_per_rank,
        **resources.custom_per_rank,
    }
    return Gang(
        resources.ranks,
        # without zeros: `fit` divides by what a rank needs
        {name: amount for name, amount in per_rank.items() if amount},
        resources.max_nodes,
    )


def study_limits(
    transaction: Transaction, live_attempts: Sequence[LiveAttempt], now: float
) -> dict[str, StudyLimits]:
    """Of every study that is not over, with the part of its budget that is used."""
    limits: dict[str, StudyLimits] = {}
    for study in queries.open_studies(transaction).values():
        spec = study.spec
        used = gpu_hours(transaction, study, live_attempts, now) if spec.gpu_hours else 0.0
        limits[study.id] = StudyLimits(spec.max_parallel, spec.gpu_hours, used)
    return limits


def gpu_hours(
    transaction: Transaction, study: StudyBrief, live_attempts: Sequence[LiveAttempt], now: float
) -> float:
    """GPU-hours of a study so far, its running attempts included."""
    ended = queries.rank_seconds(transaction, study.id)
    # what runs counts too: a budget must not wait for the end of a long trial
    live = sum(
        now - live.attempt.running_at
        for live in live_attempts
        if live.study.id == study.id and live.attempt.running_at
    )
    resources = study.spec.resources
    return resources.gpus_per_rank * (ended + resources.ranks * live) / 3600

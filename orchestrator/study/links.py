"""Where a person sees a study in MLflow, below the server's address."""

from __future__ import annotations

SHARED_VIEW = "maskray"  # the key of the view that a link opens
_TRAINING = "workflowType=machine_learning"  # without it MLflow opens its pages of traces


def experiments_path() -> str:
    return f"/#/experiments?{_TRAINING}"


def experiment_path(experiment: str) -> str:
    """The study's page: runs grouped by arm, the best arm first."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={SHARED_VIEW}&{_TRAINING}"


def run_path(experiment: str, run: str) -> str:
    return f"/#/experiments/{experiment}/runs/{run}?{_TRAINING}"

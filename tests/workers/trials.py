"""Small whole trials for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contract.attempt import Outcome, RunSpec
from contract.recipe import RunConfig
from tests.builders import tiny_run
from tests.workers.fakes import alone
from workers.training.run import run_trial
from workers.trial.stop import StopRequest


def run_of(packed: tuple[str, str], **overrides: Any) -> RunConfig:
    base = {
        "loop.steps": 4,
        "loop.global_batch": 2,
        "loop.log_every_steps": 2,
        "data.short_sides_px": [64],
        "data.max_side_px": 64,
        "model.image.short_side_px": 64,
        "model.image.max_side_px": 64,
        "model.inference.score_threshold": 0.0,
        "model.inference.detections_per_image": 5,
    }
    return tiny_run(
        {**base, **{name.replace("__", "."): value for name, value in overrides.items()}}, *packed
    )


def spec_of(folder: Path, run: RunConfig, **fields: Any) -> RunSpec:
    return RunSpec(run=run, storage=str(folder), trial="t-1", name="roi=align/seed-0", **fields)


def go(spec: RunSpec, stop: StopRequest | None = None) -> Outcome:
    return run_trial(spec, alone(), stop or StopRequest(), lambda progress: None)


def asked_at_once() -> StopRequest:
    stop = StopRequest()
    stop.ask("preempted")
    return stop


def mlflow_run(uri: str, experiment: str) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run

"""A real MLflow store: weights become a version of a model, and come back as a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from contract.attempt import MLflowTracking
from tests.workers.trials import asked_at_once, go, run_of, spec_of
from workers.inference.trained import load_trained
from workers.register import main, register


def test_weights_become_a_model_version_that_predicts(
    tmp_path: Path,
    packed: tuple[str, str],
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import artifacts
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # the store keeps artifacts below the working folder
    trial = tmp_path / "trial"
    tracking = MLflowTracking(uri=store, experiment="registered")
    assert go(spec_of(trial, run_of(packed), tracking=tracking)).state == "done"
    capsys.readouterr()  # what the trial printed
    assert main([str(trial), "--name", "finder", "--alias", "champion", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["version"], told["unchanged"]) == ("finder", "1", False)
    client = MlflowClient(store)
    version = client.get_model_version_by_alias("finder", "champion")
    assert (str(version.version), version.run_id) == ("1", told["run_id"])
    assert version.description.startswith("last weights of roi=align/seed-0, t-1.")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    came = artifacts.download_artifacts("models:/finder/1", dst_path=str(tmp_path / "came"))
    ours, theirs = load_trained(str(trial)), load_trained(came)
    assert theirs.categories == ours.categories
    states = ours.detector.state_dict(), theirs.detector.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    # The best weights are another version, and change nothing of the first.
    best = register(str(trial), "finder", "best")
    assert (best.version, best.unchanged) == ("2", False)
    kept = {v.version: v.source for v in client.search_model_versions("name='finder'")}
    assert len(set(kept.values())) == 2
    again = artifacts.download_artifacts("models:/finder/2", dst_path=str(tmp_path / "best"))
    assert [path.name for path in Path(again).rglob("weights-*")] == ["weights-best.safetensors"]

    # The same weights are no second version; a model has the versions of several.
    assert register(str(trial), "finder").unchanged
    assert register(str(trial), "other").version == "1"
    assert len(client.search_model_versions("name='finder'")) == 2

    # A deleted run is no reason to make an empty one.
    client.delete_run(told["run_id"])
    with pytest.raises(RuntimeError, match=r"has no run of trial t-1: .*runs restore"):
        register(str(trial), "third")


def test_what_cannot_be_registered_is_one_line(tmp_path: Path, packed: tuple[str, str]) -> None:
    stopped = tmp_path / "stopped"
    go(spec_of(stopped, run_of(packed)), asked_at_once())
    with pytest.raises(ValueError, match=r"has no .*weights-last.*when it is finished"):
        register(str(stopped), "finder")
    alone = tmp_path / "alone"
    go(spec_of(alone, run_of(packed)))
    with pytest.raises(ValueError, match="its run has no tracker"):
        register(str(alone), "finder")
    with pytest.raises(ValueError, match=r"has no .*weights-last"):
        register(str(tmp_path), "finder")

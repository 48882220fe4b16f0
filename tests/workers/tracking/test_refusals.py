"""What MLflow refuses: for now (it comes later), or for good (it costs that value alone)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from contract.attempt import MLflowTracking, Outcome, RunSpec
from contract.files import Files
from tests.workers.fakes import small_run
from workers.sync import sync
from workers.tracking.journal import TrialJournal, open_journal
from workers.tracking.mlflow_tracker import MLflowTracker
from workers.tracking.records import Artifact, Metrics, Params, Tags
from workers.tracking.shipper import Shipper
from workers.tracking.spool import Spool


class Place:
    """A trial's folder and an MLflow store with an experiment, which keeps artifacts beside it."""

    def __init__(self, folder: Path, empty_store: Path, trial: str = "t-1") -> None:
        self.uri = f"sqlite:///{shutil.copy(empty_store, folder / 'own.db')}"
        self.folder, self.trial, self.artifacts = folder / "trial", trial, folder / "store"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("study", str(self.artifacts))

    def journal(self, **fields: object) -> TrialJournal:
        spec = RunSpec.model_validate(
            {
                "run": small_run(),
                "storage": str(self.folder),
                "trial": self.trial,
                "tracking": MLflowTracking(uri=self.uri, experiment="study"),
                **fields,
            }
        )
        return open_journal(spec, Files(spec.storage), lambda progress: None)

    def spool(self) -> Spool:
        return Spool(self.folder / "spool")

    def ship(self, spool: Spool, warnings: list[str]) -> bool:
        tracking = MLflowTracking(uri=self.uri, experiment="study")
        files = Files(str(self.folder))
        tracker = MLflowTracker(tracking, self.trial, "n", files, warnings.append)
        return Shipper(spool, tracker, warnings.append, idle_s=0.01).close(60)

    def run(self) -> Run:
        [run] = self.client.search_runs([self.experiment])
        return run

    def paths(self) -> set[str]:
        """Of all artifacts of the run."""
        found, folders = set[str](), [""]
        while folders:
            for info in self.client.list_artifacts(self.run().info.run_id, folders.pop()):
                (folders.append if info.is_dir else found.add)(info.path)
        return found


@pytest.fixture
def place(tmp_path: Path, empty_store: Path) -> Place:
    return Place(tmp_path, empty_store)


def test_a_deleted_experiment_gets_everything_once_it_is_restored(place, capsys):
    place.client.delete_experiment(place.experiment)
    journal = place.journal()
    journal.metrics(1, {"loss": 1.0})
    journal.finish(Outcome(state="done", step=1))
    out = capsys.readouterr().out
    assert "'study' is deleted" in out
    assert f"restore --experiment-id {place.experiment}" in out
    assert 'send them later with "maskray sync' in out
    assert not (place.folder / "spool/rejected.jsonl").exists()
    with pytest.raises(RuntimeError, match="'study' is deleted"):
        sync(str(place.folder))
    place.client.restore_experiment(place.experiment)
    assert sync(str(place.folder)) > 0
    assert place.run().data.metrics == {"loss": 1.0}
    assert place.run().info.status == "FINISHED"


@pytest.mark.parametrize("what", ["experiment", "run"])
def test_what_is_deleted_while_a_run_writes_to_it_gets_the_rest_once_it_is_restored(place, what):
    spool, warnings = place.spool(), list[str]()
    tracking = MLflowTracking(uri=place.uri, experiment="study")
    tracker = MLflowTracker(tracking, "t-1", "n", Files(str(place.folder)), warnings.append)
    shipper = Shipper(spool, tracker, warnings.append, idle_s=0.01)
    spool.append(Metrics(at=1, step=1, values={"loss": 1.0}))
    shipper.flush(60)
    number = tracker.run_id if what == "run" else place.experiment
    getattr(place.client, f"delete_{what}")(number)
    with pytest.raises(RuntimeError, match=f"{what} .* is deleted"):
        tracker.send([Metrics(at=2, step=2, values={"loss": 0.5})])
    getattr(place.client, f"restore_{what}")(number)
    spool.append(Metrics(at=2, step=2, values={"loss": 0.5}))
    assert shipper.close(60)
    assert len(place.client.get_metric_history(tracker.run_id, "loss")) == 2
    assert not (spool.folder / "rejected.jsonl").exists()
    spool.close()


def test_an_artifact_store_that_cannot_be_written_holds_up_no_metric_and_gets_all_later(
    place, capsys
):
    place.artifacts.write_text("a file where the store's folder should be")
    journal = place.journal()
    journal.metrics(1, {"loss": 1.0})
    journal.finish(Outcome(state="done", step=1))
    assert place.run().data.metrics == {"loss": 1.0}
    assert place.run().info.status == "FINISHED"
    out = capsys.readouterr().out
    assert "1 artifacts (artifacts/config.yaml: " in out
    assert "maskray sync" in out
    with pytest.raises(RuntimeError, match=r"0 records sent, 1 artifacts stay in .*config\.yaml"):
        sync(str(place.folder))
    place.artifacts.unlink()
    assert sync(str(place.folder)) == 1
    assert place.paths() == {"config.yaml"}
    assert sync(str(place.folder)) == 0


def test_a_store_that_comes_back_during_the_run_gets_its_artifacts_by_its_end(place, capsys):
    place.artifacts.write_text("not yet")
    journal = place.journal()
    assert journal.run_id()
    [carried] = [r for r in journal.state()().tail if isinstance(r, Artifact)]
    assert carried.path == "artifacts/config.yaml"  # a checkpoint keeps what the store lacks
    place.artifacts.unlink()
    journal.finish(Outcome(state="done", step=1))
    assert place.paths() == {"config.yaml"}
    assert "maskray sync" not in capsys.readouterr().out


def test_a_trial_on_an_object_store_keeps_there_which_artifacts_its_tracker_lacks(
    place, s3_uri, tmp_path
):
    place.artifacts.write_text("not yet")
    journal = place.journal(storage=s3_uri, cache=str(tmp_path / "cache"))
    journal.finish(Outcome(state="done", step=1))
    with pytest.raises(RuntimeError, match="1 artifacts stay in"):
        sync(s3_uri)
    place.artifacts.unlink()
    assert sync(s3_uri) == 1
    assert place.paths() == {"config.yaml"}
    assert sync(s3_uri) == 0


@pytest.mark.parametrize("trial", ["it's", 'runs/"x"', 'it\'s "x"'])
def test_a_quote_in_a_path_finds_its_run_again(tmp_path, empty_store, trial):
    place = Place(tmp_path, empty_store, trial)
    place.folder = tmp_path / "it's" / 'a "trial" # 50%'
    for attempt in (1, 2):
        journal = place.journal(attempt=attempt)
        journal.metrics(attempt, {"loss": 1.0})
        assert journal.run_id()
        journal.finish(Outcome(state="done", step=attempt))
    assert place.run().data.tags["maskray.trial"] == trial
    assert place.paths() == {"config.yaml"}
    assert not (place.folder / "spool/rejected.jsonl").exists()


def test_a_factor_with_odd_characters_is_a_tag_of_another_name_and_told_once(place, capsys):
    journal = place.journal(arm={"rate (x2)": "on", "rate [x2]": "off", "roi": "align"})
    journal.finish(Outcome(state="done", step=1))
    tags = place.run().data.tags
    arms = {key: level for key, level in tags.items() if key.startswith("maskray.arm.")}
    assert arms.pop("maskray.arm.roi") == "align"
    assert sorted(arms.values()) == ["off", "on"]
    assert all(key.startswith("maskray.arm.rate _x2_-") for key in arms)
    assert tags["maskray.seed"] == "0"
    assert capsys.readouterr().out.count("'maskray.arm.rate (x2)' as ") == 1


def test_a_value_that_mlflow_refuses_costs_that_value_alone(place):
    spool, warnings = place.spool(), list[str]()
    spool.append(Params(values={"lr": "1"}), Metrics(at=1, step=1, values={"loss": 1.0}))
    spool.append(Params(values={"a": "1", "lr": "2", "b": "2", "c": "3"}))
    spool.append(Metrics(at=-1, step=2, values={"loss": 0.5}), Tags(values={"late": "yes"}))
    assert place.ship(spool, warnings)
    spool.close()
    run = place.run()
    assert run.data.params == {"lr": "1", "a": "1", "b": "2", "c": "3"}
    assert run.data.metrics == {"loss": 1.0}
    assert run.data.tags["late"] == "yes"
    lines = (spool.folder / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"].get("values") for line in lines] == [
        {"lr": "2"},
        {"loss": 0.5},
    ]
    assert len(warnings) == 2


def test_odd_names_of_metrics_and_params_arrive_under_names_that_mlflow_takes(place):
    spool, warnings = place.spool(), list[str]()
    for step in (1, 2):
        spool.append(Metrics(at=step, step=step, values={"AP/..": 0.5, "loss (x2)": 1.0}))
    spool.append(Params(values={"..": "1", "model.a(b)": "2"}))
    assert place.ship(spool, warnings)
    spool.close()
    assert place.run().data.metrics == {"AP/__": 0.5, "loss _x2_": 1.0}
    assert place.run().data.params == {"__": "1", "model.a_b_": "2"}
    assert len(warnings) == 2

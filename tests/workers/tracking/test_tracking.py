"""Real MLflow: one run per trial. No record is lost or doubled when the server dies or restarts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from contract.attempt import MLflowTracking, NoTracking, Outcome, RunSpec, Tracking
from contract.files import Files
from tests.workers.fakes import small_run
from tests.workers.tracking.test_spool import metrics
from workers.sync import sync
from workers.tracking.journal import open_journal
from workers.tracking.mlflow_tracker import MLflowTracker, flattened
from workers.tracking.records import Artifact, Params, RejectedError, Status
from workers.tracking.shipper import Shipper
from workers.tracking.spool import DESTINATION_FILE, Destination, Spool, open_spool


def tracker(uri: str, folder: Path, trial: str = "t-1") -> MLflowTracker:
    return MLflowTracker(
        MLflowTracking(uri=uri, experiment="study"), trial, "arm/seed-0", Files(str(folder))
    )


def history(uri: str, name: str = "loss") -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "study"]
    [run] = client.search_runs([experiment.experiment_id])
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def test_a_second_process_continues_the_run_and_drops_what_it_holds(tmp_path, store):
    first = tracker(store, tmp_path)
    first.send([metrics(1), metrics(2), Params(values={"a.b": "1"})])
    again = tracker(store, tmp_path)
    again.send(
        [
            metrics(2).model_copy(update={"at": 9999}),
            metrics(3),
            Status(at=5, status="FINISHED"),
        ]
    )
    assert again.run_id == first.run_id
    assert history(store) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_values_that_mlflow_refuses_are_told_apart_from_a_dead_server(tmp_path, store):
    sender = tracker(store, tmp_path)
    sender.send([Params(values={"lr": "1"})])
    with pytest.raises(RejectedError):
        sender.send([Params(values={"lr": "2"})])
    with pytest.raises(RejectedError, match="artifact is gone"):
        sender.send([Artifact(path="nowhere.txt", folder="")])


def attempt_of(folder: Path, number: int, tracking: Tracking) -> RunSpec:
    return RunSpec(
        run=small_run(), storage=str(folder), trial="t-1", attempt=number, tracking=tracking
    )


def train_untracked(spec: RunSpec, step: int) -> None:
    """An attempt without a tracker that spools one point and ends; its checkpoints carry none."""
    journal = open_journal(spec, Files(spec.storage), lambda progress: None)
    journal.metrics(step, {"loss": 1 / step})
    assert journal.state()().tail == ()
    journal.finish(Outcome(state="done", step=step))


def test_a_run_first_trained_without_a_tracker_sends_that_part_once_it_has_one(
    tmp_path, empty_store, capsys
):
    own = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'own.db')}"
    train_untracked(attempt_of(tmp_path, 1, NoTracking()), 1)
    assert not (tmp_path / "spool/cursor.json").exists()
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="its run has no tracker; name one with --mlflow URI"):
        sync(str(tmp_path))
    other = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
    shutil.copytree(tmp_path / "spool", tmp_path / "copy")
    assert sync(str(tmp_path / "copy"), MLflowTracking(uri=other, experiment="study")) > 0
    assert history(other) == [(1, 1.0)]
    assert sync(str(tmp_path / "copy")) == 0  # it keeps its tracker
    journal = open_journal(
        attempt_of(tmp_path, 2, MLflowTracking(uri=own, experiment="study")),
        Files(str(tmp_path)),
        print,
    )
    journal.metrics(2, {"loss": 0.5})
    assert journal.run_id()
    journal.finish(Outcome(state="done", step=2))
    assert history(own) == [(1, 1.0), (2, 0.5)]


def test_an_attempt_without_a_tracker_leaves_its_records_to_the_tracker_before(
    tmp_path, empty_store, capsys
):
    own = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'own.db')}"
    spool, _ = open_spool(
        attempt_of(tmp_path, 1, MLflowTracking(uri=own, experiment="study")), Files(str(tmp_path))
    )
    spool.append(metrics(1))  # and its tracker was dead
    spool.close()
    train_untracked(attempt_of(tmp_path, 2, NoTracking()), 2)
    assert "send them later with" in capsys.readouterr().out
    sync(str(tmp_path))
    assert history(own) == [(1, 1.0), (2, 0.5)]


def test_config_becomes_dotted_params_within_the_limits():
    assert flattened({"a": {"b": {"c": 1}, "d": {}}, "e": "x" * 7000}) == {
        "a.b.c": "1",
        "a.d": "{}",
        "e": "x" * 6000,
    }


class Server:
    """`mlflow server` on a port of its own that can be killed and started again."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        shutil.copy(empty_store, folder / "server.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            environment = {
                **os.environ,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            }  # starts sooner
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 240
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                time.sleep(0.2)
        raise AssertionError("the MLflow server did not start")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def test_a_server_dead_at_first_then_killed_then_back_has_each_record_once(tmp_path, empty_store):
    server = Server(tmp_path, empty_store)
    spool = Spool(tmp_path / "spool")
    tracking = MLflowTracking(uri=server.uri, experiment="study")
    destination = Destination(tracking=tracking, trial="t-1", name="n", storage=str(tmp_path))
    (spool.folder / DESTINATION_FILE).write_text(destination.model_dump_json())
    warnings: list[str] = []

    def ship() -> bool:
        return Shipper(spool, tracker(server.uri, tmp_path), warnings.append, idle_s=0.05).close(
            240
        )

    try:
        for step in range(1, 1500):
            spool.append(metrics(step))
        assert not ship()  # nobody listens
        server.start()
        assert ship()
        server.kill()
        spool.append(metrics(1500))
        assert not ship()
        with pytest.raises(RuntimeError, match="the others stay in"):
            sync(str(tmp_path))
        server.start()
        spool.advance(0)  # as if it had been killed before it could remember: all of it again
        assert sync(str(tmp_path)) == 1500
        assert [step for step, _ in history(server.uri)] == list(range(1, 1501))
    finally:
        server.kill()
        spool.close()

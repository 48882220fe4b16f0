"""What MLflow and the webhook hear of studies and trials that are over."""

from __future__ import annotations

import json
import os
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from sqlalchemy import update

from contract.attempt import BEST_WEIGHTS, SPOOL_CURSOR, SPOOL_RECORDS
from orchestrator.cli.tables import study_table
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.server import accept
from orchestrator.server.bookkeeping import (
    Lack,
    close_runs,
    remove_copies,
    send_webhooks,
    study_metrics,
)
from orchestrator.server.mlflow import Run, RunData, RunInfo, Tag, TrackingRefusedError
from orchestrator.server.views import study_views
from orchestrator.settings import ServiceSettings
from tests.orchestrator.studies import finished, tiny_study
from tests.orchestrator.submissions import plan, submission
from workers.tracking.records import Artifact, Tags
from workers.tracking.spool import Spool


def test_means_and_differences_are_metrics_with_names_that_mlflow_takes() -> None:
    """Two seeds, 0.30 and 0.32, and 0.40 and 0.42: the differences are 0.1 and 0.1."""
    base = [
        finished({"roi": "align"}, seed, True, metrics={"segm/AP": 0.30 + 0.02 * seed})
        for seed in (0, 1)
    ]
    pool = [
        finished({"roi": "pool (2x)"}, seed, metrics={"segm/AP": 0.40 + 0.02 * seed})
        for seed in (0, 1)
    ]
    trials = [
        one.model_copy(update={"metrics": one.metrics | {"segm/AP50": 0.5, "bbox/AP": 0.4}})
        for one in (*base, *pool)
    ]
    metrics = study_metrics(trials, tiny_study(metrics=["segm/AP", "segm/AP50"]))
    assert metrics["roi-align/segm/AP/mean"] == pytest.approx(0.31)
    assert metrics["roi-pool _2x_/segm/AP/difference"] == pytest.approx(0.1)
    # The intervals are the report's, of a whole family. What the study does not ask for would drown
    # the charts of its parent run.
    assert len(metrics) == 2 + 1


def test_one_seed_has_no_interval() -> None:
    trials = [finished({}, 0, True, metrics={"segm/AP": 0.3})]
    assert study_metrics(trials, tiny_study(metrics=["segm/AP"])) == {"baseline/segm/AP/mean": 0.3}


class FakeMLflow:
    """Remembers what it was told of runs."""

    uri = ""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.tags: dict[str, dict[str, str]] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.deleted: list[tuple[str, str]] = []

    def delete_artifact(self, run: str, name: str) -> None:
        self.deleted.append((run, name))

    def run_by_tag(self, experiment: str, tag: str, value: str) -> None:
        return None

    def create_run(self, experiment: str, name: str, tags: Any, at: float) -> str:
        self.tags["r"] = dict(tags)
        return "r"

    def set_tags(self, run: str, tags: Any) -> None:
        self.tags.setdefault(run, {}).update(tags)

    def log_metrics(self, run: str, metrics: Any, at: float) -> None:
        self.metrics.setdefault(run, {}).update(metrics)

    def experiment(self, name: str, tags: Any) -> str:
        return name

    def runs(self, experiment: str, condition: str) -> list[Run]:
        return [Run(info=RunInfo(run_id="r", status="RUNNING"))]

    def set_tag(self, run: str, key: str, value: str) -> None:
        pass

    def end_run(self, run: str, status: str, at: float) -> None:
        self.ended.append(status)


def test_what_a_trial_could_not_send_is_sent_before_its_run_is_closed(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    study, _ = accept.accept(
        ledger, settings, submission(plan("a"), plan("b", "b" * 64)), "ann", 1.0
    )
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        transaction.execute(update(STUDIES).values(mlflow_experiment=study))
    left, sent = (tmp_path / "studies" / study / f"{study}-00{i}" for i in range(2))
    for folder in (left, sent):
        spool = Spool(folder / "spool")
        spool.append(Tags(values={}))
        spool.close()
        assert (folder / SPOOL_RECORDS).stat().st_size > 0
    (sent / SPOOL_CURSOR).write_text(json.dumps({"bytes": (sent / SPOOL_RECORDS).stat().st_size}))
    mlflow, shipped = FakeMLflow(), list[str]()
    for _ in range(2):
        close_runs(ledger, mlflow, 2.0, shipped.append)  # type: ignore[arg-type]
    assert shipped == [str(left)]
    assert mlflow.ended == ["FINISHED", "FINISHED"]
    ledger.close()


def test_a_trial_that_ran_without_a_tracker_is_sent_to_the_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began before a local server had an address. The server's password is no argument."""
    ledger, uri = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), "https://ann:secret@mlflow.test"
    settings = ServiceSettings(home=str(tmp_path))
    study, _ = accept.accept(ledger, settings, submission(plan("a")), "ann", 1.0)
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        transaction.execute(update(STUDIES).values(mlflow_experiment=study, mlflow_run_id="parent"))
    folder = tmp_path / "studies" / study / f"{study}-000"
    spool = Spool(folder / "spool")
    spool.append(Tags(values={}))
    spool.close()
    seen: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        seen.append((command[3:], env["MLFLOW_TRACKING_URI"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    mlflow = FakeMLflow()
    mlflow.uri = uri
    monkeypatch.setattr(subprocess, "run", run)
    close_runs(ledger, mlflow, 2.0)  # type: ignore[arg-type]
    assert seen == [([str(folder), "--experiment", study, "--parent", "parent"], uri)]
    ledger.close()


@pytest.mark.parametrize("poison", [SPOOL_CURSOR, "spool/later-1"])
def test_a_pipe_in_one_trials_spool_holds_up_no_other(tmp_path: Path, poison: str) -> None:
    """Shipping would wait for the pipe, and the books' thread for shipping."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    sent = submission(plan("a"), plan("b", "b" * 64))
    study, _ = accept.accept(ledger, ServiceSettings(home=str(tmp_path)), sent, "ann", 1.0)
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        transaction.execute(update(STUDIES).values(mlflow_experiment=study))
    bad, good = (tmp_path / "studies" / study / f"{study}-00{i}" for i in range(2))
    for folder in (bad, good):
        (folder / "spool").mkdir(parents=True)
        (folder / SPOOL_RECORDS).write_text("{}\n")
    os.mkfifo(bad / poison)
    shipped, lacks = list[str](), dict[str, Lack]()
    close_runs(ledger, FakeMLflow(), 2.0, shipped.append, lacks)  # type: ignore[arg-type]
    assert shipped == [str(good)]
    assert "is a pipe" in lacks[f"{study}-000"].wait.why
    ledger.close()


def test_copies_of_weights_go_once_where_their_trial_has_them_still(tmp_path: Path) -> None:
    ledger, day = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), 86400.0
    plans = submission(*(plan(name, name * 64) for name in "abc"))
    study, _ = accept.accept(ledger, ServiceSettings(home=str(tmp_path)), plans, "ann", 1.0)
    for number in range(2):  # the third trial has no best weights any more
        path = tmp_path / "studies" / study / f"{study}-00{number}" / BEST_WEIGHTS
        path.parent.mkdir(parents=True)
        path.write_bytes(b"12345")
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done", mlflow_run_id="r-" + TRIALS.c.key))
        transaction.execute(update(STUDIES).values(state="done", ended_at=day))
    mlflow = FakeMLflow()
    assert remove_copies(ledger, mlflow, 3, 9 * day) == 0, "MLflow may get them yet"  # type: ignore[arg-type]
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(mlflow_closed=True))
    frees = [remove_copies(ledger, mlflow, 3, at * day) for at in (3.9, 4.1, 9)]  # type: ignore[arg-type]
    assert frees == [0, 10, 0]
    assert mlflow.deleted == [(f"r-{name}", "weights-best.safetensors") for name in "ab"]
    # a trial that was tried again made another copy
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(ended_at=20 * day))
    assert remove_copies(ledger, mlflow, 3, 30 * day) == 10  # type: ignore[arg-type]
    ledger.close()


def test_a_retry_that_goes_well_leaves_no_tag_of_the_failure(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    sent = submission(plan("a"))
    study, _ = accept.accept(ledger, ServiceSettings(home=str(tmp_path)), sent, "ann", 1.0)
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        transaction.execute(update(STUDIES).values(mlflow_experiment=study))
    deleted = list[str]()

    class Tagged(FakeMLflow):
        def runs(self, experiment: str, condition: str) -> list[Run]:
            tags = ("maskray.error", "maskray.error_class", "maskray.state")
            data = RunData(tags=tuple(Tag(key=tag) for tag in tags))
            return [Run(info=RunInfo(run_id="r", status="FINISHED"), data=data)]

        def delete_tag(self, run: str, key: str) -> None:
            deleted.append(key)

    close_runs(ledger, Tagged(), 2.0)  # type: ignore[arg-type]
    assert sorted(deleted) == ["maskray.error", "maskray.error_class"]
    ledger.close()


def test_a_trial_that_took_a_result_has_a_light_run_with_its_arm_and_metrics(
    tmp_path: Path,
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    study, _ = accept.accept(ledger, settings, submission(plan("a")), "ann", 1.0)
    done = update(TRIALS).values(
        state="done", cached_from="s-old-004", metrics={"segm/AP": 0.3}, moved_at=2.0
    )
    with ledger.writing() as transaction:
        transaction.execute(done)
    mlflow = FakeMLflow()
    close_runs(ledger, mlflow, 3.0, lambda _: None)  # type: ignore[arg-type]
    assert not mlflow.ended  # its study gets a parent run first
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(mlflow_experiment=study, mlflow_run_id="p"))
    close_runs(ledger, mlflow, 4.0, lambda _: None)  # type: ignore[arg-type]
    assert mlflow.ended == ["FINISHED"]
    assert mlflow.metrics == {"r": {"segm/AP": 0.3}}
    tags = mlflow.tags["r"]
    assert tags["maskray.trial"] == f"{study}-000"
    assert (tags["maskray.cached_from"], tags["mlflow.parentRunId"]) == ("s-old-004", "p")
    assert tags["mlflow.user"] == "ann"
    assert tags["mlflow.runColor"].startswith("#")
    assert "s-old-004" in tags["mlflow.note.content"]
    ledger.close()


def test_what_cannot_be_sent_is_told_by_the_status_and_tried_again_until_it_can(
    tmp_path: Path,
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    study, _ = accept.accept(ledger, settings, submission(plan("a")), "ann", 1.0)
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        transaction.execute(update(STUDIES).values(mlflow_experiment=study))
    folder = tmp_path / "studies" / study / f"{study}-000"
    spool = Spool(folder / "spool")
    spool.append(Tags(values={}))
    [(end, _)] = spool.unsent()
    spool.advance(end)
    spool.postpone(Artifact(path="artifacts/config.yaml", folder=""), "read-only")
    spool.close()
    tried, why = list[str](), "1 artifacts: read-only"

    def ship(where: str) -> str:
        tried.append(where)
        return why

    lacks = dict[str, Lack]()

    def turn(now: float) -> str:
        close_runs(ledger, FakeMLflow(), now, ship, lacks)  # type: ignore[arg-type]
        waits = {trial: lack.wait for trial, lack in lacks.items()}
        with ledger.reading() as transaction:
            (view,) = study_views(transaction, waits, study)
        screen = StringIO()
        Console(file=screen, width=500).print(study_table(view))
        assert (view.trials[0].why in screen.getvalue()) or not view.trials[0].why
        return view.trials[0].why

    assert f"({why}); tried again, or maskray sync {folder}" in turn(0.0)
    turn(59.0)
    assert tried == [str(folder)]
    turn(60.0)
    turn(179.0)  # twice as long
    assert len(tried) == 2
    spool.settle(Artifact(path="artifacts/config.yaml", folder=""))  # by hand, with maskray sync
    assert turn(180.0) == ""
    assert turn(1e6) == ""
    assert len(tried) == 2
    ledger.close()


def test_what_mlflow_refuses_of_one_trial_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    many = submission(*(plan(f"a{number}") for number in range(250)))
    studies = [
        accept.accept(ledger, settings, sent, "ann", 1.0)[0]
        for sent in (many, submission(plan("a")))
    ]
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done"))
        for study in studies:
            transaction.execute(
                update(STUDIES).where(STUDIES.c.id == study).values(mlflow_experiment=study)
            )

    class Refusing(FakeMLflow):
        def experiment(self, name: str, tags: Any) -> str:
            if name == studies[0]:
                raise TrackingRefusedError("status 400, experiment is deleted")
            return name

    mlflow = Refusing()
    close_runs(ledger, mlflow, 2.0, lambda _: None)  # type: ignore[arg-type]
    assert mlflow.ended == ["FINISHED"]
    assert f"trial {studies[0]}-000: status 400, experiment is deleted" in caplog.text
    with ledger.reading() as transaction:
        closed = [queries.trial_row(transaction, f"{study}-000").mlflow_closed for study in studies]
    assert closed == [False, True]
    ledger.close()


def test_a_webhook_that_refuses_one_study_is_told_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    studies = [
        accept.accept(ledger, settings, submission(plan("a")), "ann", at)[0] for at in (1.0, 2.0)
    ]
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(state="done", ended_at=3.0))
    heard: list[str] = []

    def post(url: str, json: dict[str, Any], **_: Any) -> httpx.Response:
        heard.append(json["study"])
        return httpx.Response(
            400 if json["study"] == studies[0] else 200, request=httpx.Request("POST", url)
        )

    monkeypatch.setattr(httpx, "post", post)
    for _ in range(2):
        send_webhooks(ledger, "http://hook")
    assert heard == [*studies, studies[0]]
    ledger.close()

"""The service's own reports: when they are made, and who may see the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import STUDIES, TRIALS
from orchestrator.server import accept
from orchestrator.server import reports as module
from orchestrator.server.api import build_app
from orchestrator.server.mlflow import TrackingDownError
from orchestrator.server.reports import Reports
from orchestrator.server.routes import pages
from orchestrator.settings import ServiceSettings
from tests.orchestrator.fake_hub import FakeHub, Http, by, post, refused
from tests.orchestrator.submissions import plan, submission

STANDING = {
    "name": "c", "metric": "segm/AP", "weights": {}, "difference": 0.0, "low": 0.0, "high": 0.0,
    "seeds": 3, "verdict": "better", "trials": {}, "study": "s", "at": 1.0,
}  # fmt: skip


class FakeMLflow:
    def __init__(self) -> None:
        self.artifacts: list[str] = []
        self.tags: dict[str, str] = {}

    def put_artifact(self, run: str, name: str, data: bytes) -> None:
        self.artifacts.append(name)

    def set_tags(self, run: str, tags: Any) -> None:
        self.tags.update(tags)


def test_a_page_is_made_while_the_study_runs_and_once_at_its_end(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    sent = submission(plan("a"), question="Does it help?")
    study, _ = accept.accept(ledger, ServiceSettings(home=str(tmp_path)), sent, "ann", 1.0)
    page = tmp_path / "studies" / study / "report" / "report.html"
    mlflow, reports = FakeMLflow(), Reports()

    def turn(now: float) -> bool:
        before = len(mlflow.artifacts)
        reports.turn(ledger, mlflow, now)  # type: ignore[arg-type]
        return len(mlflow.artifacts) > before

    assert not turn(1.0)  # it has no run in MLflow yet
    assert "1 trials have not ended" in page.read_text()
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(mlflow_run_id="r"))
        transaction.execute(update(TRIALS).values(state="running", metrics={}))
    assert not turn(2.0)  # a change, and its page is a second old
    assert turn(61.0)
    assert not turn(1000.0)
    progress = {"attempt": 0, "step": 1, "steps": 9, "phase": "training", "updated_at": 1.0}
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(progress=progress))
    assert turn(1001.0)  # its curves grow
    assert not turn(1002.0)
    with ledger.writing() as transaction:
        transaction.execute(update(TRIALS).values(state="done", metrics={"segm/AP": 0.25}))
        transaction.execute(update(STUDIES).values(state="done", ended_at=1002.0))
    assert turn(1003.0)
    assert not turn(1003.5)
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(verdicts=[STANDING]))
    assert turn(1004.0)
    assert not turn(1e9)
    assert "25.0" in page.read_text()
    assert mlflow.tags["mlflow.note.content"].startswith("Does it help?")
    assert "25.0" in mlflow.tags["mlflow.note.content"]
    assert set(mlflow.artifacts) == {
        f"report/{name}"
        for name in ("report.html", "report.json", "table.csv", "table.md", "table.txt")
    }
    ledger.close()


def test_the_last_report_gets_there_whatever_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    odd, good = (
        accept.accept(ledger, settings, submission(plan("a")), user, now)[0]
        for user, now in (("a", 1.0), ("b", 2.0))
    )
    with ledger.writing() as transaction:
        transaction.execute(update(STUDIES).values(state="done", ended_at=1.0))
    tried: list[str] = []
    trouble: list[Exception] = [KeyError("odd")]

    def make(row: Any, view: Any, mlflow: Any) -> None:
        tried.append(row.id)
        if row.id == odd and trouble:
            raise trouble[0]

    monkeypatch.setattr(module, "_make", make)
    reports = Reports()

    def turn(now: float, mlflow: Any = None) -> list[str]:
        tried.clear()
        reports.turn(ledger, mlflow, now)
        return list(tried)

    assert turn(10.0) == [odd, good]
    assert turn(15.0) == []
    trouble[0] = OSError("the disk is full")
    assert turn(20.0) == [odd]
    assert turn(39.0) == []
    trouble.clear()
    assert turn(40.0) == [odd]
    assert turn(3000.0, FakeMLflow()) == []
    with ledger.writing() as transaction:  # now they have a run
        transaction.execute(update(STUDIES).values(mlflow_run_id="r"))
    assert turn(3001.0) == []
    trouble.append(TrackingDownError("down"))
    assert turn(3002.0, FakeMLflow()) == [odd, good]
    trouble.clear()
    # long after its end, and MLflow did not answer until now
    assert turn(9999.0, FakeMLflow()) == [odd]
    assert turn(99999.0, FakeMLflow()) == []
    ledger.close()


def test_a_page_takes_a_token_or_a_signature_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path)
    http = Http(build_app(hub, "1"))
    study, other = (post(http, name).json()["study"] for name in ("ann", "bob"))
    where = f"/studies/{study}"
    refused(http.get(where, headers=by("eve")), 404, "not made yet")
    Reports().turn(hub.ledger, None, 1.0)
    answer = http.get(where, headers=by("eve"))
    assert answer.status_code == 200
    assert answer.text.startswith("<!doctype html>")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    link = http.get(f"/v1{where}/link", headers=by("eve")).json()["path"]
    assert http.get(link).text == answer.text
    refused(http.get(where), 401, "no valid token")
    refused(http.get(link.replace(study, other)), 401, "is not valid")
    refused(http.get(link[:-1] + ("0" if link[-1] != "0" else "1")), 401, "is not valid")
    refused(http.get(link.replace("expires=", "expires=1")), 401, "is not valid")
    assert (tmp_path / "link-key").stat().st_mode & 0o777 == 0o600
    later = float(link.partition("expires=")[2].partition("&")[0]) + 1
    monkeypatch.setattr(pages.time, "time", lambda: later)
    refused(http.get(link), 401, "not any more")
    hub.ledger.close()


@pytest.mark.parametrize("name", ["report/report.html", "report"])
@pytest.mark.parametrize("odd", ["a link", "a pipe"])
def test_what_a_trial_puts_in_the_place_of_the_report_is_not_followed(
    tmp_path: Path, name: str, odd: str
) -> None:
    hub = FakeHub(tmp_path)
    http = Http(build_app(hub, "1"))
    study = post(http, "ann").json()["study"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "report.html").write_text("secret")
    place = tmp_path / "studies" / study / name
    place.parent.mkdir(parents=True)
    if odd == "a pipe":
        os.mkfifo(place)  # whose reader would wait for ever
    else:
        place.symlink_to(outside / Path(name).relative_to("report"))
    refused(http.get(f"/studies/{study}", headers=by("eve")), 400, f"studies/{study}/report")
    Reports().turn(hub.ledger, None, 1.0)
    assert [path.read_text() for path in outside.iterdir()] == ["secret"]
    answer = http.get(f"/studies/{study}", headers=by("eve"))
    assert answer.status_code == (400 if name == "report" else 200), answer.text
    assert "secret" not in answer.text
    hub.ledger.close()

"""The service's threads go on after an error that nobody foresaw, and log it once a minute."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from orchestrator.ledger import lease
from orchestrator.ledger.opening import Ledger
from orchestrator.server.mlflow import TrackingDownError
from orchestrator.server.service import SeldomTwice, Service
from orchestrator.settings import ServiceSettings


@pytest.fixture
def service(tmp_path: Path):
    settings = ServiceSettings(home=str(tmp_path), ray="http://127.0.0.1:1", mlflow="")
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield Service(settings, ledger, "me", "")
    ledger.close()


def test_an_unforeseen_error_in_a_turn_is_told_and_the_service_lives(service, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(service.loop, "tick", broken)
    with caplog.at_level(logging.INFO, "maskray"):
        service._turn()
    assert "a turn of the loop failed" in caplog.text
    assert "NoneType" in caplog.text
    assert not service._ending.is_set()


def test_an_unforeseen_error_in_the_books_does_not_end_their_thread(service, monkeypatch, caplog):
    turns: list[int] = []

    def broken() -> None:
        turns.append(1)
        if len(turns) == 3:
            service.end()
        raise KeyError("mlflow_run_id")

    monkeypatch.setattr(service, "_turn_books", broken)
    monkeypatch.setattr("orchestrator.server.service._BOOK_S", 0.0)
    with caplog.at_level(logging.INFO, "maskray"):
        service._keep_books()
    assert len(turns) == 3
    assert caplog.text.count("bookkeeping failed") == 3


def test_who_asks_for_an_experiments_id_waits_for_no_mlflow_and_makes_none(service):
    class Slow:
        asked: list[str] = []

        def known_experiment(self, name: str) -> str | None:
            self.asked.append(name)
            return {"there": "7"}.get(name)

    service._mlflow = Slow()
    assert [service.experiment_id(name) for name in ("there", "gone", "")] == ["", "", ""]
    assert Slow.asked == []
    service._introduced.live = lambda *_: None
    service._turn_runs()
    assert sorted(Slow.asked) == ["gone", "there"]
    assert [service.experiment_id(name) for name in ("there", "gone")] == ["7", ""]


def test_trouble_with_a_login_does_not_keep_runs_from_ending(service, monkeypatch, caplog):
    ended = []

    class Logins:
        def keep(self, mlflow: object) -> None:
            raise TrackingDownError("status 500")

    service._mlflow, service._logins = object(), Logins()
    monkeypatch.setattr(service, "_turn_books", lambda: None)
    monkeypatch.setattr(service, "_turn_runs", lambda: ended.append(1) or service.end())
    service._keep_books()
    assert ended == [1]
    assert "status 500" in caplog.text


def test_a_warning_is_let_through_once_a_minute():
    seldom = SeldomTwice()

    def said(text: str, at: float, level: int = logging.WARNING) -> bool:
        record = logging.LogRecord("maskray", level, "", 0, text, None, None)
        record.created = at
        return bool(seldom.filter(record))

    assert [said("a", 1000.0), said("b", 1001.0), said("a", 1002.0), said("a", 1061.0)] == [
        True,
        True,
        False,
        True,
    ]
    assert said("a", 1062.0, logging.INFO)


def test_health_tells_a_loop_or_a_ledger_that_stands_still(service, monkeypatch):

    pulse = service.pulse
    assert (pulse.health("1").ok, pulse.health("1").problems) == (True, [])
    pulse._turned = time.monotonic() - 500
    assert "the loop stands still for 500 s" in pulse.health("1").problems[0]
    service._turn()
    assert pulse.health("1").ok
    pulse._renewed = time.monotonic() - 20
    (problem,) = pulse.health("1").problems
    assert "the ledger takes no write for 20 s" in problem


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("database or disk is full", "for 31 s (database or disk is full: free space"),
        ("database is locked", "for 31 s (database is locked: another program"),
    ],
)
def test_a_lost_lease_says_whether_the_disk_or_another_service_did_it(
    service, monkeypatch, words, told
):
    import sqlite3

    from sqlalchemy.exc import OperationalError

    lease.take_lease(service.ledger, "me", time.time())
    pulse = service.pulse
    assert pulse.renew() == ""

    def broken(*_: object) -> bool:
        raise OperationalError("UPDATE", {}, sqlite3.OperationalError(words))

    with monkeypatch.context() as patched:
        patched.setattr(lease, "renew_lease", broken)
        assert pulse.renew() == "", "the database may be back before the lease runs out"
        pulse._renewed = time.monotonic() - 31
        assert told in pulse.renew()
    lease.take_lease(service.ledger, "another", time.time() + 60)
    assert "took the ledger, after 31 s without a renewal" in pulse.renew()

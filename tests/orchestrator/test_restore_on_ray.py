"""Backup, restore and upgrade of a real service while trials train on its real Ray head."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from alembic import command
from alembic.config import Config

import orchestrator.ledger
from orchestrator.ledger.opening import Ledger
from orchestrator.local.processes import recorded_child
from tests.orchestrator.submissions import identity, plan, submission
from tests.orchestrator.test_service_on_ray import own_house

pytestmark = pytest.mark.slow


def test_a_service_goes_on_from_an_older_ledger_of_an_older_version(monkeypatch):
    """Four trials: one trains all the time, one ends after the backup, one starts after it in the
    place of that one, and one belongs to a study that the backup does not know.
    """
    with own_house(cpus=3) as house, house.client() as client:
        monkeypatch.chdir(house.root)
        gate, first_gate = house.gate("gate"), house.gate("first")
        lasts = client.submit(submission(plan("a", identity("a"), gate=str(gate)))).study
        pair = (
            plan("b0", identity("b0"), gate=str(first_gate)),
            plan("b1", identity("b1"), gate=str(gate)),
        )
        pair_study = client.submit(submission(*pair, max_parallel=1)).study
        second = f"{pair_study}-001"
        pid = house.pid(house.stepping(client, lasts))
        house.stepping(client, pair_study)

        copy = house.root / "monday"
        saved, status = house.maskray("backup", str(copy))
        assert (status, saved["folder"]) == (0, str(copy))

        first_gate.touch()
        later = client.submit(submission(plan("c", identity("c"), gate=str(gate)))).study
        unknown = house.pid(house.stepping(client, later))
        adopted = house.until(
            "second trial",
            lambda: next(
                (t for t in client.study(pair_study).trials if t.trial == second and t.progress),
                None,
            ),
        )
        adopted_pid = house.pid(adopted)
        assert client.study(pair_study).trials[0].state == "done"

        refused, status = house.maskray("restore", str(copy), "--replace")
        assert status == 1
        assert "holds it" in refused["error"]
        service = recorded_child("service", house.home)
        os.kill(service.pid, signal.SIGKILL)
        house.until("death of the service", lambda: not service.alive())
        restored, status = house.maskray("restore", str(copy), "--replace")
        assert status == 0
        text = "attempts up to 1 were made after the backup; goes on from their files"
        assert restored["changes"] == [f"{second}: {text}"]
        _to_an_older_version(house.home / "ledger.db")

        with house.client() as successor:
            house.until(
                "end of what the ledger does not know", lambda: not psutil.pid_exists(unknown)
            )
            assert [study.study for study in successor.studies()] == [lasts, pair_study]
            gate.touch()
            views = [house.ended(successor, study) for study in (lasts, pair_study)]
            trials = [trial for view in views for trial in view.trials]
            assert [(t.state, t.attempts) for t in trials] == [("done", 1)] * 3
            assert [house.pid(trials[0]), house.pid(trials[2])] == [pid, adopted_pid]
            events = successor.events().events
        told = {(event.kind, event.trial): event.cause for event in events}
        job = f"job {second}-1 ran when the ledger was restored: adopted"
        assert told["adopted", second] == job
        assert told["orphan", f"{later}-000"].endswith("ended")
        assert sum(event.kind == "done" for event in events) == 3
        assert not list(Path(house.home).glob("*.part"))


def _to_an_older_version(file: Path) -> None:
    """What the last but one migration left: the next service upgrades it."""
    ledger, config = Ledger(f"sqlite:///{file}"), Config()
    folder = Path(orchestrator.ledger.__file__).parent
    config.set_main_option("script_location", str(folder / "migrations"))
    with ledger.writing() as transaction:
        config.attributes["connection"] = transaction
        command.downgrade(config, "-1")
    ledger.close()

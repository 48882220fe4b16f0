"""What garbage collection takes, and what it leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from sqlalchemy import select, update

from orchestrator.ledger import commands
from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.retention import apply_retention, keep_storage_small, plan_retention
from orchestrator.ledger.tables import EVENTS, STUDIES, TRIALS
from orchestrator.server import accept
from orchestrator.settings import Keep, ServiceSettings, code_files
from tests.orchestrator.submissions import identity, plan, submission

DAY = 86400.0


def test_only_checkpoints_of_studies_long_over_go(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path))
    old, recent, live = (
        accept.accept(ledger, settings, submission(plan(name, identity(name))), "ann", 1.0)[0]
        for name in "abc"
    )
    with ledger.writing() as transaction:
        for folder in transaction.execute(select(TRIALS.c.folder)).scalars():
            for name in ("checkpoints/0001", "artifacts"):
                Path(folder, name).mkdir(parents=True)
                Path(folder, name, "data").write_bytes(b"x" * 100)
        for study, at in ((old, 1 * DAY), (recent, 9 * DAY)):
            commands.cancel_study(transaction, study, "ann", at)
    with ledger.reading() as transaction:
        removals = plan_retention(transaction, now=10 * DAY, checkpoints_days=7)
    assert [(removal.study, removal.bytes) for removal in removals] == [(old, 100)]
    folder = Path(removals[0].folder)
    assert folder.exists(), "a plan deletes nothing"
    with ledger.writing() as transaction:
        commands.retry_trial(transaction, removals[0].trial, "ann", 10 * DAY)
    assert apply_retention(ledger, removals, 10 * DAY, 7) == 0
    assert folder.exists(), "it goes on from there"
    with ledger.writing() as transaction:
        commands.cancel_study(transaction, old, "ann", 1 * DAY)
    assert apply_retention(ledger, removals, 10 * DAY, 7) == 100
    assert not folder.exists()
    assert (folder.parent / "artifacts/data").exists()
    with ledger.writing() as transaction:
        assert plan_retention(transaction, 10 * DAY, 7) == []
        transaction.execute(update(STUDIES).where(STUDIES.c.id == live).values(state="paused"))
        assert [removal.study for removal in plan_retention(transaction, 100 * DAY, 7)] == [recent]
    ledger.close()


def test_what_a_link_in_a_trials_folder_leads_to_is_neither_counted_nor_deleted(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    home = tmp_path / "home"
    plans = submission(plan("a"), plan("b", identity("b")))
    study = accept.accept(ledger, ServiceSettings(home=str(home)), plans, "ann", 1.0)[0]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(b"x" * 1000)
    with ledger.writing() as transaction:
        first, second = (
            Path(row) for row in transaction.execute(select(TRIALS.c.folder)).scalars()
        )
        (first / "checkpoints").mkdir(parents=True)
        (first / "checkpoints/own").write_bytes(b"x" * 7)
        (first / "checkpoints/link").symlink_to(precious)
        (first / "checkpoints/loop").symlink_to(".")
        second.mkdir()
        (second / "checkpoints").symlink_to(precious)
        commands.cancel_study(transaction, study, "ann", DAY)
    with ledger.reading() as transaction:
        removals = plan_retention(transaction, 10 * DAY, 7)
    assert [(removal.trial, removal.bytes) for removal in removals] == [(f"{study}-000", 7)]
    assert apply_retention(ledger, removals, 10 * DAY, 7) == 7
    assert not (first / "checkpoints").exists()
    assert (precious / "data").exists()
    ledger.close()


def test_one_trials_odd_checkpoints_hold_up_no_others(tmp_path, nest, monkeypatch, caplog):
    """1,100 nested folders raise RecursionError, one of another user PermissionError."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    plans = submission(*(plan(name, identity(name)) for name in "abc"))
    study = accept.accept(ledger, ServiceSettings(home=str(tmp_path)), plans, "ann", 1.0)[0]
    with ledger.writing() as transaction:
        folders = [Path(row) for row in transaction.execute(select(TRIALS.c.folder)).scalars()]
        for size, folder in enumerate(folders, start=1):
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints/data").write_bytes(b"x" * size)
        commands.cancel_study(transaction, study, "ann", DAY)
    nest(folders[0] / "checkpoints")
    with ledger.reading() as transaction:
        removals = plan_retention(transaction, 10 * DAY, 7)
    assert [removal.bytes for removal in removals] == [3, 2]
    rmtree, refused = shutil.rmtree, PermissionError(errno.EACCES, "Permission denied")

    def denied(name: str, dir_fd: int) -> None:
        if Path(f"/proc/self/fd/{dir_fd}").readlink() == folders[2]:
            raise refused
        rmtree(name, dir_fd=dir_fd)

    monkeypatch.setattr(shutil, "rmtree", denied)
    assert apply_retention(ledger, removals, 10 * DAY, 7) == 2
    assert not (folders[1] / "checkpoints").exists()
    stays = [line for line in caplog.messages if line.startswith("checkpoints of trial ")]
    names = [f"checkpoints of trial {study}-{n} stay" for n in ("000", "002")]
    assert [line.split(":")[0] for line in stays] == names
    assert "nested too deep" in stays[0]
    ledger.close()


def test_a_service_deletes_by_itself_what_its_settings_let_go_and_no_more(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    settings = ServiceSettings(home=str(tmp_path / "home"))
    packages = code_files(settings)
    for letter in "abc":
        packages.write(f"{letter * 64}.zip", b"12345")
    for letter in "ab":  # "c" has just come: its study may be about to
        os.utime(packages.path(f"{letter * 64}.zip"), (DAY, DAY))

    def accepted(name: str, trial: str, **fields: str) -> Path:
        plans = submission(plan(trial, identity(trial)), name=name, **fields)
        study = accept.accept(ledger, settings, plans, "ann", DAY)[0]
        folder = tmp_path / "home/studies" / study
        (folder / "000").mkdir(parents=True)
        (folder / "000/data").write_bytes(b"x" * 100)
        return folder

    lends = accepted("lends", "shared")
    with ledger.writing() as transaction:
        done = update(TRIALS).where(TRIALS.c.study == lends.name)
        transaction.execute(done.values(state="done"))
        over = update(STUDIES).where(STUDIES.c.id == lends.name)
        transaction.execute(over.values(state="done", ended_at=DAY))
    borrows = accepted("borrows", "shared")
    alone, active = accepted("alone", "x"), accepted("active", "y", code="a" * 64)
    unknown = tmp_path / "home/studies/unknown"
    unknown.mkdir()
    (active / "000/checkpoints").mkdir()
    with ledger.writing() as transaction:
        commands.cancel_study(transaction, alone.name, "ann", DAY)
        for study in (lends, alone):
            commands.forget_study(transaction, study.name, "ann", 2 * DAY)

    now = packages.changed_at()[f"{'c' * 64}.zip"] + 60
    assert keep_storage_small(ledger, settings, now) == 0, "without settings it deletes nothing"
    keep = Keep(checkpoints_days=3, code_days=3, forgotten_days=3)
    assert keep_storage_small(ledger, settings.model_copy(update={"keep": keep}), now) == 105
    assert packages.names() == [f"{letter * 64}.zip" for letter in "ac"]
    left = [folder.exists() for folder in (lends, borrows, alone, active, unknown)]
    assert left == [True, True, False, True, True]
    with ledger.reading() as transaction:
        told = transaction.execute(select(EVENTS.c.kind, EVENTS.c.study)).all()
    assert ("folder-removed", alone.name) in told
    assert ("code-removed", "") in told
    assert keep_storage_small(ledger, settings.model_copy(update={"keep": keep}), now) == 0
    ledger.close()

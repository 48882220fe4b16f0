"""A copy of the ledger while a service writes it, and a ledger made of such a copy."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, func, inspect, select, update

from contract.attempt import LIVE_ATTEMPTS
from contract.study import LIVE_TRIALS
from contract.words import one_line
from orchestrator.ledger.attempts import NUMBER
from orchestrator.ledger.events import record
from orchestrator.ledger.lease import drop_lease, take_lease
from orchestrator.ledger.opening import Ledger, Transaction
from orchestrator.ledger.tables import ATTEMPTS, EVENTS, LEASE, STUDIES, TRIALS
from orchestrator.trial_folder import TrialFileError, TrialFolder

RESTORED, SETTLED = "restored", "settled"  # events of the ledger itself


def dump(ledger: Ledger, target: Path) -> None:
    """Writes a consistent copy. Nobody waits for it."""
    if ledger.engine.dialect.name == "sqlite":
        # SQLite's online backup: it goes on where a writer came in between
        with (
            closing(sqlite3.connect(_file(ledger.engine))) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
        return
    _run(ledger.engine, "pg_dump", "--format=custom", "--no-owner", f"--file={target}")


def load(url: str, source: Path, replace: bool, now: float) -> list[str]:
    """Makes the ledger at `url` the copy; lines that say what was changed in it since.

    Raises RuntimeError while a service holds the ledger there, and ValueError if it has studies and
    `replace` is not set.
    """
    # A newer maskray may have written it: what it holds goes, so it needs no migration.
    ledger = Ledger(url, migrate=False)
    try:
        if not inspect(ledger.engine).has_table(LEASE.name):
            ledger.migrate()  # a new database
        take_lease(ledger, "restore", now)
        with ledger.reading() as transaction:
            there = transaction.execute(select(func.count()).select_from(STUDIES)).scalar()
        if there and not replace:
            drop_lease(ledger, "restore")
            raise ValueError(f"the ledger holds {there} studies; --replace puts the backup over it")
        engine = ledger.engine
        engine.dispose()
        if engine.dialect.name == "sqlite":
            with (
                closing(sqlite3.connect(source)) as copy,
                closing(sqlite3.connect(_file(engine))) as target,
            ):
                copy.backup(target)
        else:
            options = ("--clean", "--if-exists", "--no-owner", "--single-transaction")
            _run(engine, "pg_restore", *options, "--exit-on-error", str(source))
    finally:
        ledger.close()
    ledger = Ledger(url)  # which brings an older copy to the newest migration
    try:
        with ledger.writing() as transaction:
            transaction.execute(LEASE.delete())  # of the service that was copied
            return _catch_up(transaction, now)
    finally:
        ledger.close()


def _catch_up(transaction: Transaction, now: float) -> list[str]:
    """Attempts that were made after the copy have numbers that must not come again."""
    lines = []
    query = select(TRIALS.c.id, TRIALS.c.study, TRIALS.c.folder, TRIALS.c.attempts)
    own = query.where(TRIALS.c.cached_from == "", TRIALS.c.state.in_(("queued", *LIVE_TRIALS)))
    for row in transaction.execute(own).all():
        try:
            names = TrialFolder(row.folder).names("attempts")
        except (OSError, TrialFileError) as error:
            text = f"nobody knows whether attempts were made after the backup: {one_line(error)}"
        else:
            newest = max((int(name) for name in names if NUMBER.fullmatch(name)), default=0)
            if newest <= row.attempts:
                continue
            text = f"attempts up to {newest} were made after the backup; goes on from their files"
            transaction.execute(update(TRIALS).where(TRIALS.c.id == row.id).values(attempts=newest))
            # A live trial's own one ended before those. Without one `mend` has the trial wait.
            live = (ATTEMPTS.c.trial == row.id) & ATTEMPTS.c.state.in_(LIVE_ATTEMPTS)
            ended = {"state": "lost", "cause": text, "ended_at": now}
            transaction.execute(update(ATTEMPTS).where(live).values(ended))
        record(transaction, RESTORED, text, study=row.study, trial=row.id, at=now)
        lines.append(f"{row.id}: {text}")
    record(transaction, RESTORED, "from a backup", study="", at=now)
    return lines


def unsettled(transaction: Transaction) -> bool:
    """Whether no service has looked at the cluster since the ledger was restored."""
    query = select(EVENTS.c.kind).where(EVENTS.c.study == "")
    of_ledger = query.where(EVENTS.c.kind.in_((RESTORED, SETTLED)))
    return transaction.execute(of_ledger.order_by(EVENTS.c.id.desc())).scalar() == RESTORED


def settle(ledger: Ledger, words: str, now: float) -> None:
    """A service has adopted or ended what ran."""
    with ledger.writing() as transaction:
        record(transaction, SETTLED, words, study="", at=now)


def _file(engine: Engine) -> str:
    assert engine.url.database is not None
    return engine.url.database


def _run(engine: Engine, program: str, *options: str) -> None:
    if shutil.which(program) is None:
        raise RuntimeError(f"{program} is not installed here; install PostgreSQL's client programs")
    # without the password: every user of the machine can read a command line
    url = engine.url.set(drivername="postgresql")
    shown = url.set(password=None).render_as_string(hide_password=False)
    environment = {**os.environ, "PGPASSWORD": url.password or ""}
    command = [program, *options, f"--dbname={shown}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")

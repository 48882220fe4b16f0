"""Who may do what: tokens are random, kept as SHA-256, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete, insert, select

from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import USERS

Role = Literal["read", "submit", "admin"]
ROLES: Sequence[Role] = ("read", "submit", "admin")  # each may do what the one before may


@dataclass(frozen=True)
class User:
    name: str
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    return secrets.token_urlsafe(32)


def set_user(transaction: Transaction, name: str, role: Role, token: str, now: float) -> None:
    """Gives `name` this role and this token in place of any earlier ones."""
    transaction.execute(delete(USERS).where(USERS.c.name == name))
    transaction.execute(
        insert(USERS).values(name=name, role=role, token_hash=token_hash(token), created_at=now)
    )


def remove_user(transaction: Transaction, name: str) -> bool:
    return transaction.execute(delete(USERS).where(USERS.c.name == name)).rowcount == 1


def users(transaction: Transaction) -> list[Mapping[str, object]]:
    rows = transaction.execute(
        select(USERS.c.name, USERS.c.role, USERS.c.created_at).order_by(USERS.c.name)
    ).mappings()
    return [dict(row) for row in rows]


def user_of(transaction: Transaction, header: str) -> User | None:
    """The user whose token an Authorization header bears."""
    kind, _, token = header.partition(" ")
    if kind.lower() != "bearer" or not token:
        return None
    wanted = token_hash(token.strip())
    found: User | None = None
    for row in transaction.execute(select(USERS)).mappings():  # all of them: the time tells nothing
        if hmac.compare_digest(row["token_hash"], wanted):
            found = User(row["name"], row["role"])
    return found

"""Who may do what.

Tokens are random; the ledger keeps their SHA-256, and the comparison takes constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import delete, insert, select

from contract.answers import Role
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.tables import USERS

ROLES: tuple[Role, ...] = get_args(Role)  # each may do what the ones before it may


@dataclass(frozen=True)
class User:
    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether the user's role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class UserRow:
    name: str
    role: Role
    created_at: float


def token_hash(token: str) -> str:
    # no salt and no slow hash: a random token of 32 bytes cannot be guessed from a table
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
    """False if there is no such user."""
    return transaction.execute(delete(USERS).where(USERS.c.name == name)).rowcount == 1


def users(transaction: Transaction) -> list[UserRow]:
    query = select(USERS.c.name, USERS.c.role, USERS.c.created_at).order_by(USERS.c.name)
    return [UserRow(*row) for row in transaction.execute(query)]


def user_of(transaction: Transaction, header: str) -> User | None:
    """The user whose token an Authorization header bears."""
    kind, _, token = header.partition(" ")
    if kind.lower() != "bearer" or not token:
        return None
    wanted = token_hash(token.strip())
    user: User | None = None
    # The loop does not end at the match: the time of an answer must not tell how many rows were
    # compared.
    for row in transaction.execute(select(USERS)):
        if hmac.compare_digest(row.token_hash, wanted):
            user = User(row.name, row.role)
    return user

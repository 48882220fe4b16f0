"""Users and their tokens."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, HTTPException
from pydantic import Field

from contract.answers import NewToken, NewUser, UserList, UserRemoved, UserView
from orchestrator.ledger import users as ledger_users
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import Transaction
from orchestrator.server.access import ADMIN, Admin, HubOfApp
from orchestrator.server.errors import absent

router = APIRouter(prefix="/v1/users")


@router.get("", dependencies=ADMIN)
def users(hub: HubOfApp) -> UserList:
    with hub.ledger.reading() as transaction:
        rows = ledger_users.users(transaction)
    return UserList(
        users=[UserView(name=row.name, role=row.role, created_at=row.created_at) for row in rows]
    )


@router.put("/{name}")
def set_user(
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._@-]{0,79}$")],
    body: NewUser,
    hub: HubOfApp,
    user: Admin,
) -> NewToken:
    """Gives a user a role and a new token, in place of any earlier ones."""
    # Administrators who demoted themselves could not undo it.
    if name == user.name:
        raise HTTPException(400, f"user {name}: is you; another administrator may change you")
    token = ledger_users.new_token()

    def give(transaction: Transaction) -> None:
        ledger_users.set_user(transaction, name, body.role, token, time.time())
        record(transaction, "user-token", f"{name}, role {body.role}, by {user.name}", study="")

    hub.ledger.retried(give)
    return NewToken(user=name, role=body.role, token=token)


@router.delete("/{name}")
def remove_user(name: str, hub: HubOfApp, user: Admin) -> UserRemoved:
    if name == user.name:
        raise HTTPException(400, f"user {name}: is you; another administrator may remove you")
    with hub.ledger.writing() as transaction:
        if not ledger_users.remove_user(transaction, name):
            raise absent("user", name)
        record(transaction, "user-removed", f"{name}, by {user.name}", study="")
    return UserRemoved(user=name)

"""Who sends a request and what they may do: the dependencies of every route."""

from __future__ import annotations

from typing import Annotated, TypeAlias, cast

from fastapi import Depends, HTTPException, Request
from pydantic import Field

from contract.answers import Role
from orchestrator.ledger import queries
from orchestrator.ledger.opening import Transaction
from orchestrator.ledger.rows import StudyRow
from orchestrator.ledger.users import User
from orchestrator.server.errors import absent
from orchestrator.server.hub import Hub

Id: TypeAlias = Annotated[str, Field(max_length=100)]  # of a study or a trial, in a path


def hub_of(request: Request) -> Hub:
    return cast(Hub, request.app.state.hub)  # Starlette keeps an app's state untyped


HubOfApp: TypeAlias = Annotated[Hub, Depends(hub_of)]


def reader(request: Request, hub: HubOfApp) -> User:
    """The user whose token the request bears, of any role. The gate has answered 401 to others."""
    user = cast(User, request.state.user)
    hub.touch()  # only a client with a token keeps an idle service alive
    return user


def submitter(user: Annotated[User, Depends(reader)]) -> User:
    return _with_role(user, "submit")


def admin(user: Annotated[User, Depends(reader)]) -> User:
    return _with_role(user, "admin")


Reader: TypeAlias = Annotated[User, Depends(reader)]
Submitter: TypeAlias = Annotated[User, Depends(submitter)]
Admin: TypeAlias = Annotated[User, Depends(admin)]

# For a route that checks the role and does not use the user.
READ, SUBMIT, ADMIN = ([Depends(who)] for who in (reader, submitter, admin))


def _with_role(user: User, role: Role) -> User:
    if not user.may(role):
        raise HTTPException(403, f"user {user.name} has role {user.role!r}; this needs {role!r}")
    return user


def own_study(transaction: Transaction, study: str, user: User) -> StudyRow:
    """The study if `user` may change it. Answers 404 if there is none, 403 if it is another's.

    Asked inside the transaction that changes the study, so that nobody changes it in between.
    """
    row = queries.study_row(transaction, study)
    if row is None:
        raise absent("study", study)
    if row.owner != user.name and not user.may("admin"):
        raise HTTPException(
            403,
            f"study {study} is {row.owner}'s: only its owner or an administrator may do this",
        )
    return row

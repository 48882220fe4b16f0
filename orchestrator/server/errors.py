"""Every error as the service answers it: {"detail": one line} with a status code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.base import RequestResponseEndpoint

from contract.answers import Refusal
from orchestrator.cluster.jobs import UnreachableError
from orchestrator.ledger.opening import LedgerBusyError, LedgerError, reason


def absent(what: str, name: str) -> HTTPException:
    """The error for a study, a trial or a user that is not there."""
    return HTTPException(404, f"{what} {name!r}: there is none")


def explain(problems: Sequence[ErrorDetails]) -> str:
    """The first problem of a body or a parameter: where it is, and what is wrong."""
    first = problems[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def ledger_trouble(error: LedgerError | LedgerBusyError) -> str:
    """What a person is told of it."""
    if isinstance(error, LedgerBusyError):
        return "ledger: no connection became free in time; try again"
    return f"ledger: {reason(error)}; try again"


def add_errors(app: FastAPI) -> None:
    """Gives every error its answer: 400 for a request, 503 for a cluster or a storage."""

    app.add_exception_handler(StarletteHTTPException, refuse)  # type: ignore[arg-type]

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(400, explain(error.errors()))

    # Whatever the rooms below refuse of a person's input is a ValueError.
    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        return _refusal(400, str(error))

    # An OSError comes from the storage: like Ray, it may answer the next request.
    @app.exception_handler(UnreachableError)
    @app.exception_handler(OSError)
    async def unreachable(_: Request, error: UnreachableError | OSError) -> JSONResponse:
        return _refusal(503, str(error))

    # The database is down, slow or refuses: in its words, and the next request may go well.
    @app.exception_handler(LedgerError)
    @app.exception_handler(LedgerBusyError)
    async def ledger(_: Request, error: LedgerError | LedgerBusyError) -> JSONResponse:
        return _refusal(503, ledger_trouble(error))

    @app.middleware("http")
    async def no_nul(request: Request, call_next: RequestResponseEndpoint) -> Response:
        # PostgreSQL holds no NUL character, and nothing of ours has one.
        if "\0" in request.url.path or "%00" in str(request.url):
            return _refusal(400, "the address holds a NUL character")
        return await call_next(request)


async def refuse(_: Request, error: StarletteHTTPException) -> JSONResponse:
    """The answer to a request that reaches no route."""
    return _refusal(error.status_code, str(error.detail), error.headers)


def _refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # The command line prints the detail as the one line of its error.
    return JSONResponse(Refusal(detail=" ".join(detail.split())).model_dump(), status, headers)

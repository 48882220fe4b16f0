"""What each request passes before any route sees it: its token, its size, and a place to wait.

A body is read for nobody without a token. What waits for Ray or for the storage holds a thread, so
only some may do so at once: the others find threads left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastapi import HTTPException
from fastapi.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.ledger import users
from orchestrator.ledger.events import record
from orchestrator.ledger.opening import LedgerBusyError, LedgerError
from orchestrator.ledger.users import User
from orchestrator.server.errors import ledger_trouble
from orchestrator.server.front.failures import Failures
from orchestrator.server.hub import Hub
from orchestrator.server.uploads import MAX_SUBMISSION

LOG = logging.getLogger("maskray")
OPEN_PATHS = ("/v1/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
MAX_BODY = 1 << 20  # of a route that is not known for larger ones
_LARGE_AT_ONCE, _LARGE_WAIT_S = 4, 60.0  # bodies beyond MAX_BODY in memory
# Of the 40 threads that Starlette has for routes.
_RAY_AT_ONCE, _RAY_WAIT_S = 8, 2.0
_STORAGE_AT_ONCE, _STORAGE_WAIT_S = 16, 30.0
_PIECE_S = 30.0  # for the next piece of a body
_FIRST_S, _LEAST_BYTES_PER_S = 60.0, 128 << 10  # of a whole body, after its first seconds
_FEW_BYTES, _DRAIN_S = 256 << 10, 1.0  # of a refused body, which is read and dropped

Waits: TypeAlias = Literal["", "ray", "storage"]
Refuse: TypeAlias = Callable[[Request, HTTPException], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Rule:
    """What a route may take. waits: for what its thread may stand still."""

    limit: int = MAX_BODY
    waits: Waits = ""


def rule_of(method: str, path: str, max_code: int) -> Rule:
    """The rule for a request by its method and path."""
    parts = path.strip("/").split("/")
    match (method, *parts):
        case ("POST", "v1", "studies") | ("POST", "v1", "studies", "check"):
            return Rule(MAX_SUBMISSION, "storage")
        case ("GET", "v1", "studies", _, "report" | "keeps") | ("GET", "studies", _):
            return Rule(waits="storage")
        case ("DELETE", "v1", "studies", _):
            return Rule(waits="storage")
        case ("PUT", "v1", "code", _):
            return Rule(max_code, "storage")
        case (_, "v1", "doctor" | "staging", *_):
            return Rule(waits="ray")
        case (_, "v1", "trials", _, "logs") | (_, "v1", "code" | "manifests" | "gc", *_):
            return Rule(waits="storage")
    return Rule()


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, hub: Hub, refuse: Refuse) -> None:
        self._app, self._hub, self._refuse = app, hub, refuse
        self._failures = Failures()
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._waiting = {
            "ray": (asyncio.Semaphore(_RAY_AT_ONCE), _RAY_WAIT_S, "the Ray cluster"),
            "storage": (asyncio.Semaphore(_STORAGE_AT_ONCE), _STORAGE_WAIT_S, "the storage"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        rule = rule_of(request.method, scope["path"], self._hub.settings.max_code_mib << 20)
        async with AsyncExitStack() as stack:
            try:
                body = Body(receive, rule.limit, _declared(request))
                if not _is_open(request):
                    scope.setdefault("state", {})["user"] = await self._user(request)
                body.check()
                await self._places(stack, rule, body)
            except HTTPException as error:
                await body.drop()
                answer = await self._refuse(request, error)
                await answer(scope, receive, send)
                return
            await self._pass_on(request, body, send)

    async def _pass_on(self, request: Request, body: Body, send: Send) -> None:
        """The application's answer, or a refusal of the body that it was reading."""
        begun = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal begun
            if body.refused is None or begun:
                begun = True
                await send(message)

        try:
            await self._app(request.scope, body.receive, send_unless_refused)
        except Exception:
            if body.refused is None:
                raise
        if body.refused is not None and not begun:
            answer = await self._refuse(request, body.refused)
            await answer(request.scope, body.receive, send)

    async def _user(self, request: Request) -> User:
        """Answers 401 without a valid token, later with each failure of one address."""
        address = request.client.host if request.client else "?"
        try:
            user = await run_in_threadpool(self._look_up, request.headers.get("authorization", ""))
        except (LedgerError, LedgerBusyError) as error:
            raise HTTPException(503, ledger_trouble(error), {"Connection": "close"}) from error
        if user is not None:
            return user
        failure = self._failures.count(address)
        if failure.told:
            await run_in_threadpool(self._tell, failure.words)
        await self._failures.slow_down(failure)
        raise HTTPException(
            401,
            "no valid token: set MASKRAY_TOKEN to yours (`maskray user NAME` gives one)",
            {"WWW-Authenticate": "Bearer", "Connection": "close"},
        )

    def _look_up(self, header: str) -> User | None:
        with self._hub.ledger.reading() as transaction:
            return users.user_of(transaction, header)

    def _tell(self, words: str) -> None:
        LOG.warning("login failed: %s", words)
        try:
            with self._hub.ledger.writing() as transaction:
                record(transaction, "login-refused", words, study="")
        except (LedgerError, LedgerBusyError) as error:  # the answer is 401 all the same
            LOG.warning("%s", ledger_trouble(error))

    async def _places(self, stack: AsyncExitStack, rule: Rule, body: Body) -> None:
        if rule.waits:
            places, wait_s, what = self._waiting[rule.waits]
            await _enter(stack, places, wait_s, f"too many requests wait for {what}")
        if body.may_be_large:
            await _enter(stack, self._large, _LARGE_WAIT_S, "too many uploads at once")


async def _enter(stack: AsyncExitStack, places: asyncio.Semaphore, wait_s: float, why: str) -> None:
    try:
        await asyncio.wait_for(places.acquire(), wait_s)
    except TimeoutError:
        raise HTTPException(
            503, f"{why}; try again in a moment", {"Retry-After": "5", "Connection": "close"}
        ) from None
    stack.callback(places.release)


def _is_open(request: Request) -> bool:
    """Whether the request needs no token; a signed link is checked by its route."""
    path = request.scope["path"]
    signed = path.startswith("/studies/") and bool(request.query_params.get("signature"))
    return path in OPEN_PATHS or (signed and request.method == "GET")


def _declared(request: Request) -> int:
    """The body's length as the headers tell it; -1 where they do not."""
    if "transfer-encoding" in request.headers:
        return -1
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else -1


class Body:
    """A request's body while it arrives: bounded in size and in time.

    refused: why it may not go on. To the application its sender has then gone: an error raised in
    `receive` would reach it through layers that make another one of it.
    """

    refused: HTTPException | None = None

    def __init__(self, receive: Receive, limit: int, declared: int) -> None:
        self._receive, self._limit, self._declared = receive, limit, declared
        self._size, self._whole = 0, declared == 0
        self._began: float | None = None  # when its first piece was asked for

    @property
    def may_be_large(self) -> bool:
        return self._limit > MAX_BODY and not 0 <= self._declared <= MAX_BODY

    def check(self) -> None:
        """Answers 413 for a length that the headers tell, before a byte is read."""
        if self._declared > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next message. 413 is the answer to too much of it, 408 if it comes too slowly."""
        if self._whole:  # then the next message is the end of the connection, whenever it comes
            return await self._receive()
        try:
            message = await self._next()
            if message["type"] == "http.request":
                self._size += len(message.get("body", b""))
                self._whole = not message.get("more_body", False)
                if self._size > self._limit:
                    raise self._too_large()
        except HTTPException as error:
            self.refused, self._whole = error, True
            return {"type": "http.disconnect"}
        return message

    async def _next(self) -> Message:
        if self._began is None:  # not before: the request may have waited for its place
            self._began = time.monotonic()
        late_at = self._began + _FIRST_S + self._size / _LEAST_BYTES_PER_S
        try:
            left = min(_PIECE_S, max(late_at - time.monotonic(), 0.0))
            return await asyncio.wait_for(self._receive(), left)
        except TimeoutError:
            raise HTTPException(
                408, "the request's body came too slowly; send it again", {"Connection": "close"}
            ) from None

    async def drop(self) -> None:
        """Reads a short body of a refused request, so that its sender gets to read the answer."""
        if self._whole or not 0 < self._declared <= _FEW_BYTES:
            return
        try:
            async with asyncio.timeout(_DRAIN_S):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            return  # the connection closes with the answer

    def _too_large(self) -> HTTPException:
        size = f"{self._limit >> 20} MiB" if self._limit >= 1 << 20 else f"{self._limit} bytes"
        return HTTPException(413, f"the request is larger than {size}", {"Connection": "close"})

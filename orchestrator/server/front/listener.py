"""The HTTP server: how long a connection may take to say what it wants, and how many there are."""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.settings import ServiceSettings

HEADERS_S = 10.0  # from the first byte of a request, or from connecting, to the end of its headers
_KEEP_ALIVE_S = 15.0  # longer than clients keep an idle connection (httpx: 5 s)
_MOST_CONNECTIONS = 1000


class BoundedProtocol(H11Protocol):
    """uvicorn has no time-out for headers, and no bound on connections that send none."""

    headers_s = HEADERS_S
    most = _MOST_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late: asyncio.TimerHandle | None = None
        self._since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._serves():
            self._expect_nothing()
        # what follows an answer on the same connection: the next request, or the rest of a body
        elif self._late is None and self.timeout_keep_alive_task is None:
            self._expect_headers()

    def _serves(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._late = self.loop.call_later(self.headers_s, self._end)

    def _expect_nothing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        self._late = None
        if not self._serves() and not self.transport.is_closing():
            self.transport.abort()

    def _make_room(self) -> None:
        """Ends the oldest connection that serves nothing, or this one if all do."""
        own = [one for one in self.connections if isinstance(one, BoundedProtocol)]
        idle = [
            one
            for one in own
            # one that closes already leaves a moment later
            if one is not self and not one._serves() and not one.transport.is_closing()
        ]
        min(idle, key=lambda one: one._since, default=self)._end()

    def shutdown(self) -> None:
        if self.conn.our_state is h11.ERROR:
            self.transport.close()
            return
        super().shutdown()


def build_server(app: ASGIApp, settings: ServiceSettings) -> uvicorn.Server:
    """The server of a service; with a certificate it speaks TLS."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # half of what may be open: the ledger and the storage need files too
    most = min(_MOST_CONNECTIONS, soft // 2) if soft > 0 else _MOST_CONNECTIONS
    protocol = type("Protocol", (BoundedProtocol,), {"most": most})
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=int(_KEEP_ALIVE_S),
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
    )


def listen(settings: ServiceSettings, has_token: bool) -> socket.socket:
    """Binds the port. has_token: the service has one that its owner chose.

    Raises RuntimeError if the port is taken.
    """
    wide = settings.host not in ("127.0.0.1", "::1", "localhost")
    if wide and not has_token:
        raise ValueError(
            f"host {settings.host}: beyond this machine needs your own token: "
            "set MASKRAY_TOKEN or token_file"
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # a service that starts again within a minute finds its port still in TIME_WAIT
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise RuntimeError(
            f"port {settings.port} on {settings.host}: {error.strerror}; choose another one"
        ) from error
    listener.listen(128)
    return listener

"""A real server under floods: what it reads of whom, and what it still answers meanwhile."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from contract.answers import Staging
from orchestrator.ledger.opening import LedgerBusyError
from orchestrator.server.api import build_app
from orchestrator.server.front import failures, gate
from orchestrator.server.front.listener import BoundedProtocol, build_server
from tests.orchestrator.fake_hub import FakeHub, Http, by, refused, routes


class StuckHub(FakeHub):
    """Its Ray does not answer until `gate` is set."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.gate = threading.Event()

    def stage(self, uris: Sequence[str], cache_gib: float) -> Staging:
        self.gate.wait(60)
        return super().stage(uris, cache_gib)


class House:
    def __init__(self, home: Path) -> None:
        self.hub = StuckHub(home)
        self.server = build_server(build_app(self.hub, "1"), self.hub.settings)
        self.listen()

    def listen(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def close(self) -> None:
        self.hub.gate.set()
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.hub.ledger.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def get(self, path: str, name: str = "ann") -> httpx.Response:
        return httpx.get(self.url + path, headers=by(name), timeout=20, trust_env=False)


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> type[BoundedProtocol]:
    """The server's protocol with a short patience and few places."""
    monkeypatch.setattr(BoundedProtocol, "headers_s", 0.5)
    return BoundedProtocol


@pytest.fixture
def house(tmp_path: Path, protocol: object) -> Iterator[House]:
    built = House(tmp_path)
    yield built
    built.close()


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def answer(connection: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize("token", ["", "Authorization: Bearer wrong"])
def test_nothing_is_read_of_who_has_no_token(house, token):
    lines = ["Content-Length: 400000000", "Content-Type: application/json", *filter(None, [token])]
    with house.connect() as connection:
        # not a byte of the body is sent: an answer shows that none was waited for
        connection.sendall(head("POST", "/v1/studies", *lines))
        assert answer(connection).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("method", "path", "size"),
    [
        ("POST", "/v1/studies", gate.MAX_SUBMISSION + 1),
        ("PUT", "/v1/users/bob", gate.MAX_BODY + 1),
        ("POST", "/v1/staging", 400_000_000),
        ("PUT", f"/v1/code/{'0' * 64}", (64 << 20) + 1),
    ],
)
def test_a_body_is_refused_by_its_length(house, method, path, size):
    with house.connect() as connection:
        token = by("root")["Authorization"]
        lines = (f"Content-Length: {size}", f"Authorization: {token}")
        connection.sendall(head(method, path, *lines))
        assert answer(connection).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_bounded_too(house):
    with house.connect() as connection:
        token = by("root")["Authorization"]
        lines = ("Transfer-Encoding: chunked", f"Authorization: {token}")
        connection.sendall(head("PUT", "/v1/users/bob", *lines))
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(piece)
        assert b" 413 " in answer(connection)[:20]


def test_a_body_that_stands_still_is_given_up(house, monkeypatch):
    monkeypatch.setattr(gate, "_PIECE_S", 0.3)
    with house.connect() as connection:
        token = by("ann")["Authorization"]
        lines = ("Content-Length: 1000", f"Authorization: {token}")
        connection.sendall(head("POST", "/v1/studies", *lines) + b"{")
        assert answer(connection).startswith(b"HTTP/1.1 408")


def test_half_open_connections_cost_nobody_else_an_answer(house):
    with ExitStack() as stack:
        halves = [stack.enter_context(house.connect()) for _ in range(300)]
        for number, half in enumerate(halves):
            half.sendall(b"GET /v1/queue HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"")
        assert house.get("/v1/queue").status_code == 200
        # each is closed from the other side
        assert [answer(half) for half in halves] == [b""] * 300


def test_beyond_the_bound_the_oldest_idle_connection_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "headers_s", 60.0)
    monkeypatch.setattr("orchestrator.server.front.listener._MOST_CONNECTIONS", 20)
    house = House(tmp_path)
    try:
        with ExitStack() as stack:
            halves = [stack.enter_context(house.connect()) for _ in range(50)]
            assert house.get("/v1/queue").status_code == 200
            assert answer(halves[0]) == b""
            assert len(house.server.server_state.connections) <= 20
    finally:
        house.close()


def test_requests_that_wait_for_ray_leave_the_others_their_threads(house, monkeypatch):
    monkeypatch.setattr(gate, "_RAY_WAIT_S", 0.1)

    def stage(_: int) -> int:
        body = {"uris": ["s3://b/d"], "cache_gib": 1}
        url = f"{house.url}/v1/staging"
        options = {"headers": by("ann"), "timeout": 60, "trust_env": False}
        return httpx.post(url, json=body, **options).status_code

    with ThreadPoolExecutor(45) as pool:
        calls = [pool.submit(stage, number) for number in range(45)]
        refused = _until(lambda: [call for call in calls if call.done()], 45 - gate._RAY_AT_ONCE)
        assert house.get("/v1/queue").status_code == 200
        house.hub.gate.set()
        statuses = sorted(call.result() for call in calls)
    assert {call.result() for call in refused} == {503}
    assert statuses.count(200) == gate._RAY_AT_ONCE


def _until(look: Callable[[], list], count: int) -> list:
    waiter = threading.Event()
    for _ in range(600):
        if len(look()) >= count:
            return look()
        waiter.wait(0.05)
    raise AssertionError(f"{len(look())} of {count}")


def test_failed_logins_are_written_down_and_slowed_and_a_token_is_not(house, monkeypatch, caplog):
    slept = []

    class Clock:
        @staticmethod
        async def sleep(seconds: float) -> None:
            slept.append(seconds)

    monkeypatch.setattr(failures, "asyncio", Clock)
    with caplog.at_level(logging.WARNING, "maskray"):
        for _ in range(12):
            assert house.get("/v1/queue", "nobody").status_code == 401
            assert house.get("/v1/queue").status_code == 200
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    lines = [record.getMessage() for record in caplog.records if "login" in record.getMessage()]
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["1", "10"]
    assert "127.0.0.1" in lines[0]


def test_too_many_slowed_logins_are_turned_away_at_once(monkeypatch):
    monkeypatch.setattr(failures, "_SLOWED_AT_ONCE", 3)
    monkeypatch.setattr(failures, "_LONGEST_S", 0.05)

    async def flood() -> list[object]:
        counted = failures.Failures()
        tries = (counted.slow_down(counted.count("::9")) for _ in range(failures._FREE + 10))
        return await asyncio.gather(*tries, return_exceptions=True)

    statuses = [getattr(result, "status_code", 0) for result in asyncio.run(flood())]
    assert statuses.count(429) == 7


def test_a_flood_from_ever_new_addresses_is_told_as_one(monkeypatch):
    monkeypatch.setattr(failures, "_ADDRESSES", 5)
    counted = failures.Failures()
    told = [counted.count(f"2001:db8::{number:x}") for number in range(200)]
    assert [one.words for one in told if one.told][5:] == [
        f"no valid token from many addresses, failure {count}" for count in (1, 10, 100)
    ]


def test_a_body_has_its_time_from_when_it_is_read(monkeypatch):
    """A large one may have waited for its place as long as it has to arrive."""
    clock = [1000.0]
    monkeypatch.setattr(gate.time, "monotonic", lambda: clock[0])

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def late() -> gate.Body:
        body = gate.Body(receive, 10, 1)
        clock[0] += gate._LARGE_WAIT_S + 1
        await body.receive()
        return body

    assert asyncio.run(late()).refused is None


def test_a_ledger_that_is_down_is_503_with_a_token_and_401_without(tmp_path, monkeypatch, caplog):
    hub = FakeHub(tmp_path)
    http = Http(build_app(hub, "1"))

    def busy() -> None:
        raise LedgerBusyError("QueuePool limit of size 5 overflow 10 reached")

    def down() -> None:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    with monkeypatch.context() as patched:
        patched.setattr(hub.ledger, "writing", busy)
        refused(http.get("/v1/queue", headers=by("nobody")), 401, "no valid token")
    assert "no connection became free" in caplog.text
    for trouble, words in ((busy, "no connection became free in time"), (down, "refused")):
        monkeypatch.setattr(hub.ledger, "reading", trouble)
        refused(http.get("/v1/queue", headers=by("ann")), 503, words)
    hub.ledger.close()


# What its thread may stand still for. A new route has its line here and its rule in the gate.
WAITS = {
    "ray": "POST /v1/doctor, POST /v1/staging, GET /v1/staging/{name}",
    "storage": "POST /v1/studies, POST /v1/studies/check, GET /v1/studies/{study}/keeps, "
    "GET /v1/studies/{study}/report, DELETE /v1/studies/{study}, "
    "GET /studies/{study}, "
    "GET /v1/trials/{trial}/logs, HEAD /v1/code/{sha256}, PUT /v1/code/{sha256}, "
    "GET /v1/manifests, POST /v1/gc, POST /v1/gc/forgotten",
    "": "GET /v1/health, GET /metrics, GET /v1/info, POST /v1/shutdown, GET /v1/queue, "
    "GET /v1/events, GET /v1/users, PUT /v1/users/{name}, DELETE /v1/users/{name}, "
    "GET /v1/studies, GET /v1/studies/{study}, GET /v1/studies/{study}/submission, "
    "GET /v1/studies/{study}/link, POST /v1/studies/{study}/priority, "
    "POST /v1/studies/{study}/{action}, POST /v1/trials/{trial}/{action}, GET /v1/finished",
}


def test_every_route_has_its_rule(tmp_path):
    hub = FakeHub(tmp_path)
    every = [(method.upper(), path) for method, path in routes(Http(build_app(hub, "1")))]
    found = {f"{method} {path}": gate.rule_of(method, path, 1).waits for method, path in every}
    assert found == {route: kind for kind, named in WAITS.items() for route in named.split(", ")}
    hub.ledger.close()

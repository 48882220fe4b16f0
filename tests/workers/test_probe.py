"""What a node's probe finds of MLflow, on a server of our own that asks for a login."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from contract.machine.logins import NAME, PASSWORD
from workers.probe import mlflow_error

TOKEN = "MLFLOW_TRACKING_TOKEN"
GOOD = ("Basic YW5uOnA=", "Bearer t")  # ann:p


class Login(BaseHTTPRequestHandler):
    """As MLflow's: /health is open to all."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        search = self.path == "/api/2.0/mlflow/experiments/search"
        self.send_response(200 if search and self.headers["Authorization"] in GOOD else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name in (NAME, PASSWORD, TOKEN):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Login)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_node_tries_its_login_and_says_which_one_is_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{port}"
    assert mlflow_error(uri).startswith("asks for a login: set MLFLOW_TRACKING_USERNAME")
    assert mlflow_error(uri, tries_login=False) == ""
    assert mlflow_error(f"http://ann:p@127.0.0.1:{port}/") == ""
    monkeypatch.setenv(TOKEN, "t")
    assert mlflow_error(uri) == ""
    monkeypatch.setenv(TOKEN, "old")
    assert "refuses the token in MLFLOW_TRACKING_TOKEN" in mlflow_error(uri)
    monkeypatch.setenv(NAME, "ann")
    monkeypatch.setenv(PASSWORD, "p")
    assert mlflow_error(uri) == ""
    assert "refuses the login of user 'bob'" in mlflow_error(f"http://bob:p@127.0.0.1:{port}")

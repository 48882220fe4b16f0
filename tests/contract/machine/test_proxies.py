"""Own servers are never asked through a proxy, others are. The proxy here is a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from contract.machine.proxies import ask_this_machine_directly, proxy_for, way_to
from orchestrator.client import Client, Connection
from orchestrator.cluster.jobs import Cluster, UnreachableError
from orchestrator.local.connect import _healthy
from orchestrator.server.mlflow import MLflow
from workers.probe import mlflow_error

ROOT = Path(__file__).parents[3]
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
HEALTH = b'{"ok": true, "version": "1", "uptime_s": 1.0, "result": true}'


class Asked(BaseHTTPRequestHandler):
    """Notes what it is asked, and answers everything alike."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(HEALTH)))
        self.end_headers()
        self.wfile.write(HEALTH)

    do_HEAD = do_POST = do_CONNECT = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def listeners() -> Iterator[tuple[Listener, Listener]]:
    """A proxy and a server."""
    pair = (Listener(), Listener())
    for one in pair:
        Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield pair
    for one in pair:
        one.shutdown()
        one.server_close()


@pytest.fixture
def proxied(
    listeners: tuple[Listener, Listener], monkeypatch: pytest.MonkeyPatch
) -> tuple[Listener, Listener]:
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name in NAMES[:3]:
        monkeypatch.setenv(name.upper() if name == "https_proxy" else name, listeners[0].url)
    monkeypatch.setenv("NO_PROXY", "corp.example")
    return listeners


def ask_service(url: str) -> None:
    with Client(Connection(url, "token"), timeout_s=5.0) as client:
        client.has_code("0")


def ask_ray(url: str) -> None:
    with pytest.raises(UnreachableError, match="unknown way"):
        Cluster(url, "", timeout_s=5.0).version()


def ask_mlflow(url: str) -> None:
    assert MLflow(url).ready()


def probe_mlflow(url: str) -> None:
    assert mlflow_error(url) == ""


def find_service(url: str) -> None:
    assert _healthy(url)


CLIENTS = (ask_service, ask_ray, ask_mlflow, probe_mlflow)


@pytest.mark.parametrize("ask", [*CLIENTS, find_service])
def test_a_server_on_this_machine_is_asked_directly(proxied, ask):
    proxy, server = proxied
    ask(server.url)
    ask(server.url.replace("127.0.0.1", "localhost"))
    assert len(server.asked) >= 2
    assert not proxy.asked


@pytest.mark.parametrize("ask", CLIENTS)
def test_a_server_elsewhere_is_asked_through_the_proxy(proxied, ask):
    proxy, server = proxied
    ask("http://elsewhere.invalid:5000")
    assert proxy.asked
    assert proxy.asked[0].startswith("http://elsewhere.invalid:5000/")
    assert not server.asked


def test_a_webhook_elsewhere_goes_through_the_proxy(proxied):
    import httpx

    proxy, _ = proxied
    url = "http://hooks.invalid/study"
    httpx.post(url, json={}, proxy=proxy_for(url), trust_env=False).raise_for_status()
    assert proxy.asked == [url]


def test_a_folders_own_service_is_asked_directly_at_any_address(proxied, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.client._TRIES", 1)
    proxy, _ = proxied
    # 192.0.2.0/24 is nobody's: without the folder the proxy would be asked
    client = Client(Connection("http://192.0.2.1:1", "token", tmp_path), timeout_s=0.05)
    with client, pytest.raises(RuntimeError, match=r"service http://192\.0\.2\.1:1"):
        client.health()
    assert not proxy.asked


@pytest.mark.parametrize("library", ["requests", "urllib", "httpx"])
def test_libraries_that_read_the_environment_follow_in_every_program(proxied, library):
    proxy, server = proxied
    programs = {
        "requests": "import requests; requests.get(url, timeout=5)",
        "urllib": "import urllib.request as u; u.urlopen(url, timeout=5)",
        "httpx": "import httpx; httpx.get(url, timeout=5)",
    }
    code = (
        "import sys\nfrom contract.command import run_command\n"
        f"def ask():\n    for url in sys.argv[1:]:\n        {programs[library]}\n    return 0\n"
        "sys.exit(run_command(ask, []))"
    )
    urls = [server.url, server.url.replace("127.0.0.1", "localhost"), "http://elsewhere.invalid/"]
    done = subprocess.run([sys.executable, "-c", code, *urls], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == 2
    assert proxy.asked == ["http://elsewhere.invalid/"]


def test_the_rule_of_a_process():
    environment = {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "corp.example, 10.0.0.0/8"}
    ask_this_machine_directly(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert environment["no_proxy"].startswith("corp.example,10.0.0.0/8,localhost,127.0.0.1,::1")
    again = dict(environment)
    ask_this_machine_directly(again)
    assert again == environment


@pytest.mark.parametrize("before", [{}, {"no_proxy": "a"}, {"all_proxy": "p:1", "no_proxy": "*"}])
def test_an_environment_that_needs_nothing_stays_as_it_is(before):
    environment = dict(before)
    ask_this_machine_directly(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        ("http://127.0.0.1:1", "", None),
        ("http://127.8.8.8", "", None),
        ("http://[::1]:5000", "", None),
        ("http://0.0.0.0:5000", "", None),
        ("http://LOCALHOST", "", None),
        ("http://a.localhost", "", None),
        ("http://10.0.0.5:8265", "", "http://p:1"),
        ("http://10.0.0.5:8265", "10.0.0.0/8", None),
        ("http://10.0.0.5:8265", "10.0.0.5", None),
        ("http://10.0.0.50", "10.0.0.5", "http://p:1"),
        ("http://ml.corp.example", ".corp.example", None),
        ("http://ml.corp.example", "other CORP.example", None),
        ("http://ml.corp.example", "*.corp.example", None),
        ("http://notcorp.example", "corp.example", "http://p:1"),
        ("http://ml.corp.example:81", "ml.corp.example:80", "http://p:1"),
        ("http://ml.corp.example", "ml.corp.example:80", None),
        ("http://[fd00::5]:80", "fd00::/8", None),
        ("http://[fd00::5]:80", "[fd00::5]:80", None),
        ("http://ml.corp.example", "*", None),
        ("https://ml.corp.example", "", "http://secure:2"),
        ("postgresql://db.example", "", "http://rest:3"),
        ("local", "", None),
        ("", "", None),
    ],
)
def test_who_is_asked_how(url, no_proxy, expected):
    environment = {
        "http_proxy": "p:1",
        "HTTPS_PROXY": "http://secure:2",
        "ALL_PROXY": "http://rest:3",
        "no_proxy": no_proxy,
    }
    assert proxy_for(url, environment) == expected


def test_a_proxy_that_nothing_can_use_is_refused_with_what_to_set():
    for scheme in ("socks4", "gopher"):
        environment = {"ALL_PROXY": f"{scheme}://me:secret@p:1080"}
        with pytest.raises(ValueError, match=r"all_proxy: .*cannot be used.*no_proxy") as refused:
            proxy_for("http://elsewhere.invalid", environment)
        assert "secret" not in str(refused.value)
        assert proxy_for("http://127.0.0.1", environment) is None


def test_messages_name_the_proxy_without_its_password():
    environment = {"http_proxy": "http://me:secret@p:1"}
    words = way_to("http://elsewhere.invalid:5000", environment)
    assert words == (
        " (through the proxy http://***@p:1; no_proxy=elsewhere.invalid asks it directly)"
    )
    assert way_to("http://127.0.0.1:5000", environment) == ""


def test_a_program_adds_this_machine_to_its_own_environment(monkeypatch):
    from contract.command import run_command

    monkeypatch.setenv("http_proxy", "http://p:1")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    assert run_command(lambda: int("127.0.0.1" not in os.environ["no_proxy"]), []) == 0

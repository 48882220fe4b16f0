"""A service process without a cluster: it starts, refuses to start, reports ends, ends itself."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.client import Client, Connection
from orchestrator.ledger import users as auth
from orchestrator.ledger.opening import Ledger
from orchestrator.local import connect as local
from orchestrator.local.processes import find_child, free_ports, own_token
from orchestrator.server.bookkeeping import send_webhooks
from tests.orchestrator.submissions import plan, submission

ROOT = Path(__file__).parent.parent.parent


def settings_file(home: Path, **fields: Any) -> Path:
    """A service whose Ray is nowhere: it queues, and answers."""
    home.mkdir(exist_ok=True)
    settings = {
        "home": str(home),
        "port": 0,
        "ray": "http://127.0.0.1:1",
        "mlflow": "",
        "poll_s": 0.1,
        **fields,
    }
    path = home / "given.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(
    processes: list[subprocess.Popen[str]], file: Path, **environment: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.server.service", str(file)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes.append(process)
    return process


def connected(process: subprocess.Popen[str], home: Path) -> Client:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        child = find_child("service", home)
        if child is not None and child.pid == process.pid:
            return Client(Connection(child.url, (home / "token").read_text()))
        time.sleep(0.05)
    raise AssertionError(process.stdout.read() if process.stdout else "")


def test_it_answers_while_ray_does_not_and_takes_studies(processes, tmp_path):
    home = tmp_path / "home"
    process = start(processes, settings_file(home))
    with connected(process, home) as client:
        made = client.submit(submission(plan("a")))
        view = client.study(made.study)
        assert (view.state, view.trials[0].state) == ("active", "queued")
        assert client.info().cluster.nodes == []
        command = " ".join(psutil.Process(process.pid).cmdline())
        assert own_token(home / "token") not in command
    assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600


def test_a_second_service_on_the_same_ledger_refuses_until_the_first_is_dead(processes, tmp_path):
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    first = start(processes, settings_file(tmp_path / "one", ledger=shared))
    with connected(first, tmp_path / "one") as client:
        study = client.submit(submission(plan("a"))).study
    second = start(processes, settings_file(tmp_path / "two", ledger=shared))
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "end that service first" in output.strip().splitlines()[-1]
    first.kill()
    first.wait()
    third = start(processes, settings_file(tmp_path / "two", ledger=shared))
    with connected(third, tmp_path / "two") as client:
        assert client.study(study).trials[0].state == "queued"


def test_it_listens_beyond_this_machine_only_with_a_token_of_one_s_own(processes, tmp_path):
    refused = start(processes, settings_file(tmp_path / "wide", host="0.0.0.0"))
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "needs your own token" in output.strip().splitlines()[-1]


def test_a_token_file_that_others_can_read_is_refused(processes, tmp_path):
    token = tmp_path / "token"
    token.write_text("a" * 32)
    token.chmod(0o644)
    refused = start(processes, settings_file(tmp_path / "home", token_file=str(token)))
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "chmod 600" in output


def test_a_taken_port_is_named(processes, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = start(processes, settings_file(tmp_path / "home", port=port))
        output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert f"port {port}" in output


def test_it_ends_itself_when_idle_but_not_while_a_trial_waits(processes, tmp_path):
    file = settings_file(tmp_path / "home", idle_minutes=0.0005)
    with ledger_of(tmp_path / "home") as ledger:
        from orchestrator.server import accept
        from orchestrator.settings import ServiceSettings

        settings = ServiceSettings.model_validate_json(file.read_text())
        study, _ = accept.accept(ledger, settings, submission(plan("a")), "admin", time.time())
        process = start(processes, file)
        with connected(process, tmp_path / "home") as client:
            assert client.study(study).state == "active"
            client.act_on_study(study, "cancel")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "ends itself" in output
    assert find_child("service", tmp_path / "home") is None


def test_webhooks_are_sent_once_and_until_they_are_taken(tmp_path):
    seen: list[dict[str, Any]] = []
    answers = [503, 200]

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", free_ports(1)[0]), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    from orchestrator.ledger import commands as steer
    from orchestrator.server import accept
    from orchestrator.settings import ServiceSettings

    with ledger_of(tmp_path) as ledger:
        study, _ = accept.accept(
            ledger, ServiceSettings(home=str(tmp_path)), submission(plan("a")), "ann", 1.0
        )
        send_webhooks(ledger, f"http://127.0.0.1:{server.server_port}")
        assert seen == [], "it still waits"
        with ledger.writing() as connection:
            steer.cancel_study(connection, study, "ann", 2.0)
        for _ in range(3):
            send_webhooks(ledger, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()
    assert [(call["study"], call["state"]) for call in seen] == [(study, "cancelled")] * 2


def test_a_server_by_environment_is_used_and_its_token_demanded(monkeypatch):
    monkeypatch.setenv("MASKRAY_SERVER", "http://example.org:1/")
    monkeypatch.setenv("MASKRAY_TOKEN", "t" * 20)
    assert local.connect() == Connection("http://example.org:1", "t" * 20)
    monkeypatch.delenv("MASKRAY_TOKEN")
    with pytest.raises(ValueError, match="MASKRAY_TOKEN is empty"):
        local.connect()
    monkeypatch.setenv("MASKRAY_TOKEN", "t")
    monkeypatch.setenv("MASKRAY_SERVER", "example.org")
    with pytest.raises(ValueError, match="is no URL"):
        local.connect()


def test_looking_for_a_service_starts_none(monkeypatch, tmp_path):
    monkeypatch.delenv("MASKRAY_SERVER", raising=False)
    monkeypatch.chdir(tmp_path)
    assert local.running_client() is None
    assert not local.shut_down(tmp_path)
    assert list(tmp_path.iterdir()) == []


class ledger_of:  # noqa: N801 - reads as a function
    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        with self.ledger.writing() as connection:
            auth.set_user(connection, "ann", "submit", "t" * 20, 1.0)

    def __enter__(self) -> Any:
        return self.ledger

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

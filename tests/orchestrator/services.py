"""A service process that drives a cluster from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from orchestrator.client import Client, Connection
from orchestrator.local.processes import find_child
from tests.orchestrator.waiting import wait_until

ROOT = Path(__file__).parents[2]


def start_service(
    settings: Mapping[str, Any], environment: Mapping[str, str], log: TextIO
) -> subprocess.Popen[bytes]:
    file = Path(settings["home"]).parent / "settings.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "orchestrator.server.service", str(file)]
    return subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=log, stderr=log)


def service_client(settings: Mapping[str, Any], log: Path) -> Client:
    """An administrator's client, once the service listens."""
    home = Path(settings["home"])
    child = wait_until("service", lambda: find_child("service", home), log)
    return Client(Connection(child.url, (home / "token").read_text()))

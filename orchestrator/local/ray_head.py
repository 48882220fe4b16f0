"""A Ray head of one's own: `ray start --head` on 127.0.0.1, with its own ports, token and folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.local.processes import ChildRecord, free_ports, start_child


@dataclass(frozen=True)
class HeadPlan:
    """What a local head is started with. `mark` is in the environment of every process it starts."""

    home: Path
    mark: str
    token_file: Path
    cpus: int
    gpus: int = -1
    memory_mib: int = 256
    resources: Mapping[str, float] = field(default_factory=dict)


def start_head(plan: HeadPlan) -> ChildRecord:
    """Starts `ray start --head --block` in a session of its own; it answers some ten seconds later."""
    gcs, dashboard, client = free_ports(3)
    folder = _short_folder()
    command = [
        _ray_command(), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", "--include-log-monitor=false",
        f"--object-store-memory={plan.memory_mib << 20}",
    ]  # fmt: skip
    command.append(f"--num-cpus={plan.cpus}")
    if plan.gpus >= 0:
        command.append(f"--num-gpus={plan.gpus}")
    if plan.resources:
        command.append(f"--resources={json.dumps(dict(plan.resources))}")
    source = str(Path(__file__).resolve().parents[2])
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MASKRAY_"))
        },
        "MASKRAY_MARK": plan.mark,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(plan.token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own switch for a head that listens on 127.0.0.1 alone
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
    }
    url = f"http://127.0.0.1:{dashboard}"
    return start_child("ray", command, environment, plan.home, url=url, folder=folder)


def _ray_command() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if not found:
        raise RuntimeError(
            f"no `ray` command beside {sys.executable}: install maskray's dependencies into it"
        )
    return found


def _short_folder() -> str:
    """A private folder for Ray's sockets, whose paths must stay below 108 bytes in all."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="mr", dir=base if len(base) <= 24 else "/tmp")  # noqa: S108

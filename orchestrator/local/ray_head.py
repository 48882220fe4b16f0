"""A Ray head of one's own: `ray start --head` on 127.0.0.1, with own ports, token and folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from contract.machine.folders import short_folder, user_name
from orchestrator.local.processes import ChildRecord, free_ports, marked, start_child

# A socket's path has at most 107 bytes, and Ray adds a session and a name to the folder:
# /session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store_1
_FOLDER_BYTES = 38
_USER_CHARS = 12


@dataclass(frozen=True)
class HeadPlan:
    """How a local head starts. Every process that it starts carries `mark`."""

    home: Path
    mark: str
    token_file: Path
    cpus: int
    gpus: int = -1  # -1 lets Ray look
    memory_mib: int = 256
    resources: Mapping[str, float] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()  # how variables begin that no trial may see


def start_head(plan: HeadPlan) -> ChildRecord:
    """Starts `ray start --head --block` in a session of its own; it answers some 10 s later."""
    gcs, dashboard, client = free_ports(3)
    folder = _short_folder()
    command = [
        _ray_command(),
        "start",
        "--head",
        "--block",  # the command lives as long as the head, so its process stands for the head
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        # Ray opens this folder to everybody. The one around it is ours alone.
        f"--temp-dir={folder}/r",
        # Without these Ray takes fixed ports, and a second head on the machine cannot have them.
        f"--ray-client-server-port={client}",
        "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false",
        f"--object-store-memory={plan.memory_mib << 20}",
        f"--num-cpus={plan.cpus}",
    ]
    if plan.gpus >= 0:
        command.append(f"--num-gpus={plan.gpus}")
    if plan.resources:
        command.append(f"--resources={json.dumps(dict(plan.resources))}")
    url = f"http://127.0.0.1:{dashboard}"
    return start_child("ray", command, _environment(plan), plan.home, url=url, folder=folder)


def _environment(plan: HeadPlan) -> dict[str, str]:
    # Settings of another cluster, or of the service itself, must not reach the head.
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MASKRAY_", *plan.hidden))
    }
    clean["PYTHONPATH"] = python_path()
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(plan.token_file),
        # Ray's own switch for a head that listens on 127.0.0.1 alone
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
        # A trial yields to other programs no more than `maskray train` does; Ray's own is 15.
        "RAY_worker_niceness": "0",
    }
    return marked({**clean, **own}, plan.mark)


def python_path() -> str:
    """PYTHONPATH with this tree in front, so that a child process runs these sources."""
    source = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))


def _ray_command() -> str:
    # The `ray` of this Python's environment goes before another one on the PATH.
    beside = Path(sys.executable).with_name("ray")
    command = str(beside) if beside.exists() else shutil.which("ray")
    if not command:
        raise RuntimeError(
            f"no `ray` command beside {sys.executable}: install maskray's dependencies into it"
        )
    return command


def _short_folder() -> str:
    """A private folder for Ray's sockets, whose paths must stay short."""
    return tempfile.mkdtemp(prefix=_prefix(), dir=folder_for_sockets())


def folder_for_sockets() -> str:
    """Where a head's own folder goes. Raises ValueError, which says what to set."""
    return short_folder(_FOLDER_BYTES - len(f"/{_prefix()}xxxxxxxx"))


def _prefix() -> str:
    return f"mr-{user_name()[:_USER_CHARS]}-"

"""The service of a folder: started detached by the first command that needs it, found by the others."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx

from orchestrator.client import Client, Connection
from orchestrator.local.processes import (
    ChildRecord,
    find_child,
    recorded_child,
    start_child,
    wait_until_gone,
    write_private,
)
from orchestrator.settings import Limits, ServiceSettings

STATE = ".maskray"
_START_S = 120.0  # on a starved machine; an idle one needs about two seconds


def state_folder(root: Path | None = None) -> Path:
    """Where this folder's own service keeps everything."""
    return (root or Path.cwd()).absolute() / STATE


def local_settings(root: Path) -> ServiceSettings:
    """The settings of `root`'s own service: those in .maskray/service.yaml, on top of what suits one machine."""
    home = state_folder(root)
    chosen = {
        "home": str(home),
        "port": 0,
        "idle_minutes": 30.0,
        "entry": (sys.executable, "-m", "workers.ray_entry"),
        "environment": {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))},
        "limits": Limits(backoff_s=5.0),
    }
    file = home / "service.yaml"
    if file.exists():
        import yaml

        read = yaml.safe_load(file.read_text()) or {}
        if not isinstance(read, dict):
            raise ValueError(f"{file}: must hold settings by name")
        chosen |= read
    return ServiceSettings.model_validate(chosen)


def connect() -> Connection:
    """The service that commands talk to: MASKRAY_SERVER with MASKRAY_TOKEN, else this folder's own."""
    configured = _configured()
    return configured if configured is not None else ensure_local_service(Path.cwd())


def connected_client() -> Client:
    return Client(connect())


def running_client() -> Client | None:
    """A client of the service if there is one; starts nothing."""
    configured = _configured()
    if configured is not None:
        return Client(configured)
    found = _find(state_folder())
    return Client(found) if found is not None else None


def _configured() -> Connection | None:
    url = os.environ.get("MASKRAY_SERVER", "")
    if not url:
        return None
    token = os.environ.get("MASKRAY_TOKEN", "").strip()
    if not token:
        raise ValueError(
            f"MASKRAY_SERVER is {url}, but MASKRAY_TOKEN is empty: set it to your token"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            "MASKRAY_TOKEN: holds characters that no token has; set it to the one line that you were given"
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"MASKRAY_SERVER: {url!r} is no URL; write http://HOST:PORT")
    return Connection(url.rstrip("/"), token)


def ensure_local_service(root: Path) -> Connection:
    """The living service of `root`, started if there is none; Ray and MLflow come up behind it."""
    home = state_folder(root)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(home):
        found = _find(home)
        if found is not None:
            return found
        settings = local_settings(root)
        source = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        }
        file = home / "settings.json"
        write_private(file, settings.model_dump_json())
        command = [sys.executable, "-m", "orchestrator.server.service", str(file)]
        child = start_child("service-process", command, environment, home, url="")
        return _await(child, home)


def shut_down(root: Path) -> bool:
    """Ends `root`'s service, its Ray head and its MLflow server. False if there was none.

    The ledger keeps what was running: the next service takes it up.
    """
    from orchestrator.local import stack

    home = state_folder(root)
    if not home.is_dir():
        return False
    settings = ServiceSettings(home=str(home))
    with _alone(home):
        child = find_child("service", home)
        found = _find(home) if child is not None else None
        if child is not None and found is not None:
            with Client(found) as client:
                client.shut_down()
            wait_until_gone(child.pid, child.created, 30.0)
        any_child = child is not None or any(
            recorded_child(name, home) for name in ("ray", "mlflow")
        )
        for name in ("service", "service-process"):
            _end(name, home)
        stack.end_ray(settings)
        stack.end_mlflow(settings)
    return any_child


def _end(name: str, home: Path) -> None:
    """Ends a service process that did not end by itself, without what it started: that is ended by its marks."""
    from orchestrator.local.processes import end_processes

    child = recorded_child(name, home)
    if child is not None and child.alive():
        import psutil

        end_processes([psutil.Process(child.pid)], 10.0)
    (home / f"{name}.json").unlink(missing_ok=True)


def _find(home: Path) -> Connection | None:
    child = find_child("service", home)
    if child is None or not child.url:
        return None
    token = (home / "token").read_text().strip()
    return Connection(child.url, token, home.parent) if _healthy(child.url) else None


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/health", timeout=10.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _await(child: ChildRecord, home: Path) -> Connection:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        found = _find(home)
        if found is not None:
            return found
        if not child.alive():
            break
        time.sleep(0.1)
    log = home / "service-process.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    raise RuntimeError(
        f"the local service did not start: {lines[-1] if lines else 'it said nothing'}; see {log}"
    )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Two commands at once start one service."""
    with (home / "start.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_service_record(home: Path, url: str) -> None:
    """What `_find` reads, written by the service itself once it listens."""
    import psutil

    me = psutil.Process()
    write_private(
        home / "service.json",
        json.dumps(asdict(ChildRecord("service", me.pid, me.create_time(), url))),
    )

"""The service of a folder: started detached by the first command that needs it, found by others."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from contract.record import parse_record
from orchestrator.client import Client, Connection, configured
from orchestrator.local.processes import (
    ChildRecord,
    end_processes,
    find_child,
    own_home,
    recorded_child,
    remove_record,
    start_child,
    wait_until_gone,
    write_child,
    write_private,
)
from orchestrator.local.ray_head import python_path
from orchestrator.settings import Limits, ServiceSettings, read_settings

STATE = ".maskray"
_START_S = 120.0  # on a starved machine; an idle one needs about two seconds
_END_S = 30.0  # for a service to end its threads, its Ray head and its MLflow server

# Two records of one process: `service-process` is written by whoever starts it, and `service` by
# the service itself once it listens, with its URL.
_STARTED, _LISTENING = "service-process", "service"


def state_folder(root: Path | None = None) -> Path:
    """Where this folder's own service keeps everything."""
    return (root or Path.cwd()).absolute() / STATE


def local_settings(root: Path) -> ServiceSettings:
    """The settings of `root`'s own service: .maskray/service.yaml on top of what suits a laptop."""
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
        chosen |= read_settings(file)
    return parse_record(ServiceSettings, chosen, str(file))


def connect() -> Connection:
    """The service that commands talk to.

    That is MASKRAY_SERVER with MASKRAY_TOKEN, else this folder's own service.
    """
    named = configured(os.environ)
    return named if named is not None else ensure_local_service(Path.cwd())


def connected_client() -> Client:
    """A client of the service, which is started if this folder's own does not run."""
    return Client(connect())


def running_client() -> Client | None:
    """A client of the service if one runs; starts nothing."""
    connection = configured(os.environ) or _find(state_folder())
    return Client(connection) if connection is not None else None


def ensure_local_service(root: Path) -> Connection:
    """The living service of `root`, started if there is none; Ray and MLflow come up behind it."""
    home = state_folder(root)
    with _writable(home), _locked(home):
        running = _find(home)
        if running is not None:
            return running
        # In a file: every user of the machine can read a command line.
        file = home / "settings.json"
        write_private(file, local_settings(root).model_dump_json())
        command = [sys.executable, "-m", "orchestrator.server.service", str(file)]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        child = start_child(_STARTED, command, environment, home, url="")
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
    with _locked(home):
        child = find_child(_LISTENING, home)
        connection = _find(home)
        if child is not None and connection is not None:
            with Client(connection) as client:
                client.shut_down()
            wait_until_gone(child, _END_S)
        left = [recorded_child(name, home) for name in ("ray", "mlflow")]
        for name in (_LISTENING, _STARTED):
            _end_process(name, home)
        stack.end_ray(settings)
        stack.end_mlflow(settings)
    return child is not None or any(left)


def _end_process(name: str, home: Path) -> None:
    """Ends a service that did not end by itself, without its children: their marks name them."""
    child = recorded_child(name, home)
    if child is not None and child.alive():
        import psutil

        end_processes([psutil.Process(child.pid)], 10.0)
    remove_record(name, home)


def _find(home: Path) -> Connection | None:
    child = find_child(_LISTENING, home)
    if child is None or not child.url or not _healthy(child.url):
        return None
    return Connection(child.url, (home / "token").read_text("utf-8").strip(), home.parent)


def _healthy(url: str) -> bool:
    try:
        # trust_env=False: the service runs on this machine, so no proxy comes in between.
        answer = httpx.get(f"{url}/v1/health", timeout=10.0, trust_env=False)
        # 503: it lives, but its loop or its ledger stands still; a second one could not help
        return answer.status_code in (200, 503)
    except httpx.HTTPError:
        return False


def _await(child: ChildRecord, home: Path) -> Connection:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        running = _find(home)
        if running is not None:
            return running
        if not child.alive():
            break
        time.sleep(0.1)
    log = home / f"{_STARTED}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    raise RuntimeError(
        f"the local service did not start: {lines[-1] if lines else 'it said nothing'}; see {log}"
    )


@contextmanager
def _writable(home: Path) -> Iterator[None]:
    """Makes `home`. Raises ValueError or RuntimeError of one line where it cannot be written."""
    try:
        own_home(home)
        yield
    except OSError as error:
        match error.errno:
            case errno.EROFS | errno.EACCES | errno.EPERM:
                raise ValueError(
                    f"{home} cannot be written ({error.strerror}), and maskray keeps its service "
                    "there; go to a folder of your own, or set MASKRAY_SERVER to a running service"
                ) from error
            case errno.ENOSPC | errno.EDQUOT:
                raise RuntimeError(
                    f"no space left for {home} ({error.strerror}); free some, or go to a folder on "
                    "another disk"
                ) from error
        raise


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Two commands at once start one service."""
    with (home / "start.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the end of the process releases it, even a kill
        yield


def write_service_record(home: Path, url: str) -> None:
    """What `_find` reads, written by the service itself once it listens."""
    import psutil

    me = psutil.Process()
    child = ChildRecord(name=_LISTENING, pid=me.pid, created=me.create_time(), url=url)
    write_child(child, home)

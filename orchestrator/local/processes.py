"""The processes that a local service starts, remembered in files so that its successor finds them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ChildRecord:
    """A process by id and start time: an id alone may by now be another program's."""

    name: str
    pid: int
    created: float
    url: str
    folder: str = ""  # deleted when the process is ended

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and abs(process.create_time() - self.created) < 0.1
            )
        except psutil.NoSuchProcess:
            return False


def start_child(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    home: Path,
    url: str,
    folder: str = "",
) -> ChildRecord:
    """Starts a program (by its path) that outlives this one; output in `home/NAME.log`, record in `home/NAME.json`."""
    home.mkdir(parents=True, exist_ok=True)
    log = str(home / f"{name}.log")
    pid = os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    child = ChildRecord(name, pid, psutil.Process(pid).create_time(), url, folder)
    write_private(home / f"{name}.json", json.dumps(asdict(child)))
    return child


def find_child(name: str, home: Path) -> ChildRecord | None:
    """The recorded process if it is alive."""
    child = recorded_child(name, home)
    return child if child is not None and child.alive() else None


def recorded_child(name: str, home: Path) -> ChildRecord | None:
    path = home / f"{name}.json"
    try:
        return ChildRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"{path}: {error}; delete the file") from error


def end_child(name: str, home: Path, wait_s: float = 10.0) -> None:
    """Ends a recorded process with all that it started, and removes its record and folder."""
    child = recorded_child(name, home)
    if child is None:
        return
    if child.alive():
        root = psutil.Process(child.pid)
        end_processes([*root.children(recursive=True), root], wait_s)
    if child.folder:
        shutil.rmtree(child.folder, ignore_errors=True)
    (home / f"{name}.json").unlink(missing_ok=True)


def marked_processes(mark: str) -> list[psutil.Process]:
    """This user's processes that carry MASKRAY_MARK=`mark` in their environment, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("MASKRAY_MARK") == mark:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            continue
    return found


def end_processes(processes: Sequence[psutil.Process], wait_s: float) -> None:
    """Asks them to end, and after `wait_s` makes them."""
    _signal(processes, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=wait_s)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on at 127.0.0.1 now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def write_private(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    partial.replace(path)


def own_token(path: Path) -> str:
    """The token in `path`, made if there is none yet."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(32))
        return path.read_text().strip()


def wait_until_gone(pid: int, created: float, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    child = ChildRecord("", pid, created, "")
    while child.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

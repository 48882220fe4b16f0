"""The processes that a local service starts, remembered in files so that its successor finds them.

Supervision is written by hand. The children outlive this process, and the service that comes after
it takes them over. Ray starts the driver of each job in a session of its own, so no process group
holds all of them: a mark in the environment names them.
"""

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
from pathlib import Path

import psutil

from contract.record import Record, parse_record

_MARK = "MASKRAY_MARK"  # a variable in the environment of every process that belongs to a service
_SAME_START_S = 0.1  # two readings of one process's start time are closer than this
_KILLED_S = 5.0  # for processes to be gone after SIGKILL


class ChildRecord(Record):
    """A process by id and start time: an id alone may by now be another program's."""

    name: str
    pid: int
    created: float
    url: str
    folder: str = ""  # deleted when the process is ended

    def alive(self) -> bool:
        """Whether the process runs, and is the one that was recorded."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _SAME_START_S
            # A zombie has ended, and nobody has read its exit status yet.
            return same and process.status() != psutil.STATUS_ZOMBIE
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
    """Starts a program (by its path) that outlives this one.

    Its output goes to `home`/NAME.log, its record to `home`/NAME.json.
    """
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
        setsid=True,  # Ctrl-C in the terminal must not reach it
    )
    child = ChildRecord(
        name=name, pid=pid, created=psutil.Process(pid).create_time(), url=url, folder=folder
    )
    write_child(child, home)
    return child


def write_child(child: ChildRecord, home: Path) -> None:
    """Remembers a process for the service that comes after this one."""
    write_private(_record_file(child.name, home), json.dumps(child.model_dump()))


def find_child(name: str, home: Path) -> ChildRecord | None:
    """The recorded process if it is alive."""
    child = recorded_child(name, home)
    return child if child is not None and child.alive() else None


def recorded_child(name: str, home: Path) -> ChildRecord | None:
    """The recorded process, alive or dead. Raises RuntimeError if its file is no record."""
    path = _record_file(name, home)
    try:
        return parse_record(ChildRecord, json.loads(path.read_text("utf-8")), "its process")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RuntimeError(f"{path}: {error}; delete the file") from error


def remove_record(name: str, home: Path) -> None:
    _record_file(name, home).unlink(missing_ok=True)


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
    remove_record(name, home)


def marked(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    """The environment of a process that `marked_processes` finds, and so all that it starts."""
    return {**environment, _MARK: mark}


def marked_processes(mark: str) -> list[psutil.Process]:
    """This user's processes that carry `mark` in their environment, except this process."""
    matches = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                matches.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            continue  # it is another user's, or it ended in between
    return matches


def end_processes(processes: Sequence[psutil.Process], wait_s: float) -> None:
    """Asks processes to end, and kills those that still live after `wait_s`."""
    _signal(processes, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=wait_s)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=_KILLED_S)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on at 127.0.0.1 now."""
    with ExitStack() as stack:
        # All are open at once: a closed one could be given out a second time.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def write_private(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # a process of the same id may have died here
    # O_EXCL: no link that another user put there is followed.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    partial.replace(path)


def own_home(home: Path) -> None:
    """The folder of a service's own files, for nobody else to read, whoever made it before."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    # `maskray data synth .maskray/demo` makes it as every other folder
    if home.stat().st_mode & 0o077:
        home.chmod(0o700)


def own_token(path: Path) -> str:
    """The token in `path`, made if there is none yet."""
    try:
        return path.read_text("utf-8").strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(32))
        return path.read_text(
            "utf-8"
        ).strip()  # another process may have written its own in between


def check_private(path: Path) -> None:
    """Raises ValueError if others can read the file of a secret."""
    status = path.stat()
    # Kubernetes mounts secrets as root's, readable by a group: that group is then how we read them
    others = 0o077 if status.st_uid == os.getuid() else 0o007
    if status.st_mode & others:
        raise ValueError(f"{path}: others can read it; chmod 600 it")


def wait_until_gone(child: ChildRecord, wait_s: float) -> bool:
    """Whether the process ends within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while child.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _record_file(name: str, home: Path) -> Path:
    return home / f"{name}.json"

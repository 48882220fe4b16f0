"""Temporary folders that do not outlive a killed process for long."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"  # held while the folder is in use; the system releases it when a process dies
_YOUNG_S = 60.0  # a folder may be locked a moment after it is made


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for this block alone. Folders of killed processes, by their prefix, go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        _remove_abandoned(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, (Path(name) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process
        yield Path(name)


def _remove_abandoned(lock: Path) -> None:
    """Removes a folder that nobody holds locked."""
    try:
        if time.time() - lock.stat().st_mtime < _YOUNG_S:
            return
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except (FileNotFoundError, PermissionError, BlockingIOError):
        return  # in use, another user's, or removed meanwhile

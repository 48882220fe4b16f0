"""A bounded folder of verified copies of remote shards, shared by all processes of a node.

A file's name is its SHA-256. A lock for each file keeps two processes from fetching it twice, one lock for the folder
guards eviction. Evicting a file that another process has mapped is safe: its pages live until it is unmapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.manifest import FileEntry
from pipelines.storage import Store, retried

FETCHES = 2  # after a second wrong hash the store itself holds wrong bytes


class Cache:
    def __init__(self, folder: str, cap_gib: float):
        self.folder = Path(folder or Path(tempfile.gettempdir()) / f"maskray-cache-{os.getuid()}")
        self.cap_bytes = int(cap_gib * 2**30)

    def fetch(self, store: Store, entry: FileEntry, describe: Callable[[Path], str] = lambda _: "") -> Path:
        """The local copy of a file of `store`, verified on arrival.

        Raises RuntimeError if its hash is wrong twice (then `describe` is asked what is wrong with the copy) or the
        store stays unreachable.
        """
        path = self.folder / f"{entry.sha256}.arrow"
        if _touch(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{entry.sha256}.lock"):
            if _touch(path):
                return path
            part = path.with_suffix(".part")  # a crashed process leaves it; the next one writes over it
            for _ in range(FETCHES):
                found = retried(lambda: _download(store, entry.name, part), store.describe(entry.name))
                if found == entry.sha256:
                    with _locked(self.folder / "eviction.lock"):
                        self._evict(entry.bytes)
                        part.replace(path)
                    return path
                aside = self._quarantine(part, found)
        raise RuntimeError(
            f"{store.describe(entry.name)}{describe(aside)}: sha256 {found[:12]}..., "
            f"the manifest says {entry.sha256[:12]}...; fetched {FETCHES} times, the last copy is {aside}; "
            'pack it again with "maskray data pack"'
        )

    def _quarantine(self, part: Path, found: str) -> Path:
        target = self.folder / "quarantine" / f"{found}.arrow"
        target.parent.mkdir(exist_ok=True)
        return part.replace(target)

    def _evict(self, incoming: int) -> None:
        """Removes the files used longest ago until `incoming` bytes fit."""
        files = sorted((file.stat().st_mtime_ns, file.stat().st_size, file) for file in self.folder.glob("*.arrow"))
        total = sum(size for _, size, _ in files) + incoming
        for _, size, file in files:
            if total <= self.cap_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(store: Store, name: str, target: Path) -> str:
    digest = hashlib.sha256()
    store.copy_to(name, target, digest.update)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock that ends with the process."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

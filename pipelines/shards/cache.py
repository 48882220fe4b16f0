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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from contract.files import Files, file_sha256, retried
from pipelines.shards.manifest import FileEntry

QUARANTINED = 4  # damaged copies that are kept, to be looked at
FETCHES = 2  # after a second wrong hash the store itself holds wrong bytes

T = TypeVar("T")


class Cache:
    def __init__(self, folder: str, cap_gib: float):
        self.folder = Path(folder or Path(tempfile.gettempdir()) / f"maskray-cache-{os.getuid()}")
        self.cap_bytes = int(cap_gib * 2**30)
        self.evicted = 0  # files that this process removed for want of room

    def fetch(
        self,
        store: Files,
        entry: FileEntry,
        use: Callable[[Path], T],
        describe: Callable[[Path], str] = lambda _: "",
    ) -> T:
        """`use` of the local copy of a file of `store`, verified on arrival. It is not evicted while it is being used.

        Raises RuntimeError if its hash is wrong twice (then `describe` is asked what is wrong with the copy) or the
        store stays unreachable.
        """
        path = self.folder / f"{entry.sha256}.arrow"
        with self._kept():
            if _touch(path):
                return use(path)
        with _locked(self.folder / f"{entry.sha256}.lock"):
            with self._kept():
                if _touch(path):  # by another process, meanwhile
                    return use(path)
            part = path.with_suffix(
                ".part"
            )  # a crashed process leaves it; the next one writes over it
            for _ in range(FETCHES):
                found = retried(
                    lambda: _download(store, entry.name, part), store.describe(entry.name)
                )
                if found == entry.sha256:
                    with self._kept(fcntl.LOCK_EX):
                        self._evict(entry.bytes)
                        part.replace(path)
                        return use(path)
                aside = self._quarantine(part, found)
        raise RuntimeError(
            f"{store.describe(entry.name)}{describe(aside)}: sha256 {found[:12]}..., "
            f"the manifest says {entry.sha256[:12]}...; fetched {FETCHES} times, the last copy is {aside}; "
            'remove it from the store and pack again with "maskray data pack"'
        )

    def drop_if_damaged(self, entry: FileEntry) -> None:
        """Removes a copy whose bytes changed after its arrival."""
        path = self.folder / f"{entry.sha256}.arrow"
        with self._kept(fcntl.LOCK_EX):
            if path.exists() and file_sha256(path) != entry.sha256:
                path.unlink()

    def _kept(self, how: int = fcntl.LOCK_SH) -> AbstractContextManager[None]:
        """While it is held shared nothing is evicted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return _locked(self.folder / "eviction.lock", how)

    def _quarantine(self, part: Path, found: str) -> Path:
        target = self.folder / "quarantine" / f"{found}.arrow"
        target.parent.mkdir(exist_ok=True)
        for older in sorted(
            target.parent.glob("*.arrow"), key=lambda file: file.stat().st_mtime_ns
        )[: 1 - QUARANTINED]:
            older.unlink(missing_ok=True)
        return part.replace(target)

    def _evict(self, incoming: int) -> None:
        """Removes the files used longest ago until `incoming` bytes fit."""
        files = sorted(
            (file.stat().st_mtime_ns, file.stat().st_size, file)
            for file in self.folder.glob("*.arrow")
        )
        total = sum(size for _, size, _ in files) + incoming
        for _, size, file in files:
            if total <= self.cap_bytes:
                return
            file.unlink(missing_ok=True)
            self.evicted += 1
            total -= size


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(store: Files, name: str, target: Path) -> str:
    digest = hashlib.sha256()
    store.copy_to(name, target, digest.update)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds an advisory lock that ends with the process."""
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield

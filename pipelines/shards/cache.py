"""A bounded folder of verified copies of remote shards, shared by all processes of a node.

A file's name is its SHA-256. A lock for each file keeps two processes from fetching it twice, and
one lock for the folder guards eviction. A file that another process has mapped may be evicted: its
pages live until it is unmapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from contract.files import Files, file_sha256, retried
from contract.machine.folders import own_folder, own_path
from pipelines.shards.manifest import FileEntry

QUARANTINED = 4  # damaged copies that are kept, to be looked at
FETCHES = 2  # after a second wrong hash the store itself holds wrong bytes

T = TypeVar("T")


class Cache:
    """One folder of at most `cap_gib`. An empty name means the user's in the temporary folder."""

    def __init__(self, folder: str, cap_gib: float):
        self.folder = Path(folder) if folder else own_path("cache")
        self._own = not folder  # else users may share it
        self.cap_bytes = int(cap_gib * 2**30)
        self.evicted = 0  # files that this process removed for want of room

    def fetch(
        self,
        store: Files,
        entry: FileEntry,
        use: Callable[[Path], T],
        describe: Callable[[Path], str] = lambda _: "",
    ) -> T:
        """`use` of the local copy of a file of `store`, which is verified on arrival.

        The copy is not evicted while `use` runs. Raises RuntimeError if the store stays
        unreachable, or if the hash is wrong twice; the message then has what `describe` says of the
        copy.
        """
        path = self.folder / f"{entry.sha256}.arrow"
        with self._kept():
            if _touch(path):
                return use(path)
        with _locked(self.folder / f"{entry.sha256}.lock"):
            with self._kept():
                if _touch(path):  # another process fetched it while this one waited for the lock
                    return use(path)
            # A crashed process leaves this file; the next one writes over it.
            part = path.with_suffix(".part")
            for _ in range(FETCHES):
                sha256 = retried(
                    lambda: _download(store, entry.name, part), store.describe(entry.name)
                )
                if sha256 == entry.sha256:
                    # `use` is inside the lock: the file must not go before it is mapped.
                    with self._kept(fcntl.LOCK_EX):
                        self._evict(entry.bytes)
                        part.replace(path)
                        return use(path)
                aside = self._quarantine(part, sha256)
        raise RuntimeError(
            f"{store.describe(entry.name)}{describe(aside)}: sha256 {sha256[:12]}..., "
            f"the manifest says {entry.sha256[:12]}...; fetched {FETCHES} times, the last copy is "
            f'{aside}; remove it from the store and pack again with "maskray data pack"'
        )

    def drop_if_damaged(self, entry: FileEntry) -> None:
        """Removes a copy whose bytes changed after its arrival."""
        # Not part of `fetch`: hashing each shard at each opening would read everything twice.
        path = self.folder / f"{entry.sha256}.arrow"
        with self._kept(fcntl.LOCK_EX):
            if path.exists() and file_sha256(path) != entry.sha256:
                path.unlink()

    def _kept(self, how: int = fcntl.LOCK_SH) -> AbstractContextManager[None]:
        """Nothing is evicted while a process holds this lock, shared by default."""
        if self._own:
            own_folder("cache")
        self.folder.mkdir(parents=True, exist_ok=True)
        return _locked(self.folder / "eviction.lock", how)

    def _quarantine(self, part: Path, sha256: str) -> Path:
        """Moves a damaged copy aside and removes the oldest of those that are too many."""
        target = self.folder / "quarantine" / f"{sha256}.arrow"
        target.parent.mkdir(exist_ok=True)
        copies = sorted(target.parent.glob("*.arrow"), key=lambda file: file.stat().st_mtime_ns)
        for older in copies[: 1 - QUARANTINED]:
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
    """Marks a copy as used now, which eviction goes by. False if there is none."""
    try:
        os.utime(path)  # also tells whether it exists, in one call and without a gap
    except FileNotFoundError:
        return False
    return True


def _download(store: Files, name: str, target: Path) -> str:
    """Copies a file; returns the SHA-256 of the bytes that came."""
    digest = hashlib.sha256()
    store.copy_to(name, target, digest.update)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds an advisory lock that ends with the process."""
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield

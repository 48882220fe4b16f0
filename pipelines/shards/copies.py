"""Copies of a dataset's files, compared with the manifest on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

from contract.files import Files, retried
from pipelines.shards.manifest import FileEntry


def copy_and_compare(store: Files, entry: FileEntry, copy: Path) -> str | None:
    """Copies a file of a dataset while hashing it; what is wrong with it, or None."""
    size = store.size(entry.name)
    if size is None:
        return 'missing; restore it or pack the data again with "maskray data pack"'

    def read() -> str:
        digest = hashlib.sha256()
        store.copy_to(entry.name, copy, digest.update)
        return digest.hexdigest()

    sha256 = retried(read, store.describe(entry.name))
    if sha256 == entry.sha256:
        return None
    # A wrong size says more than a wrong hash: the file was cut short, or is another one.
    if size != entry.bytes:
        return (
            f"has {size} bytes, the manifest says {entry.bytes}; restore it or pack the data again"
        )
    return (
        f"sha256 {sha256[:12]}..., the manifest says {entry.sha256[:12]}...; restore it or pack "
        "the data again"
    )

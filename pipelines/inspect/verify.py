"""Reads every byte of a packed dataset and compares it with the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contract.data import MANIFEST_NAME
from contract.files import Files
from contract.machine.folders import scratch
from pipelines.progress import Progress, silent
from pipelines.shards.copies import copy_and_compare
from pipelines.shards.index import Index
from pipelines.shards.manifest import Manifest, read_manifest
from pipelines.shards.rows import damaged_rows


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file. row: of the shard, where it can be told, else None."""

    shard: str
    row: int | None
    error: str


@dataclass(frozen=True)
class Verification:
    """What was read, and what is wrong with it."""

    shards: int
    samples: int
    errors: tuple[Damage, ...]


def verify(uri: str, progress: Progress = silent) -> Verification:
    """Reads every byte of a dataset and returns what is wrong with it.

    Raises ValueError if there is no dataset.
    """
    store = Files(uri)
    try:
        manifest = read_manifest(store)
    except RuntimeError as error:
        return Verification(0, 0, (Damage(MANIFEST_NAME, None, str(error)),))
    # One file at a time is copied, so that a remote dataset may be larger than the disk here.
    with scratch("verify") as folder:
        errors = list(_damages(store, manifest, Path(folder), progress))
    return Verification(manifest.num_shards, manifest.num_images, tuple(errors))


def _damages(
    store: Files, manifest: Manifest, folder: Path, progress: Progress
) -> Iterator[Damage]:
    index: Index | None = None
    # The index comes first: only it tells which rows of a damaged shard are damaged.
    entries = (manifest.index, *manifest.shards)
    for number, entry in enumerate(entries):
        copy = folder / "copy"
        error = copy_and_compare(store, entry, copy)
        if number == 0 and error is None:
            index = Index(copy.rename(folder / "index"))
        elif error is not None:
            rows = (
                damaged_rows(copy, index.column(number - 1, "crc32"))
                if number and index and copy.exists()
                else []
            )
            # Without a row the whole file is named.
            yield from (Damage(entry.name, row, error) for row in rows or [None])
        copy.unlink(missing_ok=True)
        progress(number + 1, len(entries))

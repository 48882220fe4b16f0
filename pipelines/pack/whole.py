"""The end of a packed dataset: its index, its reports and, last of all, its manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa

from contract.data import MANIFEST_NAME, SCHEMA_VERSION
from contract.files import Files, file_sha256
from contract.machine.folders import own_name
from pipelines.coco.checks import Problem
from pipelines.coco.records import JsonObject
from pipelines.coco.remarks import Remark
from pipelines.pack.scratch import scratch_folder
from pipelines.pack.shard import ShardNote, ShardPlace, file_entry
from pipelines.shards import schema
from pipelines.shards.manifest import INDEX_NAME, FileEntry, Manifest, parse_manifest

PROGRESS_FOLDER = ".packing"
SKIPPED_NAME = "skipped.json"
REMARKS_NAME = "remarks.json"


@dataclass(frozen=True)
class Head:
    """What a manifest says of the whole dataset, beside its shards. `source`: of its inputs."""

    categories: tuple[JsonObject, ...]
    info: JsonObject
    licenses: tuple[JsonObject, ...]
    source: str


def check_out(out: Files) -> None:
    """Raises ValueError if no dataset can be written there."""
    if out.local is not None and out.local.exists() and not out.local.is_dir():
        raise ValueError(f"{out.name}: is a file; give --out a folder")


def existing(out: Files, source: str, num_workers: int) -> Manifest | None:
    """The dataset of these inputs if it is there and whole.

    On this machine every hash is compared, elsewhere every size: hashes would fetch all shards.
    Raises ValueError if another dataset is there.
    """
    if out.size(MANIFEST_NAME) is None:
        return None
    try:
        manifest = parse_manifest(out.read(MANIFEST_NAME), out.describe(MANIFEST_NAME))
    except RuntimeError:
        return None  # it is damaged, and packing again is the remedy
    if manifest.source != source:
        raise ValueError(
            f"{out.name}: holds a dataset packed from other inputs or options; choose another "
            "--out or remove it first"
        )
    entries = (*manifest.shards, manifest.index)
    if out.sizes([entry.name for entry in entries]) != [entry.bytes for entry in entries]:
        return None
    if (local := out.local) is not None:
        with ThreadPoolExecutor(num_workers) as threads:
            hashes = list(threads.map(lambda entry: file_sha256(local / entry.name), entries))
        if hashes != [entry.sha256 for entry in entries]:
            return None
    return manifest


def _is_whole(out: Files, entry: FileEntry) -> bool:
    """Whether the file is there with the bytes of its entry; behind a URI with their number."""
    if out.size(entry.name) != entry.bytes:
        return False
    return out.local is None or file_sha256(out.local / entry.name) == entry.sha256


def finished(place: ShardPlace) -> ShardNote | None:
    """The note of an earlier run for this shard, if both of its files are whole."""
    try:
        note = ShardNote.model_validate_json(place.out.read(place.note_name))
        whole = all(_is_whole(place.out, entry) for entry in (note.shard, note.index))
    except (FileNotFoundError, ValueError):
        return None  # a crash may cut a note short
    return note if whole else None


def known_problems(out: Files) -> list[Problem]:
    """What was left out of the dataset when it was packed."""
    if out.size(SKIPPED_NAME) is None:
        return []
    return [Problem(**fields) for fields in json.loads(out.read(SKIPPED_NAME))]


def known_remarks(out: Files) -> tuple[Remark, ...]:
    """What was remarked of the dataset when it was packed."""
    if out.size(REMARKS_NAME) is None:
        return ()
    return tuple(Remark(**fields) for fields in json.loads(out.read(REMARKS_NAME)))


def write_remarks(out: Files, found: Sequence[Remark]) -> None:
    """Leaves the remarks beside the dataset."""
    if found:
        out.write_json(REMARKS_NAME, [remark.model_dump(mode="json") for remark in found])
    else:
        out.delete(REMARKS_NAME)  # an earlier run may have left one


def finish(
    out: Files, notes: Sequence[ShardNote], skipped: Sequence[Problem], head: Head
) -> Manifest:
    """Joins the index, writes the report of skipped inputs, and last the manifest.

    Readers look for the manifest, so they never see a part of a dataset.
    """
    num_rows = sum(note.shard.rows for note in notes)
    with scratch_folder(f"{own_name('pack')}-") as temporary:
        path = temporary / INDEX_NAME
        with pa.ipc.new_file(str(path), schema.INDEX) as writer:
            for note in notes:
                piece = pa.ipc.open_file(pa.py_buffer(out.read(note.index.name)))
                writer.write_batch(piece.get_batch(0))
        index = file_entry(path, INDEX_NAME, num_rows)
        content = path.read_bytes()
    out.write(INDEX_NAME, content)
    if skipped:
        text = json.dumps([asdict(problem) for problem in skipped], indent=1)
        out.write(SKIPPED_NAME, text.encode())
    else:
        out.delete(SKIPPED_NAME)  # an earlier run may have left one
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        num_images=num_rows,
        num_annotations=sum(note.annotations for note in notes),
        num_shards=len(notes),
        categories=head.categories,
        has_masks=any(note.masks for note in notes),
        has_keypoints=any(note.keypoints for note in notes),
        shards=tuple(note.shard for note in notes),
        index=index,
        num_skipped=len(skipped),
        source=head.source,
        info=head.info,
        licenses=head.licenses,
    )
    out.write(MANIFEST_NAME, manifest.dump())
    out.delete(PROGRESS_FOLDER)
    return manifest

"""COCO JSON and image files to Arrow shards: parallel, atomic, resumable, each bad input named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

from contract.data import MANIFEST_NAME, SCHEMA_VERSION
from contract.files import Files, file_sha256
from contract.machine.folders import own_name
from pipelines.coco.checks import (
    Problem,
)
from pipelines.coco.decoding import Exif
from pipelines.coco.remarks import Remark, Remarks
from pipelines.pack import annotation_sorter as sorter
from pipelines.pack.agreement import BoxForm, remark_whole
from pipelines.pack.scratch import scratch_folder
from pipelines.pack.shard import (
    OnError,
    ShardNote,
    ShardTask,
    chunks,
    file_entry,
    is_readable,
    other_name,
    pack_shard,
    reporter,
)
from pipelines.progress import Progress, silent
from pipelines.shards import schema
from pipelines.shards.manifest import INDEX_NAME, FileEntry, Manifest, parse_manifest

PROGRESS_FOLDER = ".packing"
SKIPPED_NAME = "skipped.json"
REMARKS_NAME = "remarks.json"
IMAGES_PER_LISTING = 1024  # file sizes asked for at a time


@dataclass(frozen=True)
class PackOptions:
    """How a dataset is packed. shard_mib: MiB of image files to a shard."""

    on_error: OnError = "fail"
    shard_mib: float = 64.0
    num_workers: int = 1  # it changes no byte
    exif: Literal["auto", Exif] = "auto"


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    manifest: Manifest
    skipped: int
    remarks: tuple[Remark, ...]
    unchanged: bool  # the same dataset was there already
    resumed_shards: int  # taken over from an interrupted run


def pack(
    annotation_files: Sequence[Path],
    images_uri: str,
    out_uri: str,
    options: PackOptions = PackOptions(),
    progress: Progress = silent,
) -> Packed:
    """Packs and returns the manifest. Calls `progress(shards done, shards in all)` as it goes on.

    Raises ValueError for the first bad input under "fail", or if `out_uri` holds another dataset.
    """
    images, out = Files(images_uri), Files(out_uri)
    if not images.exists():
        raise ValueError(
            f"{images.name}: no such folder; give --images the folder that the file names are "
            "relative to"
        )
    if out.local is not None and out.local.exists() and not out.local.is_dir():
        raise ValueError(f"{out.name}: is a file; give --out a folder")
    with scratch_folder(f"{own_name('pack')}-") as folder:
        sorted_file = folder / "sorted.sqlite"
        problems: list[Problem] = []
        report = reporter(problems, options.on_error)
        remarks = Remarks()
        local = images.local
        folders = [str(local.absolute()), str(local.resolve())] if local is not None else []
        contents = sorter.fill(sorted_file, annotation_files, report, remarks, folders)
        if contents.num_images == 0:
            files = ", ".join(str(path) for path in annotation_files)
            raise ValueError(f"{files}: lists no image that can be packed; give files with images")
        # Names and sizes of the image files stand for their content: hashing it is another pass.
        ranges, listing = _plan(sorted_file, images, options.shard_mib)
        source = _digest(contents.digest, listing, options)
        # Named by the inputs, so that a run with other inputs takes over nothing.
        progress_folder = f"{PROGRESS_FOLDER}/{source[:16]}"
        tasks = [
            ShardTask(
                number=number,
                first=first,
                last=last,
                sorted_file=sorted_file,
                sources=tuple(str(path) for path in annotation_files),
                images=images,
                out=out,
                progress=progress_folder,
                categories=contents.categories,
                on_error=options.on_error,
                # Without a sign, as detectron2 and browsers do.
                exif="apply" if options.exif == "auto" else options.exif,
                by_size=options.exif == "auto",
            )
            for number, (first, last) in enumerate(ranges)
        ]
        existing = _existing(out, source, options.num_workers)
        if existing is not None and not _any_mended(out, tasks):
            out.delete(PROGRESS_FOLDER)  # a crash after the manifest may have left it
            known = _known_remarks(out)
            return Packed(existing, existing.num_skipped, known, unchanged=True, resumed_shards=0)
        notes, resumed = _pack_shards(tasks, options.num_workers, progress)
        notes = _with_one_rule(tasks, notes, options.num_workers)
        sum((note.boxes for note in notes), BoxForm()).check()
        remarks.join(remark for note in notes for remark in note.remarks)
        remark_whole(
            remarks,
            contents.category_fields,
            frozenset().union(*(note.labels for note in notes)),
            sum(note.annotations for note in notes),
            sum(note.crowds for note in notes),
        )
        found = _write_remarks(out, remarks, any(note.masks for note in notes))
        manifest = _finish(tasks, contents, notes, problems, source)
    return Packed(manifest, manifest.num_skipped, found, unchanged=False, resumed_shards=resumed)


def _with_one_rule(
    tasks: Sequence[ShardTask], notes: list[ShardNote], num_workers: int
) -> list[ShardNote]:
    """Packs again the shards whose undecided images follow another EXIF rule than the dataset.

    The images that can tell decide for those that cannot: all came from one annotation tool.
    """
    if not tasks[0].by_size:
        return notes
    apply, ignore = sum(n.exif.apply for n in notes), sum(n.exif.ignore for n in notes)
    rule: Exif = "ignore" if ignore > apply else "apply"
    wrong = [
        replace(task, exif=rule)
        for task, note in zip(tasks, notes, strict=True)
        if note.exif.undecided and note.exif.rule != rule
    ]
    mended = {note.number: note for note in _run(wrong, num_workers)}
    return [mended.get(note.number, note) for note in notes]


def _write_remarks(out: Files, remarks: Remarks, masks: bool) -> tuple[Remark, ...]:
    """Leaves the remarks beside the dataset, and returns them."""
    # Without any mask, no object lacks one.
    found = tuple(remark for remark in remarks.all() if masks or remark.kind != "no_mask")
    if found:
        out.write_json(REMARKS_NAME, [remark.model_dump(mode="json") for remark in found])
    else:
        out.delete(REMARKS_NAME)  # an earlier run may have left one
    return found


def _known_remarks(out: Files) -> tuple[Remark, ...]:
    if out.size(REMARKS_NAME) is None:
        return ()
    return tuple(Remark(**fields) for fields in json.loads(out.read(REMARKS_NAME)))


def _plan(sorted_file: Path, images: Files, shard_mib: float) -> tuple[list[tuple[int, int]], str]:
    """Ranges of sequence numbers of about `shard_mib` of image files each, and a digest.

    The digest is of all names and sizes. A missing file has no size here; its shard reports it.
    """
    digest = hashlib.sha256()
    ranges: list[tuple[int, int]] = []
    first, size, last = 0, 0, 0
    for chunk in chunks(sorter.images(sorted_file), IMAGES_PER_LISTING):
        file_sizes = images.sizes([image.file_name for _, image in chunk])
        for (seq, image), file_size in zip(chunk, file_sizes, strict=True):
            if file_size is None and (other := other_name(images, image.file_name)):
                file_size = images.size(other)
            digest.update(f"{image.file_name}\0{file_size}\0".encode())
            size, last = size + (file_size or 0), seq + 1
            if size >= shard_mib * 2**20:
                ranges.append((first, last))
                first, size = last, 0
    if first < last:  # the last shard may be small
        ranges.append((first, last))
    return ranges, digest.hexdigest()


def _digest(contents: str, listing: str, options: PackOptions) -> str:
    """Of everything that decides the packed bytes: equal digests give equal datasets."""
    parts = [SCHEMA_VERSION, contents, listing, options.on_error, options.shard_mib]
    if options.exif != "auto":  # datasets from before there was a choice keep their digest
        parts.append(options.exif)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _existing(out: Files, source: str, num_workers: int) -> Manifest | None:
    """The dataset of these inputs if it is there and whole.

    On this machine every hash is compared, elsewhere every size: hashes would fetch all shards.
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


def _any_mended(out: Files, tasks: Sequence[ShardTask]) -> bool:
    """Whether an image that was left out could be packed now.

    The digest of the inputs cannot tell: a mended file may have the size that it had before.
    """
    if out.size(SKIPPED_NAME) is None:
        return False
    problems = [Problem(**fields) for fields in json.loads(out.read(SKIPPED_NAME))]
    skipped = {problem.file for problem in problems if problem.kind == "image"}
    return any(
        is_readable(task, image)
        for task in (tasks if skipped else ())
        for _, image in sorter.images(task.sorted_file, task.first, task.last)
        if task.images.describe(image.file_name) in skipped
    )


# --- one shard ------------------------------------------------------------------------------------


def _pack_shards(
    tasks: Sequence[ShardTask], num_workers: int, progress: Progress
) -> tuple[list[ShardNote], int]:
    """The notes of all shards in their order, and how many an interrupted run had finished."""
    notes = {task.number: note for task in tasks if (note := _finished(task))}
    resumed = len(notes)
    progress(resumed, len(tasks))
    for note in _run([task for task in tasks if task.number not in notes], num_workers):
        notes[note.number] = note
        progress(len(notes), len(tasks))
    return [notes[task.number] for task in tasks], resumed


def _finished(task: ShardTask) -> ShardNote | None:
    """The note of an earlier run for this shard, if both of its files are whole.

    None if an image was left out: it may have been mended.
    """
    try:
        note = ShardNote.model_validate_json(task.out.read(task.note_name))
        whole = all(_is_whole(task.out, entry) for entry in (note.shard, note.index))
    except (FileNotFoundError, ValueError):
        return None  # a crash may cut a note short
    mendable = any(problem.kind == "image" for problem in note.problems)
    turned_otherwise = note.exif.undecided and note.exif.rule != task.exif and not task.by_size
    return note if whole and not mendable and not turned_otherwise else None


def _is_whole(out: Files, entry: FileEntry) -> bool:
    if out.size(entry.name) != entry.bytes:
        return False
    return out.local is None or file_sha256(out.local / entry.name) == entry.sha256


def _run(tasks: Sequence[ShardTask], num_workers: int) -> Iterator[ShardNote]:
    """Notes in the order of the shards: the first problem is the same at any number of workers."""
    # A process takes longer to start than a small dataset to pack.
    if num_workers <= 1 or len(tasks) <= 1:
        yield from map(pack_shard, tasks)
        return
    # "fork" is not safe beside the threads of pyarrow's file systems.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=context) as pool:
        try:
            yield from pool.map(pack_shard, tasks)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # else all shards are packed first
            raise


# --- the end --------------------------------------------------------------------------------------


def _finish(
    tasks: Sequence[ShardTask],
    contents: sorter.Contents,
    notes: Sequence[ShardNote],
    problems: Sequence[Problem],
    source: str,
) -> Manifest:
    """Joins the index, writes the report of skipped inputs, and last the manifest.

    Readers look for the manifest, so they never see a part of a dataset.
    """
    out = tasks[0].out
    num_rows = sum(note.shard.rows for note in notes)
    if num_rows == 0:
        raise ValueError(f"no image could be packed; the first: {notes[0].problems[0]}")
    with scratch_folder(f"{own_name('pack')}-") as temporary:
        path = temporary / INDEX_NAME
        with pa.ipc.new_file(str(path), schema.INDEX) as writer:
            for note in notes:
                piece = pa.ipc.open_file(pa.py_buffer(out.read(note.index.name)))
                writer.write_batch(piece.get_batch(0))
        index = file_entry(path, INDEX_NAME, num_rows)
        content = path.read_bytes()
    out.write(INDEX_NAME, content)
    skipped = [*problems, *(problem for note in notes for problem in note.problems)]
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
        categories=contents.category_fields,
        has_masks=any(note.masks for note in notes),
        has_keypoints=any(note.keypoints for note in notes),
        shards=tuple(note.shard for note in notes),
        index=index,
        num_skipped=len(skipped),
        source=source,
        info=contents.info,
        licenses=contents.licenses,
    )
    out.write(MANIFEST_NAME, manifest.dump())
    out.delete(PROGRESS_FOLDER)
    return manifest


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))

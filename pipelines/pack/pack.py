"""COCO JSON and image files to Arrow shards: parallel, atomic, resumable, each bad input named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from contract.data import SCHEMA_VERSION
from contract.files import Files
from contract.machine.folders import own_name
from pipelines.coco.checks import Problem
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
    is_readable,
    other_name,
    pack_shard,
    reporter,
)
from pipelines.pack.whole import (
    PROGRESS_FOLDER,
    Head,
    check_out,
    existing,
    finish,
    finished,
    known_problems,
    known_remarks,
    write_remarks,
)
from pipelines.progress import Progress, silent
from pipelines.shards.manifest import Manifest

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
    check_out(out)
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
        there = existing(out, source, options.num_workers)
        if there is not None and not _any_mended(out, tasks):
            out.delete(PROGRESS_FOLDER)  # a crash after the manifest may have left it
            known = known_remarks(out)
            return Packed(there, there.num_skipped, known, unchanged=True, resumed_shards=0)
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
        # Without any mask, no object lacks one.
        masks = any(note.masks for note in notes)
        found = tuple(remark for remark in remarks.all() if masks or remark.kind != "no_mask")
        skipped = [*problems, *(problem for note in notes for problem in note.problems)]
        if not any(note.shard.rows for note in notes):
            raise ValueError(f"no image could be packed; the first: {notes[0].problems[0]}")
        write_remarks(out, found)
        head = Head(contents.category_fields, contents.info, contents.licenses, source)
        manifest = finish(out, notes, skipped, head)
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


def _any_mended(out: Files, tasks: Sequence[ShardTask]) -> bool:
    """Whether an image that was left out could be packed now.

    The digest of the inputs cannot tell: a mended file may have the size that it had before.
    """
    skipped = {problem.file for problem in known_problems(out) if problem.kind == "image"}
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
    """The note of an earlier run for this shard, if it still says what a new run would.

    None if an image was left out: it may have been mended.
    """
    note = finished(task)
    if note is None:
        return None
    mendable = any(problem.kind == "image" for problem in note.problems)
    turned_otherwise = note.exif.undecided and note.exif.rule != task.exif and not task.by_size
    return note if not mendable and not turned_otherwise else None


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


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))

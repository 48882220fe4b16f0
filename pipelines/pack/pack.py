"""COCO JSON and image files to Arrow shards: parallel, atomic, resumable, each bad input named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from contract.data import MANIFEST_NAME, SCHEMA_VERSION
from contract.files import LASTING_ERRORS, Files, file_sha256
from pipelines.coco.checks import check_annotation, check_category
from pipelines.coco.decoding import TooLargeError, decode_pixels, stored_orientation
from pipelines.pack import annotation_sorter as spool
from pipelines.pack.scratch import scratch_folder
from pipelines.progress import Progress, silent
from pipelines.shards import schema
from pipelines.shards.manifest import INDEX_NAME, FileEntry, Manifest, parse_manifest
from pipelines.shards.mapping import view
from pipelines.shards.schema import Problem

PROGRESS_FOLDER = ".packing"
SKIPPED_NAME = "skipped.json"
OnError = Literal["fail", "skip"]


@dataclass(frozen=True)
class PackOptions:
    on_error: OnError = "fail"
    shard_mib: float = 64.0
    num_workers: int = 1


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    manifest: Manifest
    skipped: int
    unchanged: bool  # the same dataset was there already
    resumed_shards: int  # taken over from an interrupted run


@dataclass(frozen=True)
class _Task:
    """One shard: images first <= sequence number < last of the spool."""

    number: int
    first: int
    last: int
    spool: Path
    sources: tuple[str, ...]
    images: Files
    out: Files
    progress: str
    categories: tuple[dict[str, Any], ...]
    on_error: OnError

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.arrow"


def pack(
    annotation_files: Sequence[Path],
    images_uri: str,
    out_uri: str,
    options: PackOptions = PackOptions(),
    progress: Progress = silent,
) -> Packed:
    """Packs and returns the manifest. `progress(shards done, shards in all)` is called as it goes.

    Raises ValueError for the first bad input under "fail", or if `out_uri` holds another dataset.
    """
    images, out = Files(images_uri), Files(out_uri)
    if not images.exists():
        raise ValueError(
            f"{images.name}: no such folder; give --images the folder that the file names are relative to"
        )
    if out.local is not None and out.local.exists() and not out.local.is_dir():
        raise ValueError(f"{out.name}: is a file; give --out a folder")
    with scratch_folder("maskray-pack-") as folder:
        spooled = folder / "spool.sqlite"
        problems: list[Problem] = []
        contents = spool.fill(spooled, annotation_files, _collector(problems, options.on_error))
        if contents.num_images == 0:
            files = ", ".join(str(path) for path in annotation_files)
            raise ValueError(f"{files}: lists no image that can be packed; give files with images")
        ranges, listing = _plan(spooled, images, options.shard_mib)
        source = _digest(contents.digest, listing, options.on_error, options.shard_mib)
        folder_name = f"{PROGRESS_FOLDER}/{source[:16]}"
        tasks = [
            _Task(
                number=number,
                first=first,
                last=last,
                spool=spooled,
                sources=tuple(str(path) for path in annotation_files),
                images=images,
                out=out,
                progress=folder_name,
                categories=contents.categories,
                on_error=options.on_error,
            )
            for number, (first, last) in enumerate(ranges)
        ]
        if (existing := _existing(out, source, options.num_workers)) and not _any_mended(
            out, tasks
        ):
            out.delete(PROGRESS_FOLDER)
            return Packed(existing, existing.num_skipped, unchanged=True, resumed_shards=0)
        finished = {task.number: found for task in tasks if (found := _finished(task))}
        resumed = len(finished)
        progress(resumed, len(tasks))
        for result in _run(
            [task for task in tasks if task.number not in finished], options.num_workers
        ):
            finished[result["number"]] = result
            progress(len(finished), len(tasks))
        parts = [finished[task.number] for task in tasks]
        manifest = _finish(out, folder_name, contents, parts, problems, source)
    return Packed(manifest, manifest.num_skipped, unchanged=False, resumed_shards=resumed)


def _collector(problems: list[Problem], on_error: OnError) -> Callable[[Problem], None]:
    def report(problem: Problem) -> None:
        if on_error == "fail":
            raise ValueError(f'{problem}, or leave it out with "--on-error skip"')
        problems.append(problem)

    return report


def _plan(spooled: Path, images: Files, shard_mib: float) -> tuple[list[tuple[int, int]], str]:
    """Ranges of sequence numbers of about `shard_mib` of image files each, and a digest of all names and sizes."""
    digest = hashlib.sha256()
    ranges: list[tuple[int, int]] = []
    first, size, last = 0, 0, 0
    for chunk in _chunks(spool.images(spooled), 1024):
        found = images.sizes([record["file_name"] for _, record in chunk])
        for (seq, record), file_size in zip(chunk, found, strict=True):
            digest.update(f"{record['file_name']}\0{file_size}\0".encode())
            size, last = size + (file_size or 0), seq + 1
            if size >= shard_mib * 2**20:
                ranges.append((first, last))
                first, size = last, 0
    if first < last:
        ranges.append((first, last))
    return ranges, digest.hexdigest()


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, *parts]).encode()).hexdigest()


def _existing(out: Files, source: str, num_workers: int) -> Manifest | None:
    """The dataset of these inputs if it is there and whole: every hash on this machine, every size elsewhere."""
    if out.size(MANIFEST_NAME) is None:
        return None
    try:
        manifest = parse_manifest(out.read(MANIFEST_NAME), out.describe(MANIFEST_NAME))
    except RuntimeError:
        return None  # damaged: packing again is the remedy
    if manifest.source != source:
        raise ValueError(
            f"{out.name}: holds a dataset packed from other inputs or options; choose another --out or remove it first"
        )
    entries = (*manifest.shards, manifest.index)
    if out.sizes([entry.name for entry in entries]) != [entry.bytes for entry in entries]:
        return None
    if (local := out.local) is not None:
        with ThreadPoolExecutor(num_workers) as threads:
            if list(threads.map(lambda e: file_sha256(local / e.name), entries)) != [
                entry.sha256 for entry in entries
            ]:
                return None
    return manifest


def _any_mended(out: Files, tasks: Sequence[_Task]) -> bool:
    """Whether an image that was left out could be packed now. (A mended file may have the size it had before.)"""
    if out.size(SKIPPED_NAME) is None:
        return False
    skipped = {p["file"] for p in json.loads(out.read(SKIPPED_NAME)) if p["kind"] == "image"}
    return bool(skipped) and any(
        _image_row(task, record, lambda _: None) is not None
        for task in tasks
        for _, record in spool.images(task.spool, task.first, task.last)
        if task.images.describe(record["file_name"]) in skipped
    )


# --- one shard --------------------------------------------------------------------------------------------------------


def _finished(task: _Task) -> dict[str, Any] | None:
    """The result of an earlier run for this shard, if shard and index part are whole and no image was left out."""
    try:
        result: dict[str, Any] = json.loads(task.out.read(f"{task.progress}/{task.name}.json"))
        files = {task.name: result["entry"], f"{task.progress}/{task.name}.index": result["index"]}
        whole = all(_is_whole(task.out, name, entry) for name, entry in files.items())
        return (
            result if whole and not any(p["kind"] == "image" for p in result["problems"]) else None
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # a note that a crash cut short is none


def _is_whole(out: Files, name: str, entry: dict[str, Any]) -> bool:
    if out.size(name) != entry["bytes"]:
        return False
    return out.local is None or bool(file_sha256(out.local / name) == entry["sha256"])


def _run(tasks: list[_Task], num_workers: int) -> Iterator[dict[str, Any]]:
    """Results in the order of the shards, so that the first problem is the same at any number of workers."""
    if num_workers <= 1 or len(tasks) <= 1:
        yield from map(pack_shard, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=context) as pool:
        try:
            yield from pool.map(pack_shard, tasks)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def pack_shard(task: _Task) -> dict[str, Any]:
    """Writes one shard and the note that it is finished. Raises ValueError for bad input under "fail"."""
    problems: list[Problem] = []
    local = task.out.local
    if local is not None:
        (local / task.progress).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=None if local is None else local / task.progress
    ) as folder:
        part = Path(folder) / task.name
        index = _write_rows(part, _rows(task, _collector(problems, task.on_error)), task)
        entry = {**_sum(part), "name": task.name, "rows": index.num_rows}
        index_part = Path(folder) / "index"
        with pa.ipc.new_file(str(index_part), schema.INDEX) as writer:
            writer.write_batch(index)
        index_sum = _sum(index_part)
        task.out.move_in(part, task.name)
        task.out.move_in(index_part, f"{task.progress}/{task.name}.index")
    flags = view(index["ann_flags"].flatten())
    result = {
        "number": task.number,
        "entry": entry,
        "index": index_sum,
        "annotations": len(flags),
        "masks": bool((flags & schema.HAS_MASK).any()),
        "keypoints": bool((flags & schema.HAS_KEYPOINTS).any()),
        "problems": [asdict(problem) for problem in problems],
    }
    task.out.write(f"{task.progress}/{task.name}.json", json.dumps(result).encode())
    return result


def _write_rows(path: Path, rows: Iterator[dict[str, Any]], task: _Task) -> pa.RecordBatch:
    """Writes a shard batch by batch; returns its part of the index."""
    labels = {category["id"]: label for label, category in enumerate(task.categories)}
    index = []
    with pa.ipc.new_file(str(path), schema.SHARD) as writer:
        for chunk in _chunks(rows, schema.ROWS_PER_BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema.SHARD))
            index += [schema.index_row(row, labels) for row in chunk]
    return pa.RecordBatch.from_pylist(index, schema=schema.INDEX)


def _rows(task: _Task, report: Callable[[Problem], None]) -> Iterator[dict[str, Any]]:
    connection = sqlite3.connect(f"file:{task.spool}?mode=ro", uri=True)
    points = {category["id"]: len(category.get("keypoints", ())) for category in task.categories}
    try:
        for _, record in spool.images(task.spool, task.first, task.last):
            row = _image_row(task, record, report)
            if row is None:
                continue
            for source, annotation in spool.annotations_of(connection, record["id"]):
                finding = check_category(annotation["category_id"], points) or check_annotation(
                    annotation, row["width"], row["height"], points[annotation["category_id"]]
                )
                if finding:
                    report(Problem(task.sources[source], "annotation", annotation["id"], *finding))
                else:
                    row["annotations"].append(schema.annotation_row(annotation))
            yield row
    finally:
        connection.close()


def _image_row(
    task: _Task, record: dict[str, Any], report: Callable[[Problem], None]
) -> dict[str, Any] | None:
    """The row of a readable image of the right size, without annotations; None after a report."""
    where, width, height = (
        task.images.describe(record["file_name"]),
        record["width"],
        record["height"],
    )
    try:
        content = task.images.read(record["file_name"])
    except LASTING_ERRORS as error:
        what = f"is no file that can be read ({type(error).__name__})"
        what = "there is no such file" if isinstance(error, FileNotFoundError) else what
        report(Problem(where, "image", record["id"], what, "restore it or check --images"))
        return None
    try:
        orientation, size = stored_orientation(content, width, height)
        if size == (width, height):
            decode_pixels(content)
    except TooLargeError as error:
        report(Problem(where, "image", record["id"], f"has {error}", "scale it down"))
        return None
    except (OSError, RuntimeError) as error:
        what = f"cannot be read ({str(error).splitlines()[0].rsplit(': ', 1)[-1]})"
        report(
            Problem(where, "image", record["id"], what, "replace the file by a whole JPEG or PNG")
        )
        return None
    if size != (width, height):
        what = f"the file is {size[0]} x {size[1]}, the JSON says {width} x {height}"
        report(
            Problem(
                where, "image", record["id"], what, "mend width and height in the JSON, or the file"
            )
        )
        return None
    return {
        "image_id": record["id"],
        "file_name": record["file_name"],
        "width": width,
        "height": height,
        "orientation": orientation,
        "extra": schema.image_extra(record),
        "image": content,
        "annotations": [],
    }


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(
    out: Files,
    folder: str,
    contents: spool.Contents,
    parts: list[dict[str, Any]],
    problems: list[Problem],
    source: str,
) -> Manifest:
    """Joins the index, writes the report of skips, and last the manifest: only then is the dataset there."""
    rows = sum(part["entry"]["rows"] for part in parts)
    if not rows:
        first = Problem(**parts[0]["problems"][0])
        raise ValueError(f"no image could be packed; the first: {first}")
    with scratch_folder("maskray-pack-") as temporary:
        path = temporary / INDEX_NAME
        with pa.ipc.new_file(str(path), schema.INDEX) as writer:
            for part in parts:
                piece = pa.ipc.open_file(
                    pa.py_buffer(out.read(f"{folder}/{part['entry']['name']}.index"))
                )
                writer.write_batch(piece.get_batch(0))
        rows = sum(part["entry"]["rows"] for part in parts)
        index = FileEntry(name=INDEX_NAME, rows=rows, **_sum(path))
        content = path.read_bytes()
    out.write(INDEX_NAME, content)
    skipped = [asdict(problem) for problem in problems] + [
        p for part in parts for p in part["problems"]
    ]
    if skipped:
        out.write(SKIPPED_NAME, json.dumps(skipped, indent=1).encode())
    else:
        out.delete(SKIPPED_NAME)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        num_images=rows,
        num_annotations=sum(part["annotations"] for part in parts),
        num_shards=len(parts),
        categories=contents.categories,
        has_masks=any(part["masks"] for part in parts),
        has_keypoints=any(part["keypoints"] for part in parts),
        shards=tuple(FileEntry(**part["entry"]) for part in parts),
        index=index,
        num_skipped=len(skipped),
        source=source,
        info=contents.info,
        licenses=contents.licenses,
    )
    out.write(MANIFEST_NAME, manifest.dump())
    out.delete(PROGRESS_FOLDER)
    return manifest


def _sum(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def default_workers() -> int:
    return len(os.sched_getaffinity(0))

"""One shard: image files and their annotations to Arrow rows, each bad input named."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from contract.files import LASTING_ERRORS, Files, file_sha256
from contract.words import shortened
from pipelines.coco.checks import (
    Problem,
    UnusableError,
    is_bare_polygon,
    is_path_below,
    read_annotation,
)
from pipelines.coco.decoding import Exif, Stored, TooLargeError, decode_with_remark, read_header
from pipelines.coco.records import CocoCategory, CocoImage
from pipelines.coco.remarks import Remark, Remarks
from pipelines.pack import annotation_sorter as sorter
from pipelines.pack.agreement import BoxForm, compare
from pipelines.pack.annotation_sorter import Report
from pipelines.shards import schema
from pipelines.shards.manifest import FileEntry
from pipelines.shards.mapping import view

OnError = Literal["fail", "skip"]
T = TypeVar("T")


@dataclass(frozen=True)
class ShardPlace:
    """Where one shard of a dataset in the making lies, its part of the index, and its note.

    progress: the folder of notes and parts, below `out`.
    """

    number: int
    out: Files
    progress: str

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}.arrow"

    @property
    def note_name(self) -> str:
        return f"{self.progress}/{self.name}.json"

    @property
    def index_name(self) -> str:
        return f"{self.progress}/{self.name}.index"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder to write in. It lies beside the shard: a rename is atomic within one file
        system only.
        """
        beside = self.out.local and self.out.local / self.progress
        if beside is not None:
            beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            yield Path(folder)

    def keep(self, shard_part: Path, index: pa.RecordBatch, **said: Any) -> ShardNote:
        """Moves a written shard and its part of the index to their places, then notes that both are
        there. said: fields of the note that the index does not tell.
        """
        index_part = shard_part.with_name("index")
        with pa.ipc.new_file(str(index_part), schema.INDEX) as writer:
            writer.write_batch(index)
        shard_entry = file_entry(shard_part, self.name, index.num_rows)
        index_entry = file_entry(index_part, self.index_name, index.num_rows)
        self.out.move_in(shard_part, self.name)
        self.out.move_in(index_part, self.index_name)
        flags = view(index["ann_flags"].flatten())
        note = ShardNote(
            number=self.number,
            shard=shard_entry,
            index=index_entry,
            annotations=len(flags),
            crowds=int((flags & schema.CROWD).sum()),
            labels=frozenset(view(index["ann_label"].flatten()).tolist()),
            masks=bool((flags & schema.HAS_MASK).any()),
            keypoints=bool((flags & schema.HAS_KEYPOINTS).any()),
            **said,
        )
        # The note comes last: where there is one, both files are in their place.
        self.out.write(self.note_name, note.model_dump_json().encode())
        return note


@dataclass(frozen=True)
class ShardTask(ShardPlace):
    """One shard: the images of the sorted file with first <= sequence number < last."""

    first: int
    last: int
    sorted_file: Path
    sources: tuple[str, ...]
    images: Files
    categories: tuple[CocoCategory, ...]
    on_error: OnError
    exif: Exif  # the rule for images whose size does not tell
    by_size: bool  # the size of an image decides where it tells


class ExifCount(BaseModel):
    """Images with an EXIF orientation, by what their size in the JSON says of it.

    undecided: turned or not, they have that size; `rule` is what was done with them.
    """

    model_config = ConfigDict(frozen=True)

    apply: int = 0
    ignore: int = 0
    undecided: int = 0
    rule: Exif = "apply"


class ShardNote(BaseModel):
    """What is known of a finished shard; kept in a file until the whole dataset is finished."""

    model_config = ConfigDict(frozen=True)

    number: int
    shard: FileEntry
    index: FileEntry  # the shard's part of the index
    annotations: int
    crowds: int = 0
    labels: frozenset[int] = frozenset()  # that some annotation has
    masks: bool
    keypoints: bool
    problems: tuple[Problem, ...] = ()
    remarks: tuple[Remark, ...] = ()
    boxes: BoxForm = BoxForm()
    exif: ExifCount = ExifCount()
    last_annotation: int = -1  # the greatest id, where another dataset follows


def reporter(problems: list[Problem], on_error: OnError) -> Report:
    """Collects problems under "skip", and raises the first of them under "fail"."""

    def report(problem: Problem) -> None:
        if on_error == "fail":
            raise ValueError(f'{problem}, or leave it out with "--on-error skip"')
        problems.append(problem)

    return report


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def is_readable(task: ShardTask, image: CocoImage) -> bool:
    try:
        _read_image_file(task, image, _Seen())
    except UnusableError:
        return False
    return True


@dataclass
class _Seen:
    """What a shard's files turned out to be while its rows were made."""

    remarks: Remarks = field(default_factory=Remarks)
    boxes: BoxForm = field(default_factory=BoxForm)
    exif: Counter[str] = field(default_factory=Counter)


def pack_shard(task: ShardTask) -> ShardNote:
    """Writes one shard, then the note that it is finished.

    Raises ValueError for bad input under "fail".
    """
    problems: list[Problem] = []
    seen = _Seen()
    with task.scratch() as folder:
        part = folder / task.name
        index = _write_rows(part, _rows(task, reporter(problems, task.on_error), seen), task)
        return task.keep(
            part,
            index,
            problems=tuple(problems),
            remarks=seen.remarks.all(),
            boxes=seen.boxes,
            exif=ExifCount(**seen.exif, rule=task.exif),
        )


def file_entry(path: Path, name: str, num_rows: int) -> FileEntry:
    return FileEntry(name=name, sha256=file_sha256(path), bytes=path.stat().st_size, rows=num_rows)


def _write_rows(path: Path, rows: Iterator[schema.ShardRow], task: ShardTask) -> pa.RecordBatch:
    """Writes a shard batch by batch; returns its part of the index."""
    labels = {category.id: label for label, category in enumerate(task.categories)}
    index = []
    with pa.ipc.new_file(str(path), schema.SHARD) as writer:
        for chunk in chunks(rows, schema.ROWS_PER_BATCH):
            # A chunk at a time: memory holds 64 images, whatever the size of the shard.
            values = [row.shard_value() for row in chunk]
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema=schema.SHARD))
            index += [row.index_value(labels) for row in chunk]
    return pa.RecordBatch.from_pylist(index, schema=schema.INDEX)


def _rows(task: ShardTask, report: Report, seen: _Seen) -> Iterator[schema.ShardRow]:
    keypoint_counts = {category.id: len(category.keypoints) for category in task.categories}
    with closing(sorter.open_sorted(task.sorted_file)) as connection:
        for _, image in sorter.images(task.sorted_file, task.first, task.last):
            try:
                row = _read_image_file(task, image, seen)
            except UnusableError as error:
                file = task.images.describe(image.file_name)
                going = len(sorter.annotations_of(connection, image.id))
                report(Problem(file, "image", image.id, error.what, error.remedy, going))
                continue
            for source, key, fields in sorter.annotations_of(connection, image.id):
                try:
                    annotation = read_annotation(fields, image, keypoint_counts)
                    if is_bare_polygon(fields.get("segmentation")):
                        seen.remarks.add("bare_polygon", f"annotation {key}")
                    compare(annotation, image, seen.boxes, seen.remarks)
                    row.annotations.append(annotation)
                except UnusableError as error:
                    file = task.sources[source]
                    report(Problem(file, "annotation", key, error.what, error.remedy))
            yield row


def _read_image_file(task: ShardTask, image: CocoImage, seen: _Seen) -> schema.ShardRow:
    """The row of an image, without annotations. Raises UnusableError for a file that cannot train.

    Every image is decoded once here, so that no training run meets a damaged one.
    """
    try:
        content = _content(task.images, image, seen.remarks)
    except LASTING_ERRORS as error:
        what = f"is no file that can be read ({type(error).__name__})"
        raise UnusableError(what, "restore it or check --images") from None
    try:
        stored = read_header(content)
        orientation = _orientation(task, stored, image, seen)
        size = stored.turned if orientation > 1 else stored.bare
        odd = None
        if size == (image.width, image.height):
            odd = decode_with_remark(content)[1]
    except TooLargeError as error:
        raise UnusableError(f"has {error}", "scale it down") from None
    except (OSError, RuntimeError) as error:
        # Decoders write paths and addresses before their reason.
        reason = str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise UnusableError(
            f"cannot be read ({reason})", "replace the file by a whole JPEG or PNG"
        ) from None
    if size != (image.width, image.height):
        raise UnusableError(
            f"the file is {size[0]} x {size[1]}, the JSON says {image.width} x {image.height}",
            "mend width and height in the JSON, or the file",
        )
    if odd is not None:
        seen.remarks.add(odd, f"image {image.id}: {shortened(image.file_name)}")
    return schema.ShardRow(image, orientation, content, [])


def _orientation(task: ShardTask, stored: Stored, image: CocoImage, seen: _Seen) -> int:
    """The EXIF orientation to apply, 1 for none: one rule for all images of the dataset."""
    if stored.orientation == 1:
        return 1
    meant = stored.meant((image.width, image.height))
    seen.exif[meant or "undecided"] += 1
    rule = meant if meant is not None and task.by_size else task.exif
    seen.remarks.add("exif_applied" if rule == "apply" else "exif_ignored", f"image {image.id}")
    return stored.orientation if rule == "apply" else 1


def _content(images: Files, image: CocoImage, remarks: Remarks) -> bytes:
    """The bytes of an image file, also where the JSON writes its name as a URL or as Windows does.

    Raises UnusableError if there is none.
    """
    try:
        return images.read(image.file_name)
    except FileNotFoundError:
        other = other_name(images, image.file_name)
        if other is None:
            raise UnusableError("there is no such file", "restore it or check --images") from None
        remarks.add("renamed_file", f"{shortened(image.file_name)} is {shortened(other)}")
        return images.read(other)


def other_name(images: Files, name: str) -> str | None:
    """The one file that a name means which no file has; None if there is none, or several."""
    others = {name.replace("\\", "/"), unquote(name), unquote(name.replace("\\", "/"))}
    there = [n for n in others - {name} if is_path_below(n) and images.exists(n)]
    return there[0] if len(there) == 1 else None

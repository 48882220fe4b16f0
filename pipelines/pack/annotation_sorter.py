"""A temporary SQLite file sorts annotations by image.

COCO's files list them in any order. Packing needs them by image, and must not hold them in memory.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import cast

from contract.files import file_sha256
from contract.words import shortened
from pipelines.coco.checks import (
    WHOLE_OF_ANNOTATION,
    WHOLE_OF_IMAGE,
    Problem,
    UnusableError,
    id_of,
    oddly_written,
    read_annotation_keys,
    read_category,
    read_image,
    whole,
)
from pipelines.coco.reading import read_coco
from pipelines.coco.records import CocoCategory, CocoImage, JsonObject, JsonValue
from pipelines.coco.remarks import Remarks

# Records are kept as the text that they had in their file: it is read again beside its image, and
# SQLite needs no column for a field that no one asks for.
_TABLES = """
CREATE TABLE images (id INTEGER PRIMARY KEY, seq INTEGER UNIQUE, source INTEGER, text TEXT);
CREATE TABLE file_names (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE repeats (id INTEGER, source INTEGER, PRIMARY KEY (id, source));
CREATE TABLE annotations (
    id INTEGER PRIMARY KEY, seq INTEGER, image_id INTEGER, source INTEGER, text TEXT
);
CREATE TABLE additions (id INTEGER, source INTEGER, text TEXT, PRIMARY KEY (id, source));
"""
_ANY_LAST = 1 << 62
# What a later file says of keypoints wins. Of all other fields the first file's value stays.
_REPLACED_FIELDS = ("keypoints", "num_keypoints")
_SAME_IMAGE_FIELDS = ("file_name", "width", "height")
_SAME_ANNOTATION_FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd")
Report = Callable[[Problem], None]


@dataclass(frozen=True)
class Contents:
    """What the annotation files say of the whole dataset.

    categories: as records by id, their position is the dense label. category_fields: the same in
    JSON, with all that the files say of them; this is what the manifest keeps.
    """

    categories: tuple[CocoCategory, ...]
    category_fields: tuple[JsonObject, ...]
    info: JsonObject
    licenses: tuple[JsonObject, ...]
    num_images: int
    digest: str  # SHA-256 of the annotation files' bytes


# Relative. Files of one dataset differ by less where a program wrote a number anew.
_SAME_NUMBER = 1e-6


def fill(
    path: Path,
    sources: Sequence[Path],
    report: Report,
    remarks: Remarks,
    folders: Collection[str] = (),
) -> Contents:
    """Reads COCO files into the SQLite file `path`.

    Records that are wrong in themselves go to `report` and are left out. A later file may repeat
    images and annotations of an earlier one and add fields to them (keypoints to instances). What
    is odd and read all the same is counted in `remarks`. folders: absolute names of --images.
    """
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        # A crash loses the file anyway, so nothing is gained by a journal or by syncing.
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        reader = _Reader(connection, report, remarks, folders)
        for number, source in enumerate(sources):
            reader.read(source, number)
        # One sort at the end, instead of an index that every insert keeps in order.
        connection.execute("CREATE INDEX by_image ON annotations (image_id, seq)")
        connection.commit()
        _report_orphans(connection, sources, report)
        connection.commit()
        num_images = connection.execute("SELECT count(*) FROM images").fetchone()[0]
    fields = tuple(reader.categories[key] for key in sorted(reader.categories))
    _check_kept("info", reader.info, sources)
    _check_kept("licenses", reader.licenses, sources)
    _check_kept("categories", fields, sources)
    digest = hashlib.sha256("".join(file_sha256(source) for source in sources).encode()).hexdigest()
    return Contents(
        categories=tuple(read_category(category) for category in fields),
        category_fields=fields,
        info=reader.info,
        licenses=tuple(reader.licenses),
        num_images=num_images,
        digest=digest,
    )


def _check_kept(name: str, value: JsonValue, sources: Sequence[Path]) -> None:
    """What the manifest keeps as it is must be sound JSON: no NaN, no half of a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        files = ", ".join(str(source) for source in sources)
        raise ValueError(
            f"{files}: {name} holds what JSON cannot keep ({error}); mend or remove it"
        ) from None


def open_sorted(path: Path) -> sqlite3.Connection:
    """A connection to a filled file; any number of processes may read it."""
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def images(path: Path, first: int = 0, last: int = _ANY_LAST) -> Iterator[tuple[int, CocoImage]]:
    """(sequence number, image) for first <= number < last, in the order of the files."""
    with closing(open_sorted(path)) as connection:
        for seq, text in connection.execute(
            "SELECT seq, text FROM images WHERE seq >= ? AND seq < ? ORDER BY seq", (first, last)
        ):
            yield seq, read_image(json.loads(text))


def annotations_of(
    connection: sqlite3.Connection, image_id: int
) -> list[tuple[int, int, JsonObject]]:
    """(number of the source file, id, merged JSON) of one image's annotations, in file order."""
    rows = connection.execute(
        "SELECT source, text, id FROM annotations WHERE image_id = ? ORDER BY seq", (image_id,)
    ).fetchall()
    return [(source, key, _merged(connection, key, json.loads(text))) for source, text, key in rows]


def _merged(connection: sqlite3.Connection, key: int, fields: JsonObject) -> JsonObject:
    """An annotation with what later files add to it."""
    for (text,) in connection.execute(
        "SELECT text FROM additions WHERE id = ? ORDER BY source", (key,)
    ):
        fields |= {
            name: value
            for name, value in json.loads(text).items()
            if name not in fields or name in _REPLACED_FIELDS
        }
    return fields


class _Reader:
    """Reads files one after the other into one SQLite file."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        report: Report,
        remarks: Remarks,
        folders: Collection[str],
    ):
        self.connection, self.report, self.remarks = connection, report, remarks
        self.folders = folders
        self.categories: dict[int, JsonObject] = {}
        self.info: JsonObject = {}
        self.licenses: list[JsonObject] = []
        self.sequence = 0

    def read(self, path: Path, source: int) -> None:
        seen: set[int] = set()  # categories of this file
        for key, value, text in read_coco(path):
            match key:
                case "images":
                    self._image(path, source, value, text)
                case "annotations":
                    self._annotation(path, source, value, text)
                case "categories":
                    self._category(path, value, seen)
                case "licenses" if isinstance(value, list):
                    self.licenses += [
                        entry
                        for entry in value
                        if isinstance(entry, dict) and entry not in self.licenses
                    ]
                # The first file's `info` stays; other keys of COCO files mean nothing to us.
                case "info" if isinstance(value, dict) and not self.info:
                    self.info = value

    def _image(self, path: Path, source: int, raw: JsonValue, text: str) -> None:
        try:
            image = read_image(raw, self.folders)
        except UnusableError as error:
            self.report(Problem(str(path), "image", id_of(raw), error.what, error.remedy))
            return
        for kind in oddly_written(raw, WHOLE_OF_IMAGE):
            self.remarks.add(kind, f"image {image.id}")
        other = self._insert("images", image.id, (image.id, self.sequence, source, text))
        self.sequence += 1
        if other is None:
            if not self._is_new("file_names", (image.file_name,)):
                self.remarks.add("same_file", f"image {image.id}: {shortened(image.file_name)}")
            return
        other_source, other_text = other
        # A file may repeat an image of another file, but once only.
        if other_source == source or not self._is_new("repeats", (image.id, source)):
            remedy = "give each image an id of its own"
            self.report(Problem(str(path), "image", image.id, "its id is there twice", remedy))
            return
        first = read_image(json.loads(other_text))
        for name in _SAME_IMAGE_FIELDS:
            one, two = getattr(first, name), getattr(image, name)
            if one != two:
                raise ValueError(
                    f"{path}: image {image.id}: its {name} is {one!r} in another file and {two!r} "
                    "here; merge only files of the same images"
                )

    def _annotation(self, path: Path, source: int, raw: JsonValue, text: str) -> None:
        try:
            keys = read_annotation_keys(raw)
        except UnusableError as error:
            self.report(Problem(str(path), "annotation", id_of(raw), error.what, error.remedy))
            return
        for kind in oddly_written(raw, WHOLE_OF_ANNOTATION):
            self.remarks.add(kind, f"annotation {keys.id}")
        row = (keys.id, self.sequence, keys.image_id, source, text)
        other = self._insert("annotations", keys.id, row)
        self.sequence += 1
        if other is None:
            if keys.id == 0:
                self.remarks.add("id_zero")
            return
        other_source, other_text = other
        if other_source == source or not self._is_new("additions", (keys.id, source, text)):
            remedy = "give each annotation an id of its own"
            self.report(Problem(str(path), "annotation", keys.id, "its id is there twice", remedy))
            return
        first: JsonObject = json.loads(other_text)
        assert isinstance(raw, dict)
        for name in _SAME_ANNOTATION_FIELDS:
            if name not in first or name not in raw or whole(first[name]) == whole(raw[name]):
                continue
            if _are_close(first[name], raw[name]):
                shown = f"{shortened(first[name])} and {shortened(raw[name])}"
                self.remarks.add("rounded", f"annotation {keys.id}: {name} {shown}")
            else:
                raise ValueError(
                    f"{path}: annotation {keys.id}: its {name} is {shortened(first[name])} in "
                    f"another file and {shortened(raw[name])} here; merge only files of the "
                    "same annotations"
                )

    def _category(self, path: Path, raw: JsonValue, seen: set[int]) -> None:
        try:
            category = read_category(raw)
        except UnusableError as error:
            raise ValueError(f"{path}: category {id_of(raw)}: {error}") from None
        assert isinstance(raw, dict)
        known = self.categories.setdefault(category.id, {})
        if known and read_category(known).name != category.name:
            raise ValueError(
                f"{path}: category {category.id} is both {read_category(known).name!r} and "
                f"{category.name!r}; give each category an id of its own"
            )
        for kind in oddly_written(raw, ("id",)):
            self.remarks.add(kind, f"category {category.id}")
        known.update(raw | {"id": category.id})
        if category.id in seen:
            raise ValueError(
                f"{path}: category {category.id}: its id is there twice; keep one of them"
            )
        seen.add(category.id)

    def _insert(self, table: str, key: int, row: tuple[int | str, ...]) -> tuple[int, str] | None:
        """Inserts a row. If there is one with its id, returns (source, text) of that row."""
        if self._is_new(table, row):
            return None
        source, text = self.connection.execute(
            f"SELECT source, text FROM {table} WHERE id = ?",
            (key,),
        ).fetchone()
        return source, text

    def _is_new(self, table: str, row: tuple[int | str, ...]) -> bool:
        """Inserts a row unless there is one with its key."""
        marks = ", ".join("?" * len(row))
        return bool(
            self.connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row).rowcount
        )


def _are_close(one: JsonValue, two: JsonValue) -> bool:
    """Whether two numbers, or two lists of numbers, differ in their last digits at most."""
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_are_close, one, two))
    both = (one, two)
    return all(type(value) in (int, float) for value in both) and isclose(
        *cast(tuple[float, float], both), rel_tol=_SAME_NUMBER
    )


def _report_orphans(
    connection: sqlite3.Connection, sources: Sequence[Path], report: Report
) -> None:
    """Reports and removes annotations of images that no file lists."""
    query = "FROM annotations WHERE image_id NOT IN (SELECT id FROM images)"
    for key, image_id, source in connection.execute(
        f"SELECT id, image_id, source {query} ORDER BY seq"
    ):
        what = f"image_id {image_id} is not among the images"
        remedy = "add the image or drop the annotation"
        report(Problem(str(sources[source]), "annotation", key, what, remedy))
    connection.execute(f"DELETE {query}")

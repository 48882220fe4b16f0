"""A temporary SQLite file that sorts annotations by image, so that packing needs no memory for the dataset."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract.files import file_sha256
from pipelines.coco.checks import (
    check_annotation_ids,
    check_category_record,
    check_image,
    shortened,
)
from pipelines.coco.reading import read_coco
from pipelines.shards.schema import Problem

_TABLES = """
CREATE TABLE images (id INTEGER PRIMARY KEY, seq INTEGER UNIQUE, source INTEGER, text TEXT);
CREATE TABLE repeats (id INTEGER, source INTEGER, PRIMARY KEY (id, source));
CREATE TABLE annotations (id INTEGER PRIMARY KEY, seq INTEGER, image_id INTEGER, source INTEGER, text TEXT);
CREATE TABLE additions (id INTEGER, source INTEGER, text TEXT, PRIMARY KEY (id, source));
"""
_MERGED_FIELDS = ("keypoints", "num_keypoints", "segmentation")
Report = Callable[[Problem], None]


@dataclass(frozen=True)
class Contents:
    """What the annotation files say of the whole dataset."""

    categories: tuple[dict[str, Any], ...]  # by id; the position is the dense label
    info: dict[str, Any]
    licenses: tuple[dict[str, Any], ...]
    num_images: int
    digest: str  # SHA-256 of the annotation files' bytes


def fill(path: Path, sources: Sequence[Path], report: Report) -> Contents:
    """Reads COCO files into the spool. Records that are wrong in themselves go to `report` and are left out.

    A later file may repeat images and annotations of an earlier one and add fields to them (keypoints to instances).
    """
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    try:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        reader = _Reader(connection, report)
        for number, source in enumerate(sources):
            reader.read(source, number)
        connection.execute("CREATE INDEX by_image ON annotations (image_id, seq)")
        connection.commit()
        _report_orphans(connection, sources, report)
        connection.commit()
        count = connection.execute("SELECT count(*) FROM images").fetchone()[0]
    finally:
        connection.close()
    categories = tuple(reader.categories[key] for key in sorted(reader.categories))
    for name, value in (
        ("info", reader.info),
        ("licenses", reader.licenses),
        ("categories", categories),
    ):
        _check_kept(name, value, sources)
    digest = hashlib.sha256("".join(file_sha256(source) for source in sources).encode()).hexdigest()
    return Contents(categories, reader.info, tuple(reader.licenses), count, digest)


def _check_kept(name: str, value: Any, sources: Sequence[Path]) -> None:
    """What goes into the manifest as it is must be sound JSON: no NaN, no half of a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        files = ", ".join(str(source) for source in sources)
        raise ValueError(
            f"{files}: {name} holds what JSON cannot keep ({error}); mend or remove it"
        ) from None


def images(path: Path, first: int = 0, last: int = 1 << 62) -> Iterator[tuple[int, dict[str, Any]]]:
    """(sequence number, image record) for first <= number < last, in the order of the files."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        for seq, text in connection.execute(
            "SELECT seq, text FROM images WHERE seq >= ? AND seq < ? ORDER BY seq", (first, last)
        ):
            yield seq, json.loads(text)
    finally:
        connection.close()


def annotations_of(
    connection: sqlite3.Connection, image_id: int
) -> list[tuple[int, dict[str, Any]]]:
    """(number of the source file, merged annotation) of one image, in the order of the files."""
    rows = connection.execute(
        "SELECT source, text, id FROM annotations WHERE image_id = ? ORDER BY seq", (image_id,)
    ).fetchall()
    found = []
    for source, text, key in rows:
        record = json.loads(text)
        for (more,) in connection.execute(
            "SELECT text FROM additions WHERE id = ? ORDER BY source", (key,)
        ):
            added = json.loads(more)
            record |= {
                name: added[name]
                for name in added
                if name not in record or name in _MERGED_FIELDS[:2]
            }
        found.append((source, record))
    return found


class _Reader:
    def __init__(self, connection: sqlite3.Connection, report: Report):
        self.connection, self.report = connection, report
        self.categories: dict[int, dict[str, Any]] = {}
        self.info: dict[str, Any] = {}
        self.licenses: list[dict[str, Any]] = []
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
                    self._category(path, value)
                    if value["id"] in seen:
                        raise ValueError(
                            f"{path}: category {value['id']}: its id is there twice; keep one of them"
                        )
                    seen.add(value["id"])
                case "licenses" if isinstance(value, list):
                    self.licenses += [
                        entry
                        for entry in value
                        if isinstance(entry, dict) and entry not in self.licenses
                    ]
                case "info" if isinstance(value, dict) and not self.info:
                    self.info = value

    def _image(self, path: Path, source: int, record: Any, text: str) -> None:
        if finding := check_image(record):
            self.report(Problem(str(path), "image", _id_of(record), *finding))
            return
        other = self._insert("images", record["id"], (record["id"], self.sequence, source, text))
        self.sequence += 1
        if other is None:
            return
        first = json.loads(other[1])
        new = other[0] != source and self._is_new("repeats", (record["id"], source))
        if not new:
            finding = ("its id is there twice", "give each image an id of its own")
            self.report(Problem(str(path), "image", record["id"], *finding))
            return
        for name in ("file_name", "width", "height"):
            if first[name] != record[name]:
                what = f"its {name} is {first[name]!r} in another file and {record[name]!r} here"
                raise ValueError(
                    f"{path}: image {record['id']}: {what}; merge only files of the same images"
                )

    def _annotation(self, path: Path, source: int, record: Any, text: str) -> None:
        if finding := check_annotation_ids(record):
            self.report(Problem(str(path), "annotation", _id_of(record), *finding))
            return
        row = (record["id"], self.sequence, record["image_id"], source, text)
        other = self._insert("annotations", record["id"], row)
        self.sequence += 1
        if other is None:
            return
        first = json.loads(other[1])
        if other[0] == source or not self._is_new("additions", (record["id"], source, text)):
            finding = ("its id is there twice", "give each annotation an id of its own")
            self.report(Problem(str(path), "annotation", record["id"], *finding))
            return
        for name in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            if name in first and name in record and first[name] != record[name]:
                what = f"its {name} is {shortened(first[name])} in another file and {shortened(record[name])} here"
                raise ValueError(
                    f"{path}: annotation {record['id']}: {what}; merge only files of the same annotations"
                )

    def _category(self, path: Path, record: Any) -> None:
        if finding := check_category_record(record):
            raise ValueError(f"{path}: category {_id_of(record)}: {finding[0]}; {finding[1]}")
        known = self.categories.setdefault(record["id"], {})
        if known and known["name"] != record["name"]:
            raise ValueError(
                f"{path}: category {record['id']} is both {known['name']!r} and {record['name']!r}; "
                "give each category an id of its own"
            )
        known.update(record)

    def _insert(self, table: str, key: int, row: tuple[Any, ...]) -> tuple[int, str] | None:
        """Inserts a new row; of a known id returns (source, text) of the row that has it."""
        if self._is_new(table, row):
            return None
        found: tuple[int, str] = self.connection.execute(
            f"SELECT source, text FROM {table} WHERE id = ?",
            (key,),
        ).fetchone()
        return found

    def _is_new(self, table: str, row: tuple[Any, ...]) -> bool:
        """Inserts a row unless one of its key is there."""
        marks = ", ".join("?" * len(row))
        return bool(
            self.connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row).rowcount
        )


def _report_orphans(
    connection: sqlite3.Connection, sources: Sequence[Path], report: Report
) -> None:
    """Annotations of images that no file lists."""
    query = "FROM annotations WHERE image_id NOT IN (SELECT id FROM images)"
    for key, image_id, source in connection.execute(
        f"SELECT id, image_id, source {query} ORDER BY seq"
    ):
        what = f"image_id {image_id} is not among the images"
        report(
            Problem(
                str(sources[source]),
                "annotation",
                key,
                what,
                "add the image or drop the annotation",
            )
        )
    connection.execute(f"DELETE {query}")


def _id_of(record: Any) -> Any:
    return record.get("id", "without id") if isinstance(record, dict) else repr(record)[:40]

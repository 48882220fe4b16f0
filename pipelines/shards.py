"""Reads rows of a memory-mapped shard without copies: all record batches are opened once, then sliced.

(`get_batch` on every access re-advises the whole batch: 400 times slower.)
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Annotations:
    """The annotations of one image as views into the shard; A of them, in the order of the file.

    boxes_xywh: (A, 4), pixels of the image file. keypoints: one flat array (x, y, v, ...) each, maybe empty.
    polygons: arrays of (x, y, ...) for each annotation, empty unless its kind is POLYGONS.
    """

    category_ids: NDArray[np.int64]
    boxes_xywh: Floats
    areas: Floats
    crowd: NDArray[np.int8]
    kinds: NDArray[np.int8]
    polygons: list[list[Floats]]
    keypoints: list[Floats]
    first: int  # position in the batch, to find the RLE of one annotation
    batch: _Columns

    def rle(self, number: int) -> dict[str, Any]:
        """COCO RLE, compressed or not, of an annotation of such a kind."""
        return self.batch.rle(self.first + number)


@dataclass(frozen=True)
class Row:
    image_id: int
    width: int
    height: int
    orientation: int
    content: memoryview  # the image file; valid while the shard is open
    annotations: Annotations


class _Columns:
    """NumPy views of one record batch."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        self.image_id = batch["image_id"].to_numpy()
        self.width = batch["width"].to_numpy()
        self.height = batch["height"].to_numpy()
        self.orientation = batch["orientation"].to_numpy()
        image = batch["image"]
        self._image_offsets = np.frombuffer(image.buffers()[1], np.int64)
        self._image_data = memoryview(image.buffers()[2]).cast("B")
        lists = batch["annotations"]
        self.offsets = lists.offsets.to_numpy()
        self._annotations = lists.values

    def content(self, row: int) -> memoryview:
        return self._image_data[self._image_offsets[row] : self._image_offsets[row + 1]]

    def _field(self, name: str) -> Any:
        return self._annotations.field(name)

    @cached_property
    def fields(self) -> tuple[Any, ...]:
        names = ("category_id", "bbox", "area", "iscrowd", "kind")
        category, boxes, area, crowd, kind = (self._field(name) for name in names)
        return (
            category.to_numpy(),
            boxes.values.to_numpy().reshape(-1, 4),
            area.to_numpy(),
            crowd.to_numpy(),
            kind.to_numpy(),
        )

    @cached_property
    def polygons(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
        outer = self._field("polygons")
        return outer.offsets.to_numpy(), outer.values.offsets.to_numpy(), outer.values.values.to_numpy()

    @cached_property
    def keypoints(self) -> tuple[NDArray[np.int32], Floats]:
        lists = self._field("keypoints")
        return lists.offsets.to_numpy(), lists.values.to_numpy()

    def annotations(self, row: int) -> Annotations:
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        category, boxes, area, crowd, kind = (column[first:last] for column in self.fields)
        outer, inner, points = self.polygons
        starts, values = self.keypoints
        polygons = [
            [points[inner[p] : inner[p + 1]] for p in range(outer[a], outer[a + 1])] for a in range(first, last)
        ]
        keypoints = [values[starts[a] : starts[a + 1]] for a in range(first, last)]
        return Annotations(category, boxes, area, crowd, kind, polygons, keypoints, first, self)

    def rle(self, position: int) -> dict[str, Any]:
        size = self._field("rle_size")[position].as_py()
        if self._field("kind")[position].as_py() == schema.RLE_TEXT:
            return {"size": size, "counts": self._field("rle_text")[position].as_py()}
        return {"size": size, "counts": self._field("rle_counts")[position].as_py()}


class Shard:
    """One open shard file."""

    def __init__(self, path: Path):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [_Columns(reader.get_batch(number)) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0] + [columns.batch.num_rows for columns in self._batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> Row:
        columns, at = self._locate(number)
        return Row(
            image_id=int(columns.image_id[at]),
            width=int(columns.width[at]),
            height=int(columns.height[at]),
            orientation=int(columns.orientation[at]),
            content=columns.content(at),
            annotations=columns.annotations(at),
        )

    def content(self, number: int) -> memoryview:
        """The bytes of one image file; valid while the shard is open."""
        columns, at = self._locate(number)
        return columns.content(at)

    def record(self, number: int) -> dict[str, Any]:
        """A plain dictionary of SHARD without the image."""
        columns, at = self._locate(number)
        names = [name for name in schema.SHARD.names if name != "image"]
        found: dict[str, Any] = columns.batch.select(names).slice(at, 1).to_pylist()[0]
        return found

    def _locate(self, number: int) -> tuple[_Columns, int]:
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._batches[place], number - int(self._starts[place])

    def records(self) -> Iterator[dict[str, Any]]:
        """Plain dictionaries of SHARD without the images; for export, not for speed."""
        names = [name for name in schema.SHARD.names if name != "image"]
        for columns in self._batches:
            yield from columns.batch.select(names).to_pylist()


def damaged_rows(path: Path, crc32: NDArray[np.uint32]) -> list[int | None]:
    """Rows whose image bytes have another CRC-32 than the index says, as far as the shard can still be opened."""
    try:
        opened = Shard(path)
        return [row for row in range(len(crc32)) if zlib.crc32(opened.content(row)) != crc32[row]]
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, IndexError, ValueError, KeyError):
        return []

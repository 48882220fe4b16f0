"""Reads rows of a memory-mapped shard without copies.

All record batches are opened once, then sliced: `get_batch` on every access advises the kernel of
the whole batch again and is 400 times slower.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.coco.records import LabelledImage, Rle
from pipelines.shards import schema
from pipelines.shards.mapping import MappedFile, view

Floats = NDArray[np.float64]
# Export does not look at image bytes, which are nearly all of a shard.
_ALL_BUT_THE_BYTES = [name for name in schema.SHARD.names if name != "image"]


@dataclass(frozen=True)
class Annotations:
    """The annotations of one image as views into the shard; A of them, in the order of the file.

    boxes_xywh: (A, 4), pixels of the image file. kinds: (A,), what `schema` calls `kind`.
    """

    boxes_xywh: Floats
    kinds: NDArray[np.int8]
    first: int  # position in the batch of the first of them
    batch: _Columns

    def polygons(self, number: int) -> tuple[Floats, list[int]]:
        """All points (P, 2) of one annotation's polygons, and the borders between its polygons."""
        outer, inner, values = self.batch.polygons
        ends = inner[outer[self.first + number] : outer[self.first + number + 1] + 1]
        return values[ends[0] : ends[-1]].reshape(-1, 2), ((ends - ends[0]) // 2).tolist()

    def rle(self, number: int) -> Rle:
        """The mask of an annotation of one of the two RLE kinds."""
        return self.batch.rle(self.first + number)

    def keypoints(self, number: int) -> Floats:
        """x, y, v, ... in one array, maybe empty."""
        starts, values = self.batch.keypoints
        return values[starts[self.first + number] : starts[self.first + number + 1]]


@dataclass(frozen=True)
class Row:
    """One image. Its annotations and its bytes are views into the shard."""

    image_id: int
    width: int
    height: int
    orientation: int
    content: memoryview  # the image file; valid while the shard is open
    annotations: Annotations


class _Columns:
    """NumPy views of one record batch. Those of annotations are made when they are first read."""

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        self.image_id = view(batch["image_id"])
        self.width = view(batch["width"])
        self.height = view(batch["height"])
        self.orientation = view(batch["orientation"])
        image = batch["image"]
        # pyarrow would make an object of each value; the buffers give the bytes without one.
        self._image_offsets = np.frombuffer(image.buffers()[1], np.int64)
        self._image_data = memoryview(image.buffers()[2]).cast("B")
        lists = batch["annotations"]
        self.offsets = view(lists.offsets)
        self._annotations = lists.values

    def content(self, row: int) -> memoryview:
        return self._image_data[self._image_offsets[row] : self._image_offsets[row + 1]]

    def _field(self, name: str) -> pa.Array:
        return self._annotations.field(name)

    @cached_property
    def boxes(self) -> Floats:
        return view(self._field("bbox").values).reshape(-1, 4)

    @cached_property
    def kinds(self) -> NDArray[np.int8]:
        return view(self._field("kind"))

    @cached_property
    def polygons(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
        outer = self._field("polygons")
        return view(outer.offsets), view(outer.values.offsets), view(outer.values.values)

    @cached_property
    def keypoints(self) -> tuple[NDArray[np.int32], Floats]:
        lists = self._field("keypoints")
        return view(lists.offsets), view(lists.values)

    def annotations(self, row: int) -> Annotations:
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        return Annotations(self.boxes[first:last], self.kinds[first:last], first, self)

    def rle(self, position: int) -> Rle:
        height, width = self._field("rle_size")[position].as_py()
        if self.kinds[position] == schema.RLE_TEXT:
            return Rle(height, width, self._field("rle_text")[position].as_py().decode())
        return Rle(height, width, self._field("rle_counts")[position].as_py())


class Shard:
    """One open shard file."""

    def __init__(self, path: Path):
        self._file = MappedFile(path)
        self._batches = [_Columns(batch) for batch in self._file.batches]
        self._starts = np.cumsum([0] + [columns.batch.num_rows for columns in self._batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def let_go(self) -> None:
        """Gives the pages of what was read back to the page cache."""
        self._file.let_go()

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

    def labelled_image(self, number: int) -> LabelledImage:
        """One image with its annotations as COCO has them; for pictures, not for speed."""
        columns, at = self._locate(number)
        [value] = columns.batch.select(_ALL_BUT_THE_BYTES).slice(at, 1).to_pylist()
        return schema.labelled_image(value)

    def _locate(self, number: int) -> tuple[_Columns, int]:
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._batches[place], number - int(self._starts[place])

    def labelled_images(self) -> Iterator[LabelledImage]:
        """All images with their annotations as COCO has them; for export, not for speed."""
        for columns in self._batches:
            for value in columns.batch.select(_ALL_BUT_THE_BYTES).to_pylist():
                yield schema.labelled_image(value)


def damaged_rows(path: Path, crc32: NDArray[np.uint32]) -> list[int | None]:
    """Rows whose image bytes have another CRC-32 than the index says.

    The list is empty if the shard cannot be opened any more.
    """
    try:
        opened = Shard(path)
        return [row for row in range(len(crc32)) if zlib.crc32(opened.content(row)) != crc32[row]]
    except (pa.ArrowException, RuntimeError, OSError, IndexError, ValueError, KeyError):
        return []

"""The Arrow schema of shards and index, and how an image with its annotations becomes a row.

Shards are uncompressed Arrow IPC files: zstd saves 0.6% on JPEG and costs reading without copies.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.coco.records import (
    CocoAnnotation,
    CocoImage,
    JsonObject,
    LabelledImage,
    Polygons,
    Rle,
)

ROWS_PER_BATCH = 64

# Values of the column `kind`. They are in the shards on disk: add to them, but never renumber them.
NO_SEGMENTATION, POLYGONS, RLE_TEXT, RLE_COUNTS = range(4)
CROWD, HAS_BOX, HAS_MASK, HAS_KEYPOINTS = 1, 2, 4, 8  # bits of the index's `ann_flags`, on disk too

ANNOTATION = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        ("bbox", pa.list_(pa.float64(), 4)),  # x, y, width, height in pixels, as in COCO
        ("area", pa.float64()),
        ("iscrowd", pa.int8()),
        ("kind", pa.int8()),
        ("polygons", pa.list_(pa.list_(pa.float64()))),  # of POLYGONS
        ("rle_text", pa.large_binary()),  # of RLE_TEXT: pycocotools' compressed counts
        ("rle_counts", pa.list_(pa.uint32())),  # of RLE_COUNTS
        ("rle_size", pa.list_(pa.int32(), 2)),  # height, width of both RLE kinds
        ("keypoints", pa.list_(pa.float64())),  # x, y, visibility, ...
        ("num_keypoints", pa.int32()),  # -1 where the annotation does not say
        ("extra", pa.string()),  # JSON of the fields that the columns above do not hold
    ]
)

SHARD = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),  # after `orientation`
        ("height", pa.int32()),
        (
            "orientation",
            pa.int8(),
        ),  # the EXIF orientation to apply, 1 leaves the pixels as they are
        ("extra", pa.string()),  # JSON of the image record's other fields
        ("image", pa.large_binary()),  # the file's bytes
        ("annotations", pa.large_list(ANNOTATION)),
    ],
    metadata={"maskray": "1"},
)

INDEX = pa.schema(
    [
        ("image_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.uint32()),  # of the image bytes, to name a damaged row
        ("ann_label", pa.list_(pa.int16())),  # dense label: position in the manifest's categories
        ("ann_area", pa.list_(pa.float64())),
        ("ann_flags", pa.list_(pa.uint8())),
    ],
    metadata={"maskray": "1"},
)


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One row of a shard before it is written. content: the image file's bytes."""

    image: CocoImage
    orientation: int
    content: bytes
    annotations: list[CocoAnnotation]

    def shard_value(self) -> dict[str, Any]:
        """A value of SHARD, for pyarrow."""
        return {
            "image_id": self.image.id,
            "file_name": self.image.file_name,
            "width": self.image.width,
            "height": self.image.height,
            "orientation": self.orientation,
            "extra": _json(self.image.extra),
            "image": self.content,
            "annotations": [_annotation_value(annotation) for annotation in self.annotations],
        }

    def index_value(self, labels: Mapping[int, int]) -> dict[str, Any]:
        """A value of INDEX, for pyarrow: what order and filter need without opening the shard.

        labels: category id -> dense label.
        """
        image = self.image
        return {
            "image_id": image.id,
            "width": image.width,
            "height": image.height,
            "crc32": zlib.crc32(self.content),
            "ann_label": [labels[annotation.category_id] for annotation in self.annotations],
            "ann_area": [annotation.area for annotation in self.annotations],
            "ann_flags": [_flags(a, image.width, image.height) for a in self.annotations],
        }


def _annotation_value(annotation: CocoAnnotation) -> dict[str, Any]:
    """A value of ANNOTATION. Columns that a kind of mask does not use hold empty values, not nulls:

    readers take the columns as NumPy views, which have no nulls.
    """
    mask, extra = annotation.segmentation, annotation.extra
    if mask == []:
        # No column tells an empty list from an absent one, and export gives both back.
        extra = extra | {"segmentation": []}
    rle = mask if isinstance(mask, Rle) else Rle(0, 0, "")
    points = annotation.num_keypoints
    return {
        "id": annotation.id,
        "category_id": annotation.category_id,
        "bbox": annotation.bbox,
        "area": annotation.area,
        "iscrowd": annotation.iscrowd,
        "kind": _kind(annotation),
        "polygons": mask if isinstance(mask, list) else [],
        "rle_text": rle.counts.encode() if isinstance(rle.counts, str) else b"",
        "rle_counts": rle.counts if isinstance(rle.counts, list) else [],
        "rle_size": [rle.height, rle.width],
        "keypoints": annotation.keypoints,
        "num_keypoints": -1 if points is None else points,
        "extra": _json(extra),
    }


def _kind(annotation: CocoAnnotation) -> int:
    match annotation.segmentation:
        case Rle(counts=str()):
            return RLE_TEXT
        case Rle():
            return RLE_COUNTS
        case list() as polygons if polygons:
            return POLYGONS
        case _:
            return NO_SEGMENTATION


def _json(fields: JsonObject) -> str:
    return json.dumps(fields) if fields else ""


def _fields(text: str) -> JsonObject:
    return json.loads(text) if text else {}


def labelled_image(row: dict[str, Any]) -> LabelledImage:
    """The image and the annotations of a value of SHARD: the inverse of `shard_value`."""
    image = CocoImage(
        row["image_id"], row["file_name"], row["width"], row["height"], _fields(row["extra"])
    )
    return LabelledImage(image, [_annotation(value, image.id) for value in row["annotations"]])


_SAME_IN_BOTH = ("id", "category_id", "bbox", "area", "iscrowd", "keypoints")


def _annotation(value: dict[str, Any], image_id: int) -> CocoAnnotation:
    extra = _fields(value["extra"])
    empty = extra.pop("segmentation", None)
    segmentation: Polygons | Rle | None = [] if empty == [] else None
    kind = value["kind"]
    if kind == POLYGONS:
        segmentation = value["polygons"]
    elif kind != NO_SEGMENTATION:
        text = kind == RLE_TEXT
        counts = value["rle_text"].decode() if text else value["rle_counts"]
        height, width = value["rle_size"]
        segmentation = Rle(height, width, counts)
    num_keypoints = value["num_keypoints"]
    return CocoAnnotation(
        **{name: value[name] for name in _SAME_IN_BOTH},
        image_id=image_id,
        segmentation=segmentation,
        num_keypoints=None if num_keypoints < 0 else num_keypoints,
        extra=extra,
    )


def _flags(annotation: CocoAnnotation, width: int, height: int) -> int:
    x, y, w, h = annotation.bbox
    inside_w, inside_h = min(x + w, width) - max(x, 0.0), min(y + h, height) - max(y, 0.0)
    return int(
        CROWD * bool(annotation.iscrowd)
        | HAS_BOX * (inside_w > 0 and inside_h > 0)
        | HAS_MASK * (_kind(annotation) != NO_SEGMENTATION)
        | HAS_KEYPOINTS * any(v > 0 for v in annotation.keypoints[2::3])
    )

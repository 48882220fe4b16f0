"""The Arrow schema of shards and index, and how one image with its annotations becomes a row.

Shards are uncompressed Arrow IPC files: zstd saves 0.6% on JPEG and costs reading without copies.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pycocotools import mask as rle_tools

ROWS_PER_BATCH = 64

NO_SEGMENTATION, POLYGONS, RLE_TEXT, RLE_COUNTS = range(4)  # values of `kind`
CROWD, HAS_BOX, HAS_MASK, HAS_KEYPOINTS = 1, 2, 4, 8  # bits of the index's `ann_flags`

ANNOTATION = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        (
            "bbox",
            pa.list_(pa.float64(), 4),
        ),  # x, y, width, height in pixels of the image, as in COCO
        ("area", pa.float64()),
        ("iscrowd", pa.int8()),
        ("kind", pa.int8()),
        ("polygons", pa.list_(pa.list_(pa.float64()))),  # of POLYGONS
        ("rle_text", pa.large_binary()),  # of RLE_TEXT: pycocotools' compressed counts
        ("rle_counts", pa.list_(pa.uint32())),  # of RLE_COUNTS
        ("rle_size", pa.list_(pa.int32(), 2)),  # height, width of both RLE kinds
        ("keypoints", pa.list_(pa.float64())),  # x, y, visibility, ...
        ("num_keypoints", pa.int32()),  # -1 where the annotation does not say
        ("extra", pa.string()),  # JSON of the fields above do not hold
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

_KNOWN = {
    "id",
    "image_id",
    "category_id",
    "bbox",
    "area",
    "iscrowd",
    "segmentation",
    "keypoints",
    "num_keypoints",
}
_IMAGE_KNOWN = {"id", "file_name", "width", "height"}


@dataclass(frozen=True)
class Problem:
    """Something a person must mend in the input, or allow to be skipped."""

    file: str
    kind: Literal["image", "annotation"]
    id: Any
    what: str
    remedy: str

    def __str__(self) -> str:
        what = self.what if len(self.what) < 300 else f"{self.what[:300]}..."
        return f"{self.file}: {self.kind} {str(self.id)[:80]}: {what}; {self.remedy}"


def annotation_row(record: dict[str, Any]) -> dict[str, Any]:
    """A checked COCO annotation as a value of ANNOTATION."""
    segmentation = record.get("segmentation")
    row: dict[str, Any] = {
        "id": record["id"],
        "category_id": record["category_id"],
        "bbox": [float(v) for v in record["bbox"]],
        "area": float(record["area"]),
        "iscrowd": int(record.get("iscrowd", 0)),
        "kind": NO_SEGMENTATION,
        "polygons": [],
        "rle_text": b"",
        "rle_counts": [],
        "rle_size": [0, 0],
        "keypoints": [float(v) for v in record.get("keypoints") or ()],
        "num_keypoints": record.get("num_keypoints", -1),
    }
    extra = {key: value for key, value in record.items() if key not in _KNOWN}
    if isinstance(segmentation, dict):
        text = isinstance(segmentation["counts"], str)
        row["kind"] = RLE_TEXT if text else RLE_COUNTS
        row["rle_text" if text else "rle_counts"] = (
            segmentation["counts"].encode() if text else segmentation["counts"]
        )
        row["rle_size"] = segmentation["size"]
    elif segmentation:
        row["kind"] = POLYGONS
        row["polygons"] = [list(map(float, polygon)) for polygon in segmentation]
    elif segmentation is not None:
        extra["segmentation"] = segmentation  # an empty list, given back as it was
    row["extra"] = json.dumps(extra) if extra else ""
    return row


def annotation_record(row: dict[str, Any], image_id: int) -> dict[str, Any]:
    """The COCO annotation of a value of ANNOTATION: the inverse of `annotation_row`."""
    record: dict[str, Any] = {
        "id": row["id"],
        "image_id": image_id,
        "category_id": row["category_id"],
    }
    match row["kind"]:
        case 1:
            record["segmentation"] = row["polygons"]
        case 2:
            record["segmentation"] = {"size": row["rle_size"], "counts": row["rle_text"].decode()}
        case 3:
            record["segmentation"] = {"size": row["rle_size"], "counts": row["rle_counts"]}
    record |= {"area": row["area"], "bbox": row["bbox"], "iscrowd": row["iscrowd"]}
    if row["keypoints"]:
        record["keypoints"] = row["keypoints"]
    if row["num_keypoints"] >= 0:
        record["num_keypoints"] = row["num_keypoints"]
    return record | (json.loads(row["extra"]) if row["extra"] else {})


def image_extra(record: dict[str, Any]) -> str:
    extra = {key: value for key, value in record.items() if key not in _IMAGE_KNOWN}
    return json.dumps(extra) if extra else ""


def image_record(row: dict[str, Any]) -> dict[str, Any]:
    """The COCO image record of a shard's row."""
    record = {
        "id": row["image_id"],
        "file_name": row["file_name"],
        "width": row["width"],
        "height": row["height"],
    }
    return record | (json.loads(row["extra"]) if row["extra"] else {})


def index_row(row: dict[str, Any], labels: dict[int, int]) -> dict[str, Any]:
    """What order and filter need to know of a shard's row, without opening the shard."""
    annotations = row["annotations"]
    return {
        "image_id": row["image_id"],
        "width": row["width"],
        "height": row["height"],
        "crc32": zlib.crc32(row["image"]),
        "ann_label": [labels[a["category_id"]] for a in annotations],
        "ann_area": [a["area"] for a in annotations],
        "ann_flags": [_flags(a, row["width"], row["height"]) for a in annotations],
    }


def _flags(annotation: dict[str, Any], width: int, height: int) -> int:
    x, y, w, h = annotation["bbox"]
    inside_w, inside_h = min(x + w, width) - max(x, 0.0), min(y + h, height) - max(y, 0.0)
    return int(
        CROWD * bool(annotation["iscrowd"])
        | HAS_BOX * (inside_w > 0 and inside_h > 0)
        | HAS_MASK * (annotation["kind"] != NO_SEGMENTATION)
        | HAS_KEYPOINTS * any(v > 0 for v in annotation["keypoints"][2::3])
    )


def coco_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """pycocotools' compressed RLE of any COCO segmentation."""
    if isinstance(segmentation, list):
        merged: dict[str, Any] = rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
        return merged
    if isinstance(segmentation["counts"], list):
        compressed: dict[str, Any] = rle_tools.frPyObjects(segmentation, *segmentation["size"])
        return compressed
    return dict(segmentation)

"""What makes a COCO record unusable: each finding is a sentence and its remedy."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pycocotools import mask as rle_tools

from pipelines.schema import coco_rle

Finding = tuple[str, str]  # what is wrong, what to do


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_image(record: Any) -> Finding | None:
    """The fields of an image record that packing needs."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return "has no integer id", "give every image a whole number as id"
    if not isinstance(record.get("file_name"), str) or not record["file_name"]:
        return "has no file_name", "name the image's file relative to --images"
    for side in ("width", "height"):
        if not _is_int(record.get(side)) or record[side] <= 0:
            return f"{side} is {record.get(side)!r}", "write the size of the image file in pixels"
    return None


def check_annotation_ids(record: Any) -> Finding | None:
    """The fields that place an annotation; the rest is checked beside its image."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return "has no integer id", "give every annotation a whole number from 1 as id"
    if record["id"] < 1:
        return f"id {record['id']} is below 1", "number annotations from 1: pycocotools takes id 0 for 'unmatched'"
    for name in ("image_id", "category_id"):
        if not _is_int(record.get(name)):
            return f"{name} is {record.get(name)!r}", f"give it the whole number of its {name.removesuffix('_id')}"
    return None


def check_annotation(record: dict[str, Any], width: int, height: int, keypoints: int) -> Finding | None:
    """Box, area, segmentation and keypoints of an annotation of a (width, height) image.

    keypoints: how many keypoint types its category has. A box of zero width or height is COCO's own (train2017 has
    one); it is kept for evaluation and never trains. So is one that reaches over the edge; training clips it.
    """
    return (
        _check_box(record.get("bbox"), width, height)
        or _check_area(record)
        or _check_segmentation(record.get("segmentation"), width, height)
        or _check_keypoints(record, keypoints)
    )


def check_category(category_id: int, known: Collection[int]) -> Finding | None:
    if category_id in known:
        return None
    return f"category_id {category_id} is not among the categories", "add the category or drop the annotation"


def _check_box(box: Any, width: int, height: int) -> Finding | None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"bbox is {box!r}", "write it as [x, y, width, height]"
    if not all(math.isfinite(v) for v in box):
        return f"bbox {box} is not finite", "compute it anew from the segmentation or drop the annotation"
    x, y, w, h = box
    if w < 0 or h < 0:
        return f"bbox {box} is inverted (negative side)", "write it as [x, y, width, height], not as two corners"
    if x >= width or y >= height or x + w < 0 or x + w <= 0 < w or y + h < 0 or y + h <= 0 < h:
        return f"bbox {box} lies off its {width} x {height} image", "mend the box or drop the annotation"
    return None


def _check_area(record: dict[str, Any]) -> Finding | None:
    area: Any = record.get("area")
    if not _is_number(area) or not math.isfinite(area) or area < 0:
        return f"area is {area!r}", "write the object's area in pixels; evaluation sorts objects by it"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {record['iscrowd']!r}", "write 0 or 1"
    return None


def _check_segmentation(segmentation: Any, width: int, height: int) -> Finding | None:
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        return _check_polygons(segmentation)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        return "segmentation is neither polygons nor an RLE", "write [[x, y, ...], ...] or {'size', 'counts'}"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        return f"RLE size {size} is not the image's [{height}, {width}]", "encode the mask at the image's size"
    if not counts:
        return "RLE is empty", "drop the annotation or encode its mask"
    if isinstance(counts, list) and (not all(_is_int(v) and v >= 0 for v in counts) or sum(counts) != width * height):
        return f"RLE counts do not add up to {width * height} pixels", "encode the mask anew"
    try:
        area = int(rle_tools.area(coco_rle(segmentation, height, width)))
    except (ValueError, TypeError, UnicodeError):
        return "RLE counts cannot be read", "encode the mask anew with pycocotools"
    if area == 0:
        return "RLE is empty (no pixel set)", "drop the annotation or encode its mask"
    if area > width * height:
        return f"RLE covers {area} pixels of {width * height}", "encode the mask anew with pycocotools"
    return None


def _check_polygons(polygons: list[Any]) -> Finding | None:
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(_is_number(v) for v in polygon):
            return "polygon is not a list of numbers", "write each polygon as [x, y, x, y, ...]"
        if len(polygon) < 6:
            return f"polygon has {len(polygon) // 2} points, fewer than 3", "give it 3 or more points or drop it"
        if len(polygon) % 2:
            return f"polygon has {len(polygon)} numbers, an odd count", "write each polygon as [x, y, x, y, ...]"
        if not all(math.isfinite(v) for v in polygon):
            return "polygon has a coordinate that is not finite", "mend or drop the polygon"
    return None


def _check_keypoints(record: dict[str, Any], keypoints: int) -> Finding | None:
    values = record.get("keypoints")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 3 * keypoints:
        count = len(values) if isinstance(values, list) else values
        return f"keypoints has {count!r} numbers, its category has {keypoints} points", "write x, y, v for each point"
    if not all(_is_number(v) and math.isfinite(v) for v in values):
        return "a keypoint is not finite", "mend it or set its visibility to 0"
    if any(v not in (0, 1, 2) for v in values[2::3]):
        return "a keypoint's visibility is not 0, 1 or 2", "write 0 unlabelled, 1 hidden, 2 visible"
    return None

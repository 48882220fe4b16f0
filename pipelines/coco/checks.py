"""What makes a COCO record unusable: each finding is a sentence and its remedy."""

from __future__ import annotations

from collections.abc import Collection
from math import isnan
from pathlib import Path
from typing import Any

Finding = tuple[str, str]  # what is wrong, what to do


_LARGEST = 1e15  # pixels and areas; far beyond any image, and exact in doubles
_FAR = 10.0  # image sides that a polygon may reach beyond the edge


def _is_int(value: Any, bits: int = 64) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int, float}


def _are_finite(values: Collection[Any]) -> bool:
    """Of numbers. Integers may be too large for a float, so they are compared first; a NaN shows in the sum."""
    return not values or (
        min(values) >= -_LARGEST and max(values) <= _LARGEST and not isnan(sum(values))
    )


def shortened(value: Any) -> str:
    """A value as a message shows it: told apart, but no longer than a line can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_file_to_write(out: Path) -> None:
    """Raises ValueError if `--out` names a folder or something below a file."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; give --out a file to write")
    blocked = [folder for folder in out.parents if folder.exists() and not folder.is_dir()]
    if blocked:
        raise ValueError(f"{out}: {blocked[0]} is a file; give --out a path below folders")


def _unencodable(text: str) -> bool:
    """Half of a surrogate pair, which JSON can write and no file name can hold."""
    return any(0xD800 <= ord(character) < 0xE000 for character in text)


def _is_path_below(name: str) -> bool:
    if name.startswith("/") or "\0" in name or _unencodable(name):
        return False
    return all(part != ".." and len(part.encode()) < 256 for part in name.split("/"))


def check_image(record: Any) -> Finding | None:
    """The fields of an image record that packing needs."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return "has no integer id of 64 bits", "give every image a whole number as id"
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        return "has no file_name", "name the image's file relative to --images"
    if not _is_path_below(name):
        return (
            f"file_name {shortened(name)} is no path below --images",
            "name the image's file relative to --images",
        )
    for side in ("width", "height"):
        if not _is_int(record.get(side), 32) or record[side] <= 0:
            return (
                f"{side} is {shortened(record.get(side))}",
                "write the size of the image file in pixels",
            )
    return None


def check_annotation_ids(record: Any) -> Finding | None:
    """The fields that place an annotation; the rest is checked beside its image."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return "has no integer id of 64 bits", "give every annotation a whole number from 1 as id"
    if record["id"] < 1:
        return (
            f"id {record['id']} is below 1",
            "number annotations from 1: pycocotools takes id 0 for 'unmatched'",
        )
    for name in ("image_id", "category_id"):
        if not _is_int(record.get(name)):
            return (
                f"{name} is {shortened(record.get(name))}",
                f"give it the whole number of its {name.removesuffix('_id')}",
            )
    return None


def check_category_record(record: Any) -> Finding | None:
    """The fields of a category that packing and evaluation need."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return "has no integer id of 64 bits", "mend the list of categories"
    if not isinstance(record.get("name"), str) or _unencodable(record["name"]):
        return f"name is {shortened(record.get('name'))}", "write its name as text"
    points = record.get("keypoints", [])
    if not isinstance(points, list) or not all(isinstance(name, str) for name in points):
        return (
            f"keypoints is {shortened(points)}",
            "write the names of its keypoints, or leave them out",
        )
    return None


def check_annotation(
    record: dict[str, Any], width: int, height: int, keypoints: int
) -> Finding | None:
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
    return (
        f"category_id {category_id} is not among the categories",
        "add the category or drop the annotation",
    )


def _check_box(box: Any, width: int, height: int) -> Finding | None:
    if not _are_numbers(box) or len(box) != 4:
        return f"bbox is {shortened(box)}", "write it as [x, y, width, height]"
    if not _are_finite(box):
        return (
            f"bbox {shortened(box)} is not finite",
            "compute it anew from the segmentation or drop the annotation",
        )
    x, y, w, h = box
    if w < 0 or h < 0:
        return (
            f"bbox {box} is inverted (negative side)",
            "write it as [x, y, width, height], not as two corners",
        )
    if x >= width or y >= height or x + w < 0 or x + w <= 0 < w or y + h < 0 or y + h <= 0 < h:
        return (
            f"bbox {box} lies off its {width} x {height} image",
            "mend the box or drop the annotation",
        )
    return None


def _check_area(record: dict[str, Any]) -> Finding | None:
    area: Any = record.get("area")
    if not _are_numbers([area]) or not _are_finite([area]) or area < 0:
        return (
            f"area is {shortened(area)}",
            "write the object's area in pixels; evaluation sorts objects by it",
        )
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {shortened(record['iscrowd'])}", "write 0 or 1"
    return None


def _check_segmentation(segmentation: Any, width: int, height: int) -> Finding | None:
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        return _check_polygons(segmentation, width, height)
    if (
        not isinstance(segmentation, dict)
        or "counts" not in segmentation
        or "size" not in segmentation
    ):
        return (
            "segmentation is neither polygons nor an RLE",
            "write [[x, y, ...], ...] or {'size', 'counts'}",
        )
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width] or not all(_is_int(side) for side in size):
        return (
            f"RLE size {shortened(size)} is not the image's [{height}, {width}]",
            "encode the mask at the image's size",
        )
    if not counts:
        return "RLE is empty", "drop the annotation or encode its mask"
    runs = (
        counts
        if isinstance(counts, list)
        else rle_runs(counts)
        if isinstance(counts, str)
        else None
    )
    if runs is None:
        return "RLE counts cannot be read", "encode the mask anew with pycocotools"
    if not all(_is_int(v) and v >= 0 for v in runs) or sum(runs) != width * height:
        return (
            f"RLE counts do not add up to {width * height} pixels",
            "encode the mask anew with pycocotools",
        )
    if not any(runs[1::2]):
        return "RLE is empty (no pixel set)", "drop the annotation or encode its mask"
    return None


def rle_runs(text: str) -> list[int] | None:
    """The run lengths in pycocotools' compressed counts (maskApi.c, rleFrString), None if it is none.

    Six bits a character, from 48: five of the number, lowest first, and one that says it goes on; from the fourth run
    on they are differences to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


def _check_polygons(polygons: list[Any], width: int, height: int) -> Finding | None:
    for polygon in polygons:
        if not _are_numbers(polygon):
            return "polygon is not a list of numbers", "write each polygon as [x, y, x, y, ...]"
        if len(polygon) < 6:
            return (
                f"polygon has {len(polygon) // 2} points, fewer than 3",
                "give it 3 or more points or drop it",
            )
        if len(polygon) % 2:
            return (
                f"polygon has {len(polygon)} numbers, an odd count",
                "write each polygon as [x, y, x, y, ...]",
            )
        if finding := check_reach(polygon, width, height):
            return finding
        xs, ys = polygon[::2], polygon[1::2]
        if max(xs) < 0 or max(ys) < 0 or min(xs) > width or min(ys) > height:
            return f"polygon lies off its {width} x {height} image", "mend or drop the polygon"
    return None


def check_reach(polygon: list[Any], width: int, height: int) -> Finding | None:
    """A polygon of 3 or more points as numbers: pycocotools takes memory by its length, whatever the image's size."""
    if not _are_finite(polygon):
        return "polygon has a coordinate that is not finite", "mend or drop the polygon"
    xs, ys = polygon[::2], polygon[1::2]
    reach = max(max(-min(xs), max(xs) - width) / width, max(-min(ys), max(ys) - height) / height)
    if reach > _FAR:
        return (
            f"polygon reaches {reach:.0f} image sides beyond the edge",
            "mend or drop the polygon",
        )
    return None


def _check_keypoints(record: dict[str, Any], keypoints: int) -> Finding | None:
    if not _is_int(record.get("num_keypoints", 0), 32) or record.get("num_keypoints", 0) < 0:
        return (
            f"num_keypoints is {shortened(record['num_keypoints'])}",
            "write how many keypoints are labelled",
        )
    values = record.get("keypoints")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 3 * keypoints:
        count = len(values) if isinstance(values, list) else values
        return (
            f"keypoints has {shortened(count)} numbers, its category has {keypoints} points",
            "write x, y, v for each point",
        )
    if not _are_numbers(values) or not _are_finite(values):
        return "a keypoint is not finite", "mend it or set its visibility to 0"
    if any(v not in (0, 1, 2) for v in values[2::3]):
        return "a keypoint's visibility is not 0, 1 or 2", "write 0 unlabelled, 1 hidden, 2 visible"
    return None

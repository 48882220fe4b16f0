"""What makes ground truth or results unfit for evaluation; each refusal is one line with the place and the value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import Any

from pycocotools import mask as rle_tools

from pipelines.coco.checks import check_category_record, check_reach, shortened
from pipelines.evaluate.engines import NEEDED, IouType
from pipelines.shards.schema import coco_rle

COCO_KEYPOINTS = 17
_LARGEST = 1e300
_LONGEST_SIDE = (
    1 << 20
)  # px; pycocotools takes memory by a polygon's length, which the image's sides bound
_MOST_PIXELS = 1 << 32  # its run lengths have 32 bits
_FIELDS = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}


def read_json(path: Path, kind: type, what: str) -> Any:
    """A file whose outermost value is of that kind. Raises ValueError if it is something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give {what}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give {what}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); give {what}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: holds a {type(value).__name__}; give {what}")
    return value


def check_truth(path: Path, coco: Mapping[str, Any]) -> None:
    """The structure of a COCO annotation file, and the numbers that every evaluation reads."""
    for part, keys in _FIELDS.items():
        records = coco.get(part)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path}: {part!r} is no list of records; give a COCO annotation file")
        for number, record in enumerate(records):
            missing = [key for key in keys if key not in record]
            if missing:
                raise ValueError(
                    f"{path}: {part}[{number}] has no {missing[0]!r}; give a COCO annotation file"
                )
            for key in keys:
                if key.endswith("id") and not _is_int(record[key]):
                    raise ValueError(
                        f"{path}: {part}[{number}]: {key} is {shortened(record[key])}; write a whole number of 64 bits"
                    )
    for category in coco["categories"]:
        if finding := check_category_record(category):
            raise ValueError(f"{path}: category {category['id']}: {finding[0]}; {finding[1]}")
    for part in ("images", "categories"):
        _check_distinct(path, part, coco[part])
    for annotation in coco["annotations"]:
        where = f"{path}: annotation {annotation['id']}"
        if not _are_numbers(annotation["bbox"]) or len(annotation["bbox"]) != 4:
            raise ValueError(
                f"{where}: bbox is {shortened(annotation['bbox'])}; write it as [x, y, width, height]"
            )
        if not _is_number(annotation["area"]):
            raise ValueError(
                f"{where}: area is {shortened(annotation['area'])}; write the object's area in pixels"
            )
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise ValueError(
                f"{where}: iscrowd is {shortened(annotation['iscrowd'])}; write 0 or 1"
            )


def _check_distinct(path: Path, part: str, records: Sequence[Mapping[str, Any]]) -> None:
    """(Not of annotations: pycocotools knows them twice, and `engines` leaves such files to it.)"""
    seen: set[int] = set()
    for number, record in enumerate(records):
        if record["id"] in seen:
            raise ValueError(
                f"{path}: {part}[{number}]: id {record['id']} is there twice; give each an id of its own"
            )
        seen.add(record["id"])


def with_masks(coco: dict[str, Any]) -> dict[str, Any]:
    """Every mask as compressed RLE. Annotations of images that are not listed count nowhere, and are left out."""
    images = {image["id"]: image for image in coco["images"]}
    masks = [
        a
        | {
            "segmentation": _rle(
                f"annotation {a['id']}", a.get("segmentation"), images[a["image_id"]]
            )
        }
        for a in coco["annotations"]
        if a["image_id"] in images
    ]
    return coco | {"annotations": masks}


def with_keypoints(coco: dict[str, Any]) -> dict[str, Any]:
    """Only what has keypoints, as COCO's person_keypoints files; pycocotools fails on annotations without."""
    annotations = []
    for annotation in coco["annotations"]:
        points = annotation.get("keypoints")
        if points:
            if not _are_numbers(points) or len(points) != 3 * COCO_KEYPOINTS:
                raise ValueError(
                    f"annotation {annotation['id']}: keypoints has not x, y, v for {COCO_KEYPOINTS} points, "
                    "the only ones for which COCO says how exact they must be"
                )
            annotations.append({"num_keypoints": sum(v > 0 for v in points[2::3])} | annotation)
    named = {annotation["category_id"] for annotation in annotations}
    categories = [c for c in coco["categories"] if c.get("keypoints") or c["id"] in named]
    return coco | {"annotations": annotations, "categories": categories}


def checked_results(
    coco: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType
) -> list[Mapping[str, Any]]:
    """The results with every mask as compressed RLE; the originals are not changed."""
    images = {image["id"]: image for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    found: list[Mapping[str, Any]] = []
    for number, result in enumerate(results):
        for key in ("image_id", "category_id", "score", NEEDED[iou_type]):
            if not isinstance(result, Mapping) or key not in result:
                raise ValueError(
                    f"result {number} has no {key!r}, which {iou_type} results need; mend it or --iou"
                )
        _check_result(number, result, iou_type)
        if result["image_id"] not in images:
            raise ValueError(
                f"result {number} is for image {result['image_id']}, which the ground truth does not have"
            )
        if iou_type != "keypoints" and result["category_id"] not in categories:
            raise ValueError(
                f"result {number} is of category {result['category_id']}, which the ground truth does not have"
            )
        if ("bbox" in result) != ("bbox" in results[0]):
            raise ValueError(
                f"result {number} and result 0: only one has a bbox, by which pycocotools sorts results into sizes; "
                "give all of them one, or none"
            )
        if iou_type == "segm":
            rle = _rle(f"result {number}", result["segmentation"], images[result["image_id"]])
            found.append({**result, "segmentation": rle})
        else:
            found.append(result)
    return found


def _check_result(number: int, result: Mapping[str, Any], iou_type: IouType) -> None:
    for key in ("image_id", "category_id"):
        if not _is_int(result[key]):
            raise ValueError(
                f"result {number}: {key} is {shortened(result[key])}; it must be a whole number"
            )
    if not _is_number(result["score"]):
        raise ValueError(
            f"result {number}: score is {shortened(result['score'])}; it must be a finite number"
        )
    if "bbox" in result and (not _are_numbers(result["bbox"]) or len(result["bbox"]) != 4):
        raise ValueError(
            f"result {number}: bbox is {shortened(result['bbox'])}; it must be 4 finite numbers"
        )
    if iou_type == "keypoints":
        points = result["keypoints"]
        if not _are_numbers(points) or len(points) != 3 * COCO_KEYPOINTS:
            raise ValueError(
                f"result {number}: keypoints must be x, y, score of {COCO_KEYPOINTS} points, all finite"
            )


def _rle(where: str, mask: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """pycocotools' compressed RLE of a mask of an image. Raises ValueError if it is none."""
    size: list[Any] = [image.get("height"), image.get("width")]
    if not _is_int(size[0]) or not _is_int(size[1]) or min(size) < 1:
        raise ValueError(
            f"image {image['id']} of the ground truth has height and width {shortened(size)}; masks need its size"
        )
    if max(size) > _LONGEST_SIDE or prod(size) >= _MOST_PIXELS:
        raise ValueError(
            f"image {image['id']} of the ground truth has height and width {size}; pycocotools compares masks of fewer "
            f"than {_MOST_PIXELS} pixels, and sides of at most {_LONGEST_SIDE} fit in memory"
        )
    if isinstance(mask, Mapping) and mask.get("size") not in (size, tuple(size)):
        raise ValueError(
            f"{where}: its mask is of size {shortened(mask.get('size'))}, image {image['id']} is {size}"
        )
    if isinstance(mask, list):
        _check_polygons(where, mask, *size)
    try:
        counts = mask["counts"] if isinstance(mask, Mapping) else ()
        text = counts.encode() if isinstance(counts, str) else counts
        whole = (
            min(text) >= 48 and max(text) < 112
            if isinstance(text, bytes)
            else not text or sum(text) == prod(size)
        )
        rle = coco_rle(mask, *size) if mask and whole else None
        if rle is not None and rle_tools.area(rle) <= size[0] * size[1]:
            return rle
    except (ValueError, TypeError, KeyError, IndexError, UnicodeError, OverflowError):
        pass  # told below, like every other mask that is none
    raise ValueError(
        f"{where}: segmentation is {shortened(mask)}; give an RLE of size {size} or polygons"
    )


def _check_polygons(where: str, polygons: list[Any], height: int, width: int) -> None:
    """Not whether they are on the image: pycocotools compares those that are not as empty masks."""
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(v, int | float) and v is not True for v in polygon
        )
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where}: segmentation is {shortened(polygons)}; give polygons of 3 or more points x, y"
            )
        if finding := check_reach(polygon, width, height):
            raise ValueError(f"{where}: {finding[0]} ({shortened(polygons)}); {finding[1]}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    """Finite, and no integer that is too large for a float."""
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(_is_number, values))

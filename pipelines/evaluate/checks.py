"""The edge where ground truth and results enter evaluation.

A refusal is one line with the place and the value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pycocotools import mask as rle_tools

from contract.words import shortened
from pipelines.coco.checks import (
    UnusableError,
    check_reach,
    id_of,
    is_int,
    read_category,
)
from pipelines.coco.records import (
    CocoAnnotation,
    CocoResult,
    JsonObject,
    JsonValue,
    Rle,
)
from pipelines.coco.rle import compressed
from pipelines.evaluate.engines import NEEDED, IouType, Truth, TruthImage

_LARGEST = 1e300  # JSON's integers may be larger than any double, 1.8e308
_LONGEST_SIDE = 1 << 20  # px; pycocotools takes memory by a polygon's length, which the sides bound
_MOST_PIXELS = 1 << 32  # its run lengths have 32 bits
_FIELDS = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}

_RESULT_FIELDS = ("image_id", "category_id", "score")  # of every kind of result

T = TypeVar("T")


def read_json(path: Path, kind: type[T], what: str) -> T:
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


# --- ground truth ---------------------------------------------------------------------------------


def check_truth(path: Path, coco: JsonObject) -> None:
    """The structure of a COCO annotation file, and the numbers that every evaluation reads."""
    images, annotations, categories = (
        _checked_part(path, part, coco.get(part)) for part in _FIELDS
    )
    for fields in categories:
        try:
            read_category(fields)
        except UnusableError as error:
            raise ValueError(f"{path}: category {id_of(fields)}: {error}") from None
    # pycocotools takes annotations of one id, and `engines` leaves such files to it.
    _check_distinct(path, "images", images)
    _check_distinct(path, "categories", categories)
    for fields in annotations:
        _check_annotation(f"{path}: annotation {id_of(fields)}", fields)


def _checked_part(path: Path, part: str, records: JsonValue) -> list[JsonObject]:
    """One of the file's lists. Each record has the needed fields, and whole numbers as ids."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: {part!r} is no list of records; give a COCO annotation file")
    # By number, not by id: a record may have no id.
    for number, record in enumerate(records):
        for key in _FIELDS[part]:
            if key not in record:
                raise ValueError(
                    f"{path}: {part}[{number}] has no {key!r}; give a COCO annotation file"
                )
        for key in _FIELDS[part]:
            if key.endswith("id") and not is_int(record[key]):
                raise ValueError(
                    f"{path}: {part}[{number}]: {key} is {shortened(record[key])}; write a whole "
                    "number of 64 bits"
                )
    return records


def _check_distinct(path: Path, part: str, records: Sequence[JsonObject]) -> None:
    seen = set()
    for number, key in enumerate(map(id_of, records)):
        if key in seen:
            raise ValueError(
                f"{path}: {part}[{number}]: id {key} is there twice; give each an id of its own"
            )
        seen.add(key)


def _check_annotation(where: str, fields: JsonObject) -> None:
    box, area, crowd = fields["bbox"], fields["area"], fields.get("iscrowd", 0)
    if not _are_numbers(box) or len(box) != 4:
        raise ValueError(f"{where}: bbox is {shortened(box)}; write it as [x, y, width, height]")
    if not _is_number(area):
        raise ValueError(f"{where}: area is {shortened(area)}; write the object's area in pixels")
    if crowd not in (0, 1):
        raise ValueError(f"{where}: iscrowd is {shortened(crowd)}; write 0 or 1")


def truth_of(coco: Mapping[str, Any], iou_type: IouType) -> Truth:
    """What `iou_type` compares with. coco: COCO JSON that `check_truth` or packing has checked.

    "segm" makes every mask compressed RLE, and leaves out annotations of images that are not
    listed: they count nowhere, and their masks have no size. An object without a mask becomes a
    region that is ignored, its box: a detection of it is neither right nor wrong. "keypoints" keeps
    only annotations with keypoints, as COCO's person_keypoints files do; pycocotools fails on
    others. Raises ValueError for a mask or keypoints that cannot be compared.
    """
    image_fields, annotations, category_fields = (coco[part] for part in _FIELDS)
    images = [TruthImage(f["id"], f.get("height"), f.get("width")) for f in image_fields]
    categories = [read_category(fields) for fields in category_fields]
    objects = [(_object(fields), fields) for fields in annotations]
    match iou_type:
        case "bbox":
            compared = [annotation for annotation, _ in objects]
        case "segm":
            listed = {image.id: image for image in images}
            compared = [
                _with_mask(annotation, fields, listed[annotation.image_id])
                for annotation, fields in objects
                if annotation.image_id in listed
            ]
        case "keypoints":
            compared = [
                _with_keypoints(a, fields) for a, fields in objects if fields.get("keypoints")
            ]
            _check_same_count(compared)
            used = {annotation.category_id for annotation in compared}
            categories = [c for c in categories if c.keypoints or c.id in used]
    return Truth(images, compared, categories)


def _object(fields: Mapping[str, Any]) -> CocoAnnotation:
    key, image_id, category_id, box, area = (fields[name] for name in _FIELDS["annotations"])
    crowd = int(fields.get("iscrowd", 0))
    return CocoAnnotation(key, image_id, category_id, box, area, crowd)


def _with_mask(
    annotation: CocoAnnotation, fields: Mapping[str, Any], image: TruthImage
) -> CocoAnnotation:
    mask = fields.get("segmentation")
    if mask in (None, []):
        x, y, w, h = annotation.bbox
        height, width = _mask_size(image)
        # On the image: far over its edge a polygon would be refused.
        x0, x1 = (min(max(side, 0), width) for side in (x, x + w))
        y0, y1 = (min(max(side, 0), height) for side in (y, y + h))
        box: JsonValue = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        ignored = _mask(f"annotation {annotation.id}", box, image)
        return replace(annotation, segmentation=ignored, iscrowd=1)
    return replace(annotation, segmentation=_mask(f"annotation {annotation.id}", mask, image))


def _with_keypoints(annotation: CocoAnnotation, fields: Mapping[str, Any]) -> CocoAnnotation:
    where, points = f"annotation {annotation.id}", fields["keypoints"]
    if not _are_numbers(points) or len(points) % 3:
        raise ValueError(f"{where}: keypoints is {shortened(points)}; write x, y, v for each point")
    # pycocotools leaves out an object without labelled keypoints, and goes by this number.
    count = fields.get("num_keypoints", sum(v > 0 for v in points[2::3]))
    if not is_int(count):
        raise ValueError(
            f"{where}: num_keypoints is {shortened(count)}; write how many keypoints are labelled"
        )
    return replace(annotation, keypoints=list(points), num_keypoints=count)


def _check_same_count(annotations: Sequence[CocoAnnotation]) -> None:
    """One list of sigmas serves all objects."""
    for annotation in annotations:
        count, first = len(annotation.keypoints) // 3, len(annotations[0].keypoints) // 3
        if count != first:
            raise ValueError(
                f"annotation {annotation.id}: has {count} keypoints, annotation "
                f"{annotations[0].id} has {first}; evaluate one kind of object at a time"
            )


# --- results --------------------------------------------------------------------------------------


def checked_results(
    truth: Truth, results: Sequence[Mapping[str, Any]], iou_type: IouType
) -> list[CocoResult]:
    """COCO results as records, with every mask as compressed RLE.

    Raises ValueError for a result that does not fit.
    """
    images = {image.id: image for image in truth.images}
    categories = {category.id for category in truth.categories}
    records = []
    for number, fields in enumerate(results):
        for key in (*_RESULT_FIELDS, NEEDED[iou_type]):
            if not isinstance(fields, Mapping) or key not in fields:
                raise ValueError(
                    f"result {number} has no {key!r}, which {iou_type} results need; mend it or "
                    "--iou"
                )
        record = _result(number, fields, iou_type, truth.num_keypoints)
        if record.image_id not in images:
            raise ValueError(
                f"result {number} is for image {record.image_id}, which the ground truth does not "
                "have"
            )
        # A model gives keypoints to every category; the truth here has only those with keypoints.
        if iou_type != "keypoints" and record.category_id not in categories:
            raise ValueError(
                f"result {number} is of category {record.category_id}, which the ground truth does "
                "not have"
            )
        if ("bbox" in fields) != ("bbox" in results[0]):
            raise ValueError(
                f"result {number} and result 0: only one has a bbox, by which pycocotools sorts "
                "results into sizes; give all of them one, or none"
            )
        if iou_type == "segm":
            mask = _mask(f"result {number}", fields["segmentation"], images[record.image_id])
            record = replace(record, segmentation=mask)
        records.append(record)
    return records


def _result(
    number: int, fields: Mapping[str, Any], iou_type: IouType, num_keypoints: int
) -> CocoResult:
    """A result without its mask, which is read once its image is known."""
    image_id, category_id, score = (fields[name] for name in _RESULT_FIELDS)
    for name, value in (("image_id", image_id), ("category_id", category_id)):
        if not is_int(value):
            raise ValueError(
                f"result {number}: {name} is {shortened(value)}; it must be a whole number"
            )
    if not _is_number(score):
        raise ValueError(
            f"result {number}: score is {shortened(score)}; it must be a finite number"
        )
    box, points = fields.get("bbox"), None
    if "bbox" in fields and (not _are_numbers(box) or len(box) != 4):
        raise ValueError(f"result {number}: bbox is {shortened(box)}; it must be 4 finite numbers")
    if iou_type == "keypoints":
        points = fields["keypoints"]
        if not _are_numbers(points) or len(points) != 3 * num_keypoints:
            raise ValueError(
                f"result {number}: keypoints must be x, y, score of {num_keypoints} points, all "
                "finite"
            )
    return CocoResult(
        image_id,
        category_id,
        score,
        bbox=list(box) if box else None,
        keypoints=list(points) if points else None,
    )


# --- masks and numbers ----------------------------------------------------------------------------


def _mask(where: str, mask: JsonValue, image: TruthImage) -> Rle:
    """A mask of an image, compressed. Raises ValueError if it is none."""
    height, width = _mask_size(image)
    size = [height, width]
    own_size = mask.get("size") if isinstance(mask, Mapping) else size
    if own_size not in (size, tuple(size)):  # pycocotools writes a list, other code a tuple
        raise ValueError(
            f"{where}: its mask is of size {shortened(own_size)}, image {image.id} is {size}"
        )
    if isinstance(mask, list):
        _check_polygons(where, mask, height, width)
    rle = _encoded(mask, height, width)
    if rle is None:
        raise ValueError(
            f"{where}: segmentation is {shortened(mask)}; give an RLE of size {size} or polygons"
        )
    return rle


def _mask_size(image: TruthImage) -> tuple[int, int]:
    """Height and width of an image that has a mask. Other evaluation needs no size."""
    height, width, where = image.height, image.width, f"image {image.id} of the ground truth"
    if not is_int(height) or not is_int(width) or min(height, width) < 1:
        raise ValueError(
            f"{where} has height and width {shortened([height, width])}; masks need its size"
        )
    if max(height, width) > _LONGEST_SIDE or height * width >= _MOST_PIXELS:
        raise ValueError(
            f"{where} has height and width {[height, width]}; pycocotools compares masks of fewer "
            f"than {_MOST_PIXELS} pixels, and sides of at most {_LONGEST_SIDE} fit in memory"
        )
    return height, width


def _encoded(mask: Any, height: int, width: int) -> Rle | None:
    """Compressed RLE. None where pycocotools cannot read the mask, or would read past its end."""
    try:
        if isinstance(mask, list):
            return compressed(mask, height, width) if mask else None
        counts = mask["counts"]
        text = counts.decode() if isinstance(counts, bytes) else counts
        if isinstance(text, str):
            whole = min(text) >= "0" and max(text) < "p"  # the characters of 6 bits from 48
        else:
            whole = isinstance(text, list) and (not text or sum(text) == height * width)
        rle = compressed(Rle(height, width, text), height, width) if whole else None
        # A text of good characters may still run over the image.
        return rle if rle and rle_tools.area(rle.json()) <= height * width else None
    except (ValueError, TypeError, KeyError, IndexError, UnicodeError, OverflowError):
        return None


def _check_polygons(where: str, polygons: Sequence[JsonValue], height: int, width: int) -> None:
    """Polygons may lie off the image: pycocotools compares such a polygon as an empty mask."""
    for polygon in polygons:
        if not _is_list_of_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where}: segmentation is {shortened(polygons)}; give polygons of 3 or more "
                "points x, y"
            )
        try:
            check_reach(polygon, width, height)
        except UnusableError as error:
            raise ValueError(
                f"{where}: {error.what} ({shortened(polygons)}); {error.remedy}"
            ) from None


def _is_list_of_numbers(values: JsonValue) -> TypeGuard[list[float]]:
    """Any numbers of JSON, which may be infinite, NaN or too large."""
    return isinstance(values, list) and all(
        isinstance(value, int | float) and value is not True for value in values
    )


def _is_number(value: JsonValue) -> TypeGuard[float]:
    """Finite, and no integer that is too large for a float."""
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def _are_numbers(values: JsonValue) -> TypeGuard[Sequence[float]]:
    return isinstance(values, list | tuple) and all(map(_is_number, values))

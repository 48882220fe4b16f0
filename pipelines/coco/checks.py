"""The edge where COCO JSON enters: a record is checked once, and becomes a type or is refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal, TypeGuard, cast

from contract.words import shortened
from pipelines.coco.records import (
    CocoAnnotation,
    CocoCategory,
    CocoImage,
    JsonObject,
    JsonValue,
    Polygons,
    Rle,
)
from pipelines.coco.remarks import RemarkKind
from pipelines.coco.rle import run_lengths

_LARGEST = 1e15  # pixels and areas; far beyond any image, and exact in doubles
_FAR = 10.0  # image sides that a polygon may reach beyond the edge
# Fields that hold a whole number.
WHOLE_OF_IMAGE = ("id", "width", "height")
WHOLE_OF_ANNOTATION = ("id", "image_id", "category_id", "num_keypoints")
_IMAGE_FIELDS = {"id", "file_name", "width", "height"}
_ANNOTATION_FIELDS = {
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


class UnusableError(ValueError):
    """A record that cannot be used: what is wrong with it, and the remedy."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}; {remedy}")
        self.what, self.remedy = what, remedy


@dataclass(frozen=True)
class Problem:
    """Something that a person must mend in the input, or allow to be skipped."""

    file: str
    kind: Literal["image", "annotation"]
    id: int | float | str | None  # as the file has it, or words where it has none
    what: str
    remedy: str
    annotations: int = 0  # of an image that is left out: they go with it

    def __str__(self) -> str:
        what = self.what if len(self.what) < 300 else f"{self.what[:300]}..."
        return f"{self.file}: {self.kind} {self.id}: {what}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class AnnotationKeys:
    """What places an annotation in its dataset."""

    id: int
    image_id: int
    category_id: int


def check_file_to_write(out: Path) -> None:
    """Raises ValueError if `--out` names a folder or something below a file."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; give --out a file to write")
    blocked = [folder for folder in out.parents if folder.exists() and not folder.is_dir()]
    if blocked:
        raise ValueError(f"{out}: {blocked[0]} is a file; give --out a path below folders")


def is_int(value: JsonValue, bits: int = 64) -> TypeGuard[int]:
    """A whole number that Arrow and SQLite can hold."""
    # JSON's numbers have no bound, and in Python a bool is an instance of int.
    return type(value) is int and -(1 << bits - 1) <= value < 1 << bits - 1


def whole(value: JsonValue) -> JsonValue:
    """The value, with a whole number that is written as a float (7.0) or as text as an int."""
    # 2 ** 53: beyond it a float stands for several whole numbers.
    if type(value) is float and value.is_integer() and abs(value) <= 1 << 53:
        return int(value)
    # "007" and "7" may be two things. 15 digits need no check of their size.
    if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,14}", value):
        return int(value)
    return value


def oddly_written(raw: JsonValue, names: Collection[str]) -> set[RemarkKind]:
    """How these fields write whole numbers, where not as such."""
    fields = raw if isinstance(raw, dict) else {}
    types = {type(fields.get(name)) for name in names if type(whole(fields.get(name))) is int}
    kinds: dict[type, RemarkKind] = {float: "whole_float", str: "text_number"}
    return {kind for written, kind in kinds.items() if written in types}


def _are_numbers(values: JsonValue) -> TypeGuard[list[float]]:
    return isinstance(values, list) and set(map(type, values)) <= {int, float}


def _are_lengths(values: JsonValue) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(is_int(value) and value >= 0 for value in values)


def _are_finite(values: Collection[float]) -> bool:
    # Integers may be too large for a float, so they are compared first; a NaN shows in the sum.
    return not values or (
        min(values) >= -_LARGEST and max(values) <= _LARGEST and not isnan(sum(values))
    )


def _unencodable(text: str) -> bool:
    """Half of a surrogate pair, which JSON can write and no file name can hold."""
    return any(0xD800 <= ord(character) < 0xE000 for character in text)


def is_path_below(name: str) -> bool:
    """Whether a file name stays in the folder that it is relative to."""
    # A name that leaves the folder would pack any file that this user can read.
    if name.startswith("/") or "\0" in name or _unencodable(name):
        return False
    # 255 bytes are the longest name that common file systems take.
    return all(part != ".." and len(part.encode()) < 256 for part in name.split("/"))


# --- records --------------------------------------------------------------------------------------


def id_of(raw: JsonValue) -> int | float | str | None:
    """What names a record in a message, whatever it is: on one line, and not longer than one."""
    if not isinstance(raw, dict):
        return repr(raw)[:40]
    value = raw.get("id", "without id")
    # an id is anything: a text with a line break, a number of 400 digits
    if value is None or isinstance(value, int | float | str):
        text = str(value)
        if len(text) <= 80 and text.isprintable():
            return value
    return shortened(value)


def read_image(raw: JsonValue, folders: Collection[str] = ()) -> CocoImage:
    """An element of `images`. folders: absolute names of --images. Raises UnusableError."""
    fields, image_id = _identified(raw, "give every image a whole number as id")
    name = fields.get("file_name")
    if not isinstance(name, str) or not name:
        raise UnusableError("has no file_name", "name the image's file relative to --images")
    if name.startswith("/"):
        # Without one of them the images lie elsewhere, and only their own folder can be named.
        above = [folder for folder in folders if name.startswith(f"{folder}/")]
        folder = above[0] if above else name.rpartition("/")[0]
        raise UnusableError(
            f"file_name {shortened(name)} is an absolute path",
            f"write it relative to --images ({_without(folder)})",
        )
    if not is_path_below(name):
        raise UnusableError(
            f"file_name {shortened(name)} is no path below --images",
            "name the image's file relative to --images",
        )
    width, height = (_side(side, whole(fields.get(side))) for side in ("width", "height"))
    return CocoImage(image_id, name, width, height, _others(fields, _IMAGE_FIELDS))


def _without(folder: str) -> str:
    """The command that takes the folder from all names of a file, which may be one line."""
    pattern = re.sub(r"[][.*^$\\#]", r"\\\g<0>", folder)
    script = shlex.quote(f's#"{pattern}/#"#g')
    return f"sed -i {script} FILE"


def _side(name: str, value: JsonValue) -> int:
    if not is_int(value, 32) or value <= 0:
        raise UnusableError(
            f"{name} is {shortened(value)}", "write the size of the image file in pixels"
        )
    return value


def read_category(raw: JsonValue) -> CocoCategory:
    """An element of `categories`. Raises UnusableError."""
    fields, category_id = _identified(raw, "mend the list of categories")
    name, points = fields.get("name"), fields.get("keypoints", [])
    if not isinstance(name, str) or _unencodable(name):
        raise UnusableError(f"name is {shortened(name)}", "write its name as text")
    if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
        raise UnusableError(
            f"keypoints is {shortened(points)}",
            "write the names of its keypoints, or leave them out",
        )
    return CocoCategory(category_id, name, tuple(points), _flip_pairs(fields.get("flip_pairs")))


def _flip_pairs(value: JsonValue) -> tuple[tuple[str, str], ...] | None:
    """Not a field of COCO's: names of keypoints that change places in a mirrored image."""
    if value is None:
        return None
    pairs = value if isinstance(value, list) else [value]
    named = [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
    ]
    if len(named) != len(pairs):
        raise UnusableError(
            f"flip_pairs is {shortened(value)}",
            "write pairs of keypoint names, [[left, right], ...], or leave it out",
        )
    return tuple(cast(list[tuple[str, str]], named))


def read_annotation_keys(raw: JsonValue) -> AnnotationKeys:
    """The ids of an element of `annotations`. The rest is read once its image is known.

    Raises UnusableError.
    """
    fields, annotation_id = _identified(raw, "give every annotation a whole number from 0 as id")
    if annotation_id < 0:
        raise UnusableError(
            f"id {annotation_id} is below 0",
            "number annotations from 1: pycocotools takes no negative ids",
        )
    image_id, category_id = (
        _key(name, whole(fields.get(name))) for name in ("image_id", "category_id")
    )
    return AnnotationKeys(annotation_id, image_id, category_id)


def _key(name: str, value: JsonValue) -> int:
    if not is_int(value):
        raise UnusableError(
            f"{name} is {shortened(value)}",
            f"give it the whole number of its {name.removesuffix('_id')}",
        )
    return value


def read_annotation(
    raw: JsonObject, image: CocoImage, keypoint_counts: Mapping[int, int]
) -> CocoAnnotation:
    """An element of `annotations` whose ids are checked, and which belongs to `image`.

    keypoint_counts: category id -> how many keypoint types the category has. COCO's own train2017
    has a box of zero width: such a box is kept for evaluation and never trains. A box that reaches
    over the edge is kept too; training clips it. Raises UnusableError.
    """
    keys = read_annotation_keys(raw)
    if keys.category_id not in keypoint_counts:
        raise UnusableError(
            f"category_id {keys.category_id} is not among the categories",
            "add the category or drop the annotation",
        )
    width, height = image.width, image.height
    return CocoAnnotation(
        id=keys.id,
        image_id=keys.image_id,
        category_id=keys.category_id,
        bbox=_box(raw.get("bbox"), width, height),
        area=_area(raw.get("area")),
        iscrowd=_crowd(raw.get("iscrowd", 0)),
        segmentation=_segmentation(raw.get("segmentation"), width, height),
        num_keypoints=_labelled_keypoints(raw),
        keypoints=_keypoints(raw.get("keypoints"), keypoint_counts[keys.category_id]),
        extra=_others(raw, _ANNOTATION_FIELDS),
    )


def _identified(raw: JsonValue, remedy: str) -> tuple[JsonObject, int]:
    if isinstance(raw, dict) and is_int(number := whole(raw.get("id"))):
        return raw, number
    raise UnusableError("has no integer id of 64 bits", remedy)


def _others(fields: JsonObject, known: Collection[str]) -> JsonObject:
    return {name: value for name, value in fields.items() if name not in known}


# --- fields of an annotation ----------------------------------------------------------------------


def _box(box: JsonValue, width: int, height: int) -> list[float]:
    if not _are_numbers(box) or len(box) != 4:
        raise UnusableError(f"bbox is {shortened(box)}", "write it as [x, y, width, height]")
    if not _are_finite(box):
        raise UnusableError(
            f"bbox {shortened(box)} is not finite",
            "compute it anew from the segmentation or drop the annotation",
        )
    x, y, w, h = box
    # A side of zero is COCO's own; a negative one comes from corners in the wrong order.
    if w < 0 or h < 0:
        raise UnusableError(
            f"bbox {box} is inverted (negative side)",
            "write it as [x, y, width, height], not as two corners",
        )
    if x >= width or y >= height or x + w < 0 or x + w <= 0 < w or y + h < 0 or y + h <= 0 < h:
        raise UnusableError(
            f"bbox {box} lies off its {width} x {height} image",
            "mend the box or drop the annotation",
        )
    return list(map(float, box))  # the shard's column holds doubles


def _area(area: JsonValue) -> float:
    numbers = [area]
    if not _are_numbers(numbers) or not _are_finite(numbers) or numbers[0] < 0:
        raise UnusableError(
            f"area is {shortened(area)}",
            "write the object's area in pixels; evaluation sorts objects by it",
        )
    return float(numbers[0])


def _crowd(value: JsonValue) -> int:
    # `true` and 1.0 equal 1; tools other than COCO's write them.
    if isinstance(value, int | float) and value in (0, 1):
        return int(value)
    raise UnusableError(f"iscrowd is {shortened(value)}", "write 0 or 1")


def _segmentation(value: JsonValue, width: int, height: int) -> Polygons | Rle | None:
    if value is None:
        return None
    if is_bare_polygon(value):
        return [_polygon(value, width, height)]
    if isinstance(value, list):
        return [_polygon(polygon, width, height) for polygon in value]
    if not isinstance(value, dict) or "counts" not in value or "size" not in value:
        raise UnusableError(
            "segmentation is neither polygons nor an RLE",
            "write [[x, y, ...], ...] or {'size', 'counts'}",
        )
    return _rle(value["size"], value["counts"], width, height)


def is_bare_polygon(value: JsonValue) -> TypeGuard[list[float]]:
    """A polygon in the place of a list of polygons, as VIA writes it."""
    return bool(value) and _are_numbers(value)


def _rle(size: JsonValue, counts: JsonValue, width: int, height: int) -> Rle:
    # 30.0 == 30, but only a whole number goes into the shard's column of sizes.
    if size != [height, width] or not isinstance(size, list) or not all(map(is_int, size)):
        raise UnusableError(
            f"RLE size {shortened(size)} is not the image's [{height}, {width}]",
            "encode the mask at the image's size",
        )
    if not counts:
        raise UnusableError("RLE is empty", "drop the annotation or encode its mask")
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list):
        raise UnusableError("RLE counts cannot be read", "encode the mask anew with pycocotools")
    if not _are_lengths(runs) or sum(runs) != width * height:
        raise UnusableError(
            f"RLE counts do not add up to {width * height} pixels",
            "encode the mask anew with pycocotools",
        )
    if not any(runs[1::2]):  # every second run is of the object
        raise UnusableError("RLE is empty (no pixel set)", "drop the annotation or encode its mask")
    return Rle(height, width, counts if isinstance(counts, str) else runs)


def _polygon(polygon: JsonValue, width: int, height: int) -> list[float]:
    if not _are_numbers(polygon):
        raise UnusableError(
            "polygon is not a list of numbers", "write each polygon as [x, y, x, y, ...]"
        )
    if len(polygon) < 6:
        raise UnusableError(
            f"polygon has {len(polygon) // 2} points, fewer than 3",
            "give it 3 or more points or drop it",
        )
    if len(polygon) % 2:
        raise UnusableError(
            f"polygon has {len(polygon)} numbers, an odd count",
            "write each polygon as [x, y, x, y, ...]",
        )
    check_reach(polygon, width, height)
    xs, ys = polygon[::2], polygon[1::2]
    if max(xs) < 0 or max(ys) < 0 or min(xs) > width or min(ys) > height:
        raise UnusableError(
            f"polygon lies off its {width} x {height} image", "mend or drop the polygon"
        )
    return list(map(float, polygon))


def check_reach(polygon: list[float], width: int, height: int) -> None:
    """Raises UnusableError for a polygon of 3 or more points that reaches far beyond the image.

    pycocotools takes memory by a polygon's length, whatever the image's size.
    """
    if not _are_finite(polygon):
        raise UnusableError(
            "polygon has a coordinate that is not finite", "mend or drop the polygon"
        )
    xs, ys = polygon[::2], polygon[1::2]
    reach = max(max(-min(xs), max(xs) - width) / width, max(-min(ys), max(ys) - height) / height)
    if reach > _FAR:
        raise UnusableError(
            f"polygon reaches {reach:.0f} image sides beyond the edge",
            "mend or drop the polygon",
        )


def _labelled_keypoints(fields: JsonObject) -> int | None:
    # Not counted here where the file does not say it: export gives back what was there.
    if "num_keypoints" not in fields:
        return None
    count = whole(fields["num_keypoints"])
    if not is_int(count, 32) or count < 0:
        raise UnusableError(
            f"num_keypoints is {shortened(count)}", "write how many keypoints are labelled"
        )
    return count


def _keypoints(values: JsonValue, num_points: int) -> list[float]:
    if values is None:
        return []
    if num_points == 0 and values:
        named = len(values) // 3 if isinstance(values, list) else 0
        raise UnusableError(
            f"has {shortened(values)} as keypoints, its category names none",
            f'write {named} names into the category ("keypoints": ["nose", ...]), or delete '
            '"keypoints" from its annotations',
        )
    if not isinstance(values, list) or len(values) != 3 * num_points:
        count = len(values) if isinstance(values, list) else values
        raise UnusableError(
            f"keypoints has {shortened(count)} numbers, its category has {num_points} points",
            "write x, y, v for each point",
        )
    if not _are_numbers(values) or not _are_finite(values):
        raise UnusableError("a keypoint is not finite", "mend it or set its visibility to 0")
    if any(v not in (0, 1, 2) for v in values[2::3]):
        raise UnusableError(
            "a keypoint's visibility is not 0, 1 or 2",
            "write 0 unlabelled, 1 hidden, 2 visible",
        )
    return list(map(float, values))

"""COCO's records as types. `checks` reads them from JSON, their `json` methods write it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

# Sequence and Mapping, because a list[float] is no list[JsonValue] for a type checker.
JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
JsonObject: TypeAlias = "dict[str, JsonValue]"
Polygons = list[list[float]]  # each one is x, y, x, y, ... in pixels of the image


# All records have slots: train2017 has 860,001 annotations, and a dictionary for each takes memory.
@dataclass(frozen=True, slots=True)
class CocoCategory:
    """keypoints: the names of its keypoints, empty without them. flip_pairs: those of them that
    change places in a mirrored image, None where the file does not say it.
    """

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    flip_pairs: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class CocoImage:
    """width, height: pixels. extra: the JSON object's other fields."""

    id: int
    file_name: str
    width: int
    height: int
    extra: JsonObject = field(default_factory=dict)

    def json(self) -> JsonObject:
        """The image as an element of COCO's `images`."""
        return {
            "id": self.id,
            "file_name": self.file_name,
            "width": self.width,
            "height": self.height,
            **self.extra,
        }


@dataclass(frozen=True, slots=True)
class Rle:
    """A (height, width) mask by the lengths of its runs, column by column, background first.

    counts: the lengths, or pycocotools' compressed text of them.
    """

    height: int
    width: int
    counts: str | list[int]  # both forms are kept as they came, so that export gives them back

    def json(self) -> JsonObject:
        """COCO's form, which pycocotools and hotcoco take too."""
        return {"size": [self.height, self.width], "counts": self.counts}


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """An object of an image, in pixels of the image.

    bbox: x, y, width, height. area: of the mask, in pixels; evaluation sorts objects by it.
    segmentation: None or an empty list without a mask. keypoints: x, y, visibility of each point,
    empty without keypoints. num_keypoints: labelled points, None where the file does not say it.
    extra: the JSON object's other fields.
    """

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int = 0
    segmentation: Polygons | Rle | None = None
    keypoints: list[float] = field(default_factory=list)
    num_keypoints: int | None = None
    extra: JsonObject = field(default_factory=dict)

    def json(self) -> JsonObject:
        """The annotation as an element of COCO's `annotations`."""
        mask = self.segmentation
        return {
            "id": self.id,
            "image_id": self.image_id,
            "category_id": self.category_id,
            **({"segmentation": mask.json() if isinstance(mask, Rle) else mask} if mask else {}),
            "area": self.area,
            "bbox": self.bbox,
            "iscrowd": self.iscrowd,
            **({"keypoints": self.keypoints} if self.keypoints else {}),
            **({} if self.num_keypoints is None else {"num_keypoints": self.num_keypoints}),
            **self.extra,
            # Some tools write an empty list for "no mask", and get it back.
            **({"segmentation": []} if mask == [] else {}),
        }


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image with all its annotations, in the order of the annotation file."""

    image: CocoImage
    annotations: list[CocoAnnotation]


@dataclass(frozen=True, slots=True)
class CocoResult:
    """A detection: a box, a mask or keypoints. A mask or keypoints may have a box beside them."""

    image_id: int
    category_id: int
    score: float
    bbox: list[float] | None = None
    segmentation: Rle | None = None
    keypoints: list[float] | None = None

    def json(self) -> JsonObject:
        """The detection as an element of a COCO results file."""
        shapes = {"bbox": self.bbox, "keypoints": self.keypoints}
        return {
            "image_id": self.image_id,
            "category_id": self.category_id,
            "score": self.score,
            **{name: values for name, values in shapes.items() if values is not None},
            **({"segmentation": self.segmentation.json()} if self.segmentation else {}),
        }

"""Whether the fields of a file agree with each other: a box with its mask and its image.

Each field may be sound by itself and the object still be nonsense: corners in the place of a width
and a height, a polygon of another object.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle_tools

from contract.words import shortened
from pipelines.coco.records import CocoAnnotation, CocoImage, JsonObject, Polygons, Rle
from pipelines.coco.remarks import Remarks
from pipelines.coco.rle import compressed

# COCO's own boxes agree to 1 px (coco-mini: IoU at least 0.94). Far is less than half of both.
_LEAST_IOU, _ROUNDING_PX = 0.5, 2.0
_LEAST_AREA_PX = 1e-3  # of a polygon; a flat one has none
_FEW = 8  # boxes; fewer tell nothing of how a file writes them


class Extent(NamedTuple):
    """Corners in pixels of the image."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass
class BoxForm:
    """What the boxes of some annotations look like. Counts, so that shards can be added up.

    boxes: annotations in all. ordered: boxes that lie on their image as corners, the second one
    beyond the first. over: boxes that reach over their image. masked: boxes with a
    mask to compare with; off: those far from it; corners: those that fit it as corners.
    """

    boxes: int = 0
    ordered: int = 0
    over: int = 0
    masked: int = 0
    off: int = 0
    corners: int = 0

    def __add__(self, other: BoxForm) -> BoxForm:
        return BoxForm(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def check(self) -> None:
        """Raises ValueError if the boxes are corners, not x, y, width, height."""
        by_masks = self.masked >= _FEW and self.off and 2 * self.corners > self.masked
        # Without masks: in a file of widths and heights, some box is left or above of its own size.
        by_edges = self.boxes >= _FEW and self.ordered == self.boxes and 4 * self.over > self.boxes
        if self.masked >= _FEW and 2 * self.off <= self.masked:
            by_edges = False  # their masks say that the boxes are what they should be
        if by_masks or by_edges:
            seen = (
                f"{self.corners} of {self.masked} fit their masks as corners"
                if by_masks
                else f"{self.over} of {self.boxes} reach over the edge of their image"
            )
            raise ValueError(
                f"boxes look like corners x0, y0, x1, y1 ({seen}); write each bbox as "
                "[x, y, width, height]"
            )


def compare(annotation: CocoAnnotation, image: CocoImage, form: BoxForm, remarks: Remarks) -> None:
    """Counts what of an annotation does not agree."""
    x, y, w, h = annotation.bbox
    beyond = max(-x, -y, x + w - image.width, y + h - image.height)
    form.boxes += 1
    outside = max(-x, -y, w - image.width, h - image.height)  # of corners
    form.ordered += w > x and h > y and outside <= _ROUNDING_PX
    form.over += beyond > _ROUNDING_PX
    if beyond > _ROUNDING_PX:
        remarks.add("box_over_edge", f"annotation {annotation.id} by {beyond:.0f} px")
    mask = annotation.segmentation
    if not mask:
        if not annotation.iscrowd:
            remarks.add("no_mask", f"annotation {annotation.id}")
        return
    if isinstance(mask, list) and _area(mask) < _LEAST_AREA_PX:
        remarks.add("flat_mask", f"annotation {annotation.id}")
        return
    extent = _extent(mask, image)
    form.masked += 1
    if _far(Extent(x, y, x + w, y + h), extent):
        form.off += 1
        form.corners += not _far(Extent(x, y, w, h), extent)
        shown = ", ".join(f"{value:.0f}" for value in extent)
        numbers = ", ".join(f"{value:g}" for value in annotation.bbox)
        remarks.add(
            "box_off_mask",
            f"annotation {annotation.id}: bbox [{numbers}], its mask spans {shown}",
        )


def remark_whole(
    remarks: Remarks,
    categories: Sequence[JsonObject],
    used: Collection[int],
    objects: int,
    crowds: int,
) -> None:
    """Counts what only shows in the whole dataset.

    categories: in the order of their labels. used: labels that some annotation has.
    """
    if crowds == objects > 0:
        remarks.add("all_crowds", count=crowds)
    for label, category in enumerate(categories):
        heads = any(
            other is not category and other.get("supercategory") == category["name"]
            for other in categories
        )
        if heads and label not in used:
            remarks.add("heading", f"category {category['id']}: {shortened(category['name'])}")


def _far(box: Extent, mask: Extent) -> bool:
    apart = max(abs(a - b) for a, b in zip(box, mask, strict=True))
    if apart <= _ROUNDING_PX:  # a few pixels are much of a small box
        return False
    wide = min(box.x1, mask.x1) - max(box.x0, mask.x0)
    high = min(box.y1, mask.y1) - max(box.y0, mask.y0)
    shared = max(wide, 0.0) * max(high, 0.0)
    union = _size(box) + _size(mask) - shared
    return shared < _LEAST_IOU * union


def _size(box: Extent) -> float:
    return max(box.x1 - box.x0, 0.0) * max(box.y1 - box.y0, 0.0)


def _area(polygons: Polygons) -> float:
    """The sum of the areas that the polygons enclose, each by the shoelace formula."""
    total = 0.0
    for polygon in polygons:
        # Around the first point: far from the origin the products would lose the last digits.
        xs = np.asarray(polygon[::2]) - polygon[0]
        ys = np.asarray(polygon[1::2]) - polygon[1]
        total += abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))) / 2
    return total


def _extent(mask: Polygons | Rle, image: CocoImage) -> Extent:
    if isinstance(mask, Rle):
        coded = compressed(mask, image.height, image.width)
        x, y, w, h = rle_tools.toBbox(coded.json())
        return Extent(float(x), float(y), float(x + w), float(y + h))
    xs = [value for polygon in mask for value in polygon[::2]]
    ys = [value for polygon in mask for value in polygon[1::2]]
    return Extent(min(xs), min(ys), max(xs), max(ys))

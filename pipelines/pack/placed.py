"""An object on a synthetic image, and its COCO annotation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools

from pipelines.coco.records import JsonObject, Rle

Points: TypeAlias = NDArray[np.float64]  # (n, 2): x to the right, y down
Mask: TypeAlias = NDArray[np.bool_]  # (H, W)
Canvas: TypeAlias = NDArray[np.float64]  # (H, W, 3), 0 is black and 1 is white

MIN_PIXELS = 24  # of an object when it is placed


@dataclass(frozen=True)
class Placed:
    """An object on the image. mask: what can be seen of it. whole: its pixels before anything hid
    it."""

    category: int
    polygons: list[Points]
    mask: Mask
    whole: int
    crowd: bool = False
    keypoints: Points | None = None


Drawn: TypeAlias = tuple[NDArray[np.uint8], list[Placed]]  # (H, W, 3) and its objects
Draw: TypeAlias = Callable[[np.random.Generator, int], Drawn]  # the size is in px


def rounded(polygon: Points, width: int, height: int) -> Points:
    """Kept inside the image and to two decimals, as COCO has them."""
    return np.asarray(np.round(np.clip(polygon, 0, [width, height]), 2), np.float64)


def polygon_mask(polygons: list[Points], height: int, width: int) -> Mask:
    """The union, rasterised as pycocotools does."""
    rles = rle_tools.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)
    return np.asarray(rle_tools.decode(rle_tools.merge(rles)), bool)


def crowd(
    rng: np.random.Generator, category: int, outline: Sequence[Points], height: int, width: int
) -> Placed:
    """Many small things of one category, annotated together. It may have no pixel."""
    middle = np.array([rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height])
    radius = 0.05 * max(height, width)
    polygons = [
        rounded(part * radius + shift, width, height)
        for shift in middle + rng.normal(0, 2.5 * radius, (int(rng.integers(6, 12)), 2))
        for part in outline
    ]
    mask = polygon_mask(polygons, height, width)
    return Placed(category, polygons, mask, int(mask.sum()), crowd=True)


def annotation(placed: Placed, annotation_id: int, image_id: int) -> JsonObject:
    """The COCO annotation of an object. The order of its fields is part of the dataset's bytes."""
    height, width = placed.mask.shape
    # The area is of what can be seen, for polygons too, as pycocotools counts it.
    rle = rle_tools.encode(np.asfortranarray(placed.mask.astype(np.uint8)))
    record: JsonObject = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": placed.category + 1,
        "iscrowd": int(placed.crowd),
    }
    if not placed.crowd and int(placed.mask.sum()) == placed.whole:
        corners = np.concatenate(placed.polygons)
        low, high = corners.min(0), corners.max(0)
        record |= {
            "segmentation": [polygon.ravel().tolist() for polygon in placed.polygons],
            "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
        }
    else:
        record |= {
            "segmentation": Rle(height, width, rle["counts"].decode()).json(),
            "bbox": [float(v) for v in rle_tools.toBbox(rle)],
        }
    record |= {"area": float(rle_tools.area(rle))}
    return (
        record if placed.keypoints is None else record | _keypoints(placed.keypoints, placed.mask)
    )


def _keypoints(points: Points, mask: Mask) -> JsonObject:
    """COCO keypoints: 2 for a point that can be seen, 1 for a hidden one, 0 for one off the image.

    points: (17, 2). mask: what can be seen of the person, (H, W).
    """
    height, width = mask.shape
    values: list[int] = []
    for x, y in points:
        inside = 0 <= x < width and 0 <= y < height
        seen = inside and bool(mask[int(y), int(x)])
        values += [int(x), int(y), 2 if seen else 1] if inside else [0, 0, 0]
    return {"keypoints": values, "num_keypoints": sum(v > 0 for v in values[2::3])}

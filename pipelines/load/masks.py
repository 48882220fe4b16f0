"""Masks as batches hold them: for each object S x S samples over its own box.

A stack of masks at the size of the image is never built.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pycocotools import _mask as coco_mask

from pipelines.coco.records import Rle
from pipelines.coco.rle import decoded
from pipelines.shards import schema
from pipelines.shards.rows import Annotations, Floats

Masks = NDArray[np.uint8]
# Samples. Rasterising takes memory by a polygon's length, and only a polygon that contradicts its
# box reaches further.
FARTHEST = 1e5


def mask_crops(
    annotations: Annotations,
    chosen: Sequence[int] | NDArray[np.int64],
    boxes_xyxy: Floats,
    side: int,
) -> Masks:
    """uint8 (N, side, side) of 0 and 1: the masks of the chosen annotations, each over its box.

    boxes_xyxy: (N, 4) in pixels of the image. Polygons are rasterised at the crop's own scale by
    pycocotools' rule. RLEs are sampled at the centres of the crop's pixels.
    """
    crops = np.zeros((len(chosen), side, side), np.uint8)
    scale = side / np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 1e-6)
    from_polygons, parts, counts = [], [], []
    for place, number in enumerate(chosen):
        kind = annotations.kinds[number]
        if kind == schema.POLYGONS:
            points, ends = annotations.polygons(number)
            points = ((points - boxes_xyxy[place, :2]) * scale[place]).clip(-FARTHEST, FARTHEST)
            from_polygons.append(place)
            counts.append(len(ends) - 1)
            parts += [points[first:last].ravel() for first, last in pairwise(ends)]
        elif kind != schema.NO_SEGMENTATION:
            crops[place] = crop_rle(annotations.rle(number), boxes_xyxy[place], side)
    if parts:
        crops[from_polygons] = _rasterise(parts, counts, side)
    return crops


def _rasterise(polygons: list[Floats], counts: list[int], side: int) -> Masks:
    """One mask (side, side) for each run of `counts[i]` polygons, their union."""
    # One call rasterises all polygons of an image.
    rles = coco_mask.frPoly(polygons, side, side)
    if len(rles) > len(counts):
        ends = np.cumsum(counts)
        groups = [rles[end - count : end] for end, count in zip(ends, counts, strict=True)]
        rles = [group[0] if len(group) == 1 else coco_mask.merge(group, 0) for group in groups]
    return np.asarray(coco_mask.decode(rles)).transpose(2, 0, 1)


def crop_rle(rle: Rle, box_xyxy: Floats, side: int) -> Masks:
    """uint8 (side, side): the mask's value in the pixel under each sample point."""
    height, width = rle.height, rle.width
    mask = decoded(rle, height, width)
    steps = (np.arange(side) + 0.5) / side
    x = np.clip((box_xyxy[0] + steps * (box_xyxy[2] - box_xyxy[0])).astype(np.int64), 0, width - 1)
    y = np.clip((box_xyxy[1] + steps * (box_xyxy[3] - box_xyxy[1])).astype(np.int64), 0, height - 1)
    return np.asarray(mask[y[:, None], x[None, :]], np.uint8)

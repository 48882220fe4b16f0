"""Boundary AP (Cheng et al. 2021, arXiv 2103.16562): pycocotools' AP of masks by a stricter IoU.

The IoU of two masks is the smaller one of two: that of the masks, and that of their boundaries. A
boundary is what lies inside of a mask within 2% of the image's diagonal of its contour; the
image's edge counts as a contour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle_tools
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import minimum_filter

WIDTH = 0.02  # of a boundary, as a share of the image's diagonal

_Rle = Mapping[str, Any]  # as pycocotools makes it


def width_px(height: int, width: int) -> int:
    """Pixels of a boundary, at least one."""
    return max(1, round(WIDTH * math.hypot(height, width)))


def boundary_of(mask: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """The pixels of `mask` (H, W) that a square of `px` to every side around them leaves."""
    # Eroding `px` times by a 3 x 3 square is one minimum over a square of 2 px + 1. Outside of the
    # image there is no object.
    inside: NDArray[np.uint8] = minimum_filter(mask, size=2 * px + 1, mode="constant", cval=0)
    return mask - inside


def boundary_rle(rle: _Rle) -> _Rle:
    """The boundary of a run-length code, as one."""
    height, width = rle["size"]
    mask = rle_tools.decode(rle)
    x, y, w, h = (int(side) for side in rle_tools.toBbox(rle))
    # Around its box a mask has nothing, like an image around its edge: the box alone is as good.
    mask[y : y + h, x : x + w] = boundary_of(mask[y : y + h, x : x + w], width_px(height, width))
    code: _Rle = rle_tools.encode(mask)
    return code


class BoundaryEval(COCOeval):  # type: ignore[misc]
    """COCOeval of masks whose IoU is that of the boundaries where that is smaller."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802 - pycocotools' names
        """(D, G): detections from the best score, and objects."""
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-d["score"] for d in found], kind="mergesort")
        found = [found[i] for i in order[: self.params.maxDets[-1]]]
        # Below the lowest threshold no pair matches, and the boundary cannot raise its IoU.
        near = np.asarray(ious) >= self.params.iouThrs[0]
        rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        if not len(rows):
            return ious
        ours = [boundary_rle(found[i]["segmentation"]) for i in rows]
        theirs = [boundary_rle(truth[i]["segmentation"]) for i in columns]
        crowd = [int(truth[i]["iscrowd"]) for i in columns]
        place = np.ix_(rows, columns)
        ious[place] = np.minimum(ious[place], rle_tools.iou(ours, theirs, crowd))
        return ious

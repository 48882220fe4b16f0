"""From the M x M map of a box to the pixels of its image.

A pixel (row i, column j) has its centre at (j + 0.5, i + 0.5). An M x M map has its
values at the centres of an M x M grid over the box. It is bilinear between them, constant beyond
the outermost ones, and zero outside the box.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def paste_mask(
    mask_MM: Tensor, box_xyxy: Tensor, height: int, width: int
) -> tuple[Tensor, int, int]:
    """The pixels that reach 0.5, uint8 (h, w), and the crop's top row and left column in the image.

    The crop holds the pixels whose centre is inside both the box and the image, and may be empty.
    """
    soft, top, left = paste_soft(mask_MM, box_xyxy, height, width)
    return (soft >= 0.5).to(torch.uint8), top, left


def paste_soft(
    mask_MM: Tensor, box_xyxy: Tensor, height: int, width: int
) -> tuple[Tensor, int, int]:
    """`paste_mask` before the threshold: float (h, w)."""
    x0, y0, x1, y1 = box_xyxy.tolist()
    left, right = _pixels(x0, x1, width)
    top, bottom = _pixels(y0, y1, height)
    side = mask_MM.shape[-1]
    rows = torch.from_numpy(_interpolation(top, bottom, y0, y1, side)).to(mask_MM)
    columns = torch.from_numpy(_interpolation(left, right, x0, x1, side)).to(mask_MM)
    return rows @ mask_MM @ columns.T, top, left


def _pixels(start: float, end: float, limit: int) -> tuple[int, int]:
    """The range of pixels whose centres lie in [start, end) and in the image."""
    first = min(max(math.ceil(start - 0.5), 0), limit)
    # An empty range, not a negative one, for a box outside the image.
    return first, max(min(math.ceil(end - 0.5), limit), first)


def _interpolation(
    first: int, last: int, start: float, end: float, side: int
) -> NDArray[np.float64]:
    """The weights of a map's values on one axis for each pixel: (last - first, side)."""
    # By numpy: the arrays are small, and a call of torch costs several times as much.
    centres = np.arange(first, last) + 0.5
    place = ((centres - start) / max(end - start, 1e-6) * side - 0.5).clip(0, side - 1)
    distance = np.abs(place[:, None] - np.arange(side))
    weights: NDArray[np.float64] = (1 - distance).clip(min=0)
    return weights


def paste_all(masks_DMM: Tensor, boxes_D4: Tensor, height: int, width: int) -> Tensor:
    """Soft masks over the whole image, float (D, height, width), zero outside each box."""
    image = masks_DMM.new_zeros(len(masks_DMM), height, width)
    # Box by box: each covers its own part of the image, and the parts differ in size. A GPU waits
    # once, for all boxes.
    for canvas, mask, box in zip(image, masks_DMM, boxes_D4.cpu(), strict=True):
        soft, top, left = paste_soft(mask, box, height, width)
        canvas[top : top + soft.shape[0], left : left + soft.shape[1]] = soft
    return image


def paste_all_torchvision(masks_DMM: Tensor, boxes_D4: Tensor, height: int, width: int) -> Tensor:
    """`paste_all` by torchvision's convention.

    The map has a border of zeros, and boxes are whole pixels with `+1` sides.
    """
    side = masks_DMM.shape[-1]
    padded = F.pad(masks_DMM, (1, 1, 1, 1))
    centres, half = (
        (boxes_D4[:, :2] + boxes_D4[:, 2:]) * 0.5,
        (boxes_D4[:, 2:] - boxes_D4[:, :2]) * 0.5,
    )
    half = half * ((side + 2) / side)
    corners = torch.cat([centres - half, centres + half], dim=1).to(torch.int64)
    image = masks_DMM.new_zeros(len(masks_DMM), height, width)
    for canvas, mask, (x0, y0, x1, y1) in zip(image, padded, corners.tolist(), strict=True):
        size = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
        soft = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[
            0, 0
        ]
        top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1 + 1, height), min(x1 + 1, width)
        canvas[top:bottom, left:right] = soft[top - y0 : bottom - y0, left - x0 : right - x0]
    return image

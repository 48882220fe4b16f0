"""Boxes as (x0, y0, x1, y1) with continuous edges and no `+1`, always in float32.

Axes: N and M boxes. Offsets (dx, dy, dw, dh) are those of Faster R-CNN (arXiv 1506.01497, equation
2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # the largest growth of a side that an offset may ask for

OffsetWeights = tuple[float, float]  # of (dx, dy) and of (dw, dh)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) to (...); negative sides count as nothing."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Intersection over union, (..., N, 4) and (..., M, 4) to (..., N, M).

    It is 0 where both boxes are empty.
    """
    first, second = boxes_N4[..., :, None, :], others_M4[..., None, :, :]
    width = (
        torch.minimum(first[..., 2], second[..., 2]) - torch.maximum(first[..., 0], second[..., 0])
    ).clamp(min=0)
    height = (
        torch.minimum(first[..., 3], second[..., 3]) - torch.maximum(first[..., 1], second[..., 1])
    ).clamp(min=0)
    shared = width * height
    union = area(boxes_N4)[..., :, None] + area(others_M4)[..., None, :] - shared
    # Two empty boxes share nothing: 0 / tiny in place of 0 / 0.
    return shared / union.clamp(min=torch.finfo(shared.dtype).tiny)


def encode(references: Tensor, targets: Tensor, weights: OffsetWeights) -> Tensor:
    """The offsets (..., 4) that take each reference box to its target.

    Sides of 1e-6 px or more keep padding finite.
    """
    ref_sides = (references[..., 2:] - references[..., :2]).clamp(min=1e-6)
    sides = (targets[..., 2:] - targets[..., :2]).clamp(min=1e-6)
    ref_centres = references[..., :2] + 0.5 * ref_sides
    centres = targets[..., :2] + 0.5 * sides
    shift, growth = (centres - ref_centres) / ref_sides, torch.log(sides / ref_sides)
    return torch.cat([shift * weights[0], growth * weights[1]], dim=-1)


def decode(references: Tensor, offsets: Tensor, weights: OffsetWeights) -> Tensor:
    """Boxes (..., 4) from reference boxes and offsets, in float32.

    The growth is clamped at `MAX_LOG_SCALE`.
    """
    # In fp32 under autocast too: bf16 would place a box within several pixels.
    shift, growth = offsets[..., :2].float() / weights[0], offsets[..., 2:].float() / weights[1]
    ref_sides = references[..., 2:] - references[..., :2]
    ref_centres = references[..., :2] + 0.5 * ref_sides
    centres = shift * ref_sides + ref_centres
    # Unclamped, an untrained network overflows here.
    half = 0.5 * torch.exp(growth.clamp(max=MAX_LOG_SCALE)) * ref_sides
    return torch.cat([centres - half, centres + half], dim=-1)


def clip(boxes_BN4: Tensor, sizes_B2: Tensor) -> Tensor:
    """Boxes cut to their images: (B, ..., 4) and heights and widths (B, 2)."""
    limits = sizes_B2.flip(1).to(boxes_BN4.dtype).repeat(1, 2)  # width, height, width, height
    limits = limits.reshape(limits.shape[0], *[1] * (boxes_BN4.dim() - 2), 4)
    return torch.minimum(boxes_BN4.clamp(min=0), limits)


def at_least(boxes: Tensor, side_px: float) -> Tensor:
    """Whether both sides reach `side_px`, (..., 4) to bool (...)."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side_px).all(dim=-1)
